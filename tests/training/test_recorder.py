"""The step loop does not wait for the device, and its means are means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training.callbacks import L1Penalty, StopOnBadLoss
from cifar_fastai.training.learner import cifar_learner


class CountReads(TorchDispatchMode):
    """Count what makes a step wait: numbers read into Python, and copies to the host from another device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        elif func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu" and out.device.type == "cpu":
            self.reads += 1
        return out


def _learner(images, **kwargs):
    """A small network over 20 times the images, so that an epoch has 480 steps of 2."""
    train = np.tile(images.train_images, (20, 1, 1, 1))
    many = replace(
        images,
        images=np.concatenate([train, images.test_images]),
        n_train=len(train),
        labels=np.concatenate([np.tile(images.train_labels, 20), images.test_labels]),
    )
    dls = cifar_dls(many, bs=2, device="cpu")
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 4),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, len(images.classes)),
    )
    return cifar_learner(dls, net, **kwargs)


def _reads_in_training(learn):
    counter = CountReads()
    with learn.no_logging(), counter:
        learn.fit_one_cycle(1, 0.1)
    return counter.reads, len(learn.dls.train)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(precision="bf16"), dict(opt="adam"), dict(cbs=[StopOnBadLoss(), L1Penalty(1e-5)])],
    ids=["fp32", "bf16", "adam", "guarded"],
)
def test_fewer_than_one_read_in_ten_steps(tiny_images, settings):
    reads, steps = _reads_in_training(_learner(tiny_images, **settings))
    assert steps == 480 and reads < steps / 10


def test_the_counter_sees_what_fastais_own_bar_reads(tiny_images):
    learn = _learner(tiny_images)
    learn.remove_cb(learn.progress)
    learn.add_cb(ProgressCallback())
    reads, steps = _reads_in_training(learn)
    assert reads >= steps


def test_losses_are_means_over_images(tiny_images):
    dls = cifar_dls(tiny_images, bs=6, val_bs=4, device="cpu", padding=0, cutout=0, flip=0.0)
    learn = cifar_learner(
        dls,
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)),
        lr=0.0,
        wd=0.0,
        momentum=0.0,
        nesterov=False,
        precision="fp32",
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.0)
    train_loss, train_acc, valid_loss, valid_acc = learn.recorder.values[-1]
    x = torch.cat([x for x, _ in dls.valid]).as_subclass(torch.Tensor)
    y = torch.cat([y for _, y in dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad():
        out = learn.model(x)
    assert valid_loss == pytest.approx(nn.functional.cross_entropy(out, y).item(), rel=1e-5)
    assert valid_acc == pytest.approx((out.argmax(1) == y).float().mean().item())
    assert len(y) % 4  # batches of unlike sizes, or the mean of means would do
    x, y = (torch.cat(parts).as_subclass(torch.Tensor) for parts in zip(*dls.train, strict=True))  # all 48
    with torch.no_grad():
        out = learn.model(x)
    assert train_loss == pytest.approx(nn.functional.cross_entropy(out, y).item(), rel=1e-5), "no smoothed one"
    assert train_acc == pytest.approx((out.argmax(1) == y).float().mean().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu(tiny_images):
    class NoWaiting(Callback):
        order = -100

        def before_batch(self):
            torch.cuda.set_sync_debug_mode("error" if self.training and self.train_iter > 2 else "default")

        def after_train(self):
            torch.cuda.set_sync_debug_mode("default")

    dls = cifar_dls(tiny_images, bs=4, device="cuda")
    learn = cifar_learner(dls, "resnet18", cbs=NoWaiting())
    learn.progress.seconds = 1e9
    with learn.no_logging():
        learn.fit_one_cycle(1, 0.01)
