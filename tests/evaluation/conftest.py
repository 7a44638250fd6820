"""A small learner that the tests of evaluation share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training.learner import cifar_learner


class PlaceNet(nn.Module):
    """Sees colour and place, so that every view has a score of its own; maps of 15 x 15."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 15 * 15, n_classes)

    def forward(self, x):
        return self.linear(F.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def learner(tiny_images):
    """Makes a learner on `tiny_images`."""

    def create(**settings):
        torch.manual_seed(0)
        return cifar_learner(cifar_dls(tiny_images, bs=8, val_bs=5, device="cpu"), PlaceNet(), **settings)

    return create


@pytest.fixture
def learn(learner):
    """A learner after one epoch, which makes some errors."""
    learn = learner(precision="fp32", label_smoothing=0.1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=5e-4)
        yield learn
