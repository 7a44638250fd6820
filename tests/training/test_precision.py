"""The model computes in half precision, on any device, and autocast is left whatever happens."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.precision import Precision, ScaledStep


class Spy(nn.Module):
    """A linear network that records the type its convolution computes in."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.conv, self.linear, self.seen = nn.Conv2d(3, 4, 3, 4), nn.Linear(4, n_classes), []

    def forward(self, x):
        x = self.conv(x)
        self.seen.append(x.dtype)
        return self.linear(x.mean((2, 3)))


class NoteLoss(Callback):
    def after_loss(self):
        self.types = self.pred.dtype, self.loss.dtype, torch.is_autocast_enabled("cpu")


@pytest.fixture
def dls(tiny_images):
    return cifar_dls(tiny_images, bs=8, device="cpu", padding=0, cutout=0, flip=0.0)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_model_computes_in_it_and_the_loss_in_float32(dls, name, dtype):
    note = NoteLoss()
    learn = cifar_learner(dls, Spy(), precision=name, cbs=note)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.get_preds()
    assert set(learn.model.seen) == {dtype}, "in training, validation and prediction"
    assert note.types == (torch.float32, torch.float32, False)
    assert all(p.dtype is torch.float32 for p in learn.model.parameters())


def test_a_learner_changes_its_precision(dls):
    """The last one that was asked for is the only one, fastai's own callback among them."""
    learn = cifar_learner(dls, Spy(), precision="fp32")

    def types():
        learn.model.seen.clear()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        return {*learn.model.seen}, [type(cb).__name__ for cb in learn.cbs if cb.order == 10]

    assert learn.to_bf16() is learn and types() == ({torch.bfloat16}, ["Precision"])
    assert learn.settings["precision"] == "bf16" and len(learn.to_bf16()._grab_cbs(Precision)) == 1
    learn.add_cb(MixedPrecision)
    assert [type(cb).__name__ for cb in learn.cbs if cb.order == 10] == ["MixedPrecision"]
    assert learn.to_bf16() is learn and types() == ({torch.bfloat16}, ["Precision"])
    assert learn.to_fp32() is learn and types() == ({torch.float32}, [])
    with pytest.raises(InputError, match="precision='fp16': not available on a CPU; use bf16 or fp32"):
        learn.to_fp16()


def test_gradients_accumulate_and_are_clipped_after_their_scale_is_taken_out(dls):
    weights = []
    for cbs in [], [ScaledStep(init_scale=8.0)]:
        torch.manual_seed(0)
        dls.train.rng.seed(0)
        learn = cifar_learner(dls, Spy(), precision="fp32", cbs=[GradientAccumulation(16), GradientClip(1e-3), *cbs])
        before = learn.model.conv.weight.detach().clone()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        weights.append(learn.model.conv.weight.detach())
    torch.testing.assert_close(*weights)
    assert 0 < (weights[0] - before).abs().max() < 1e-3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_autocast_is_left_after_an_error_in_the_model(dls, error):
    class Failing(Spy):
        def forward(self, x):
            raise error

    learn = cifar_learner(dls, Failing(), precision="bf16")
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(error):
            learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(dls):
    learn = cifar_learner(dls, Spy(), precision="fp32", lr=0.1)
    learn.add_cb(ScaledStep())

    class Overflow(Callback):
        order = 5

        def after_backward(self):
            if self.train_iter == 1:
                next(self.model.parameters()).grad.fill_(float("inf"))

        def before_batch(self):
            self.before = [p.clone() for p in self.model.parameters()]

        def after_batch(self):
            if self.training:
                same = all(torch.equal(a, b) for a, b in zip(self.before, self.model.parameters(), strict=True))
                assert same == (self.train_iter == 2), self.train_iter  # counted before this runs

    learn.add_cb(Overflow())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.scaled_step.scaler.get_scale() == 2.0**15


def test_scaling_changes_nothing_in_float32(dls):
    weights = []
    for cbs in ([], [ScaledStep()]):
        torch.manual_seed(0)
        dls.train.rng.seed(0)
        learn = cifar_learner(dls, Spy(), precision="fp32", cbs=cbs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        weights.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    torch.testing.assert_close(*weights)
