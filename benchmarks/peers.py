"""Common alternatives, as documented or published: the rows that the benchmark compares with ours."""

import io
from contextlib import redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback import progress, schedule  # noqa: F401  (the progress bar by default; fit_one_cycle)
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (it gives Learner the method to_fp16)
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.augment import aug_transforms
from fastai.vision.core import cifar_stats
from fastai.vision.data import ImageDataLoaders
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from cifar_fastai.data.images import CIFAR10_MEAN, CIFAR10_STD
from cifar_fastai.hardware import autocast

__all__ = [
    "StopClock",
    "fastai_dls",
    "fastai_learner",
    "fit",
    "script_epoch",
    "stock_learner",
    "torchvision_dl",
    "training_step",
]


class StopClock(Callback):
    """Runs a Clock from the start of an epoch, and ends the fit when the Clock is done."""

    order = 1000

    def __init__(self, clock):
        self.clock = clock

    def before_train(self):
        self.clock.start()

    def after_batch(self):
        if self.clock.step():
            raise CancelFitException


def fit(learn, clock, cbs=()):
    """One epoch of one cycle under the clock; the learner's output is formatted and discarded."""
    with redirect_stdout(io.StringIO()):
        learn.fit_one_cycle(1, cbs=[*cbs, StopClock(clock)])


def fastai_dls(folder, bs, device):
    """fastai as in its documentation: images from folders, `aug_transforms`, as many workers as cores."""
    return ImageDataLoaders.from_folder(
        folder, valid="test", bs=bs, device=device, batch_tfms=[*aug_transforms(), Normalize.from_stats(*cifar_stats)]
    )


def fastai_learner(folder, model, bs, device):
    """fastai's Learner with its defaults, in half precision on a GPU; elsewhere `to_fp16` does nothing."""
    learn = Learner(fastai_dls(folder, bs, device), model, metrics=accuracy)
    return learn.to_fp16() if device.type == "cuda" else learn


def stock_learner(dls, model):
    """fastai's Learner with its own Recorder, progress bar and optimizer, over any batches."""
    return Learner(dls, model, metrics=accuracy, opt_func=SGD)


class InMemory(datasets.CIFAR10):
    """torchvision's CIFAR10 with images (N, 3, 32, 32) from memory in place of its download."""

    def __init__(self, images, labels, transform):
        self.data = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        self.targets, self.transform, self.target_transform = labels.tolist(), transform, None


def torchvision_dl(images, bs, workers):
    """The loader of the usual script, https://github.com/kuangliu/pytorch-cifar, which has two workers."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD),
        ]
    )
    return DataLoader(
        InMemory(images.train_images, images.train_labels, transform),
        bs,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
    )  # like fastai, so that all rows take the same number of steps


def training_step(model, optimizer, precision, device):
    """`step(x, y)` -> (loss, logits): PyTorch's own training step, with autocast and, in float16, a scaler."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    model.train()

    def step(x, y):
        optimizer.zero_grad()
        with autocast(device, precision):
            out = model(x)
        loss = F.cross_entropy(out.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss, out

    return step


def script_epoch(loader, model, precision, device):
    """The usual script's epoch as a function of a clock: it reads the loss and the hits at every step."""
    model = model.to(device)
    step = training_step(model, torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4), precision, device)

    def run(clock):
        total_loss = correct = 0
        clock.start()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss, out = step(x, y)
            total_loss += loss.item()
            correct += (out.argmax(1) == y).sum().item()
            if clock.step():
                break

    return run
