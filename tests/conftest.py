"""Tiny data and networks that the tests share."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache of decoded images."""
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_images():
    """An ImageSet of three classes, 48 train and 18 test images, each class brightest in a channel of its own."""
    from cifar_fastai.data.images import ImageSet

    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(48) % 3, np.arange(18) % 3]).astype(np.int64)
    images = rng.integers(0, 160, (66, 3, 32, 32), dtype=np.uint8)
    images[np.arange(66), labels] += 90
    pixels = images[:48] / 255
    return ImageSet(
        name="tiny",
        classes=("red", "green", "blue"),
        images=images,
        labels=labels,
        n_train=48,
        mean=tuple(pixels.mean((0, 2, 3))),
        std=tuple(pixels.std((0, 2, 3))),
        fingerprint="f00d",
        source="made up",
        note=None,
    )


class TinyNet(nn.Module):
    """A network of 200 weights whose children are called as ResNet's: (B, 3, H, W) -> (B, n_classes)."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.linear = nn.Linear(4, n_classes)

    def forward(self, x):
        return self.linear(self.layer1(self.bn1(self.conv1(x))).mean((2, 3)))


@pytest.fixture
def tiny_model():
    """A `TinyNet` for the classes of `tiny_images`, always with the same weights."""
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder of PNG files, 16 train and 6 test images for each of three classes that can hardly be told apart."""
    root, rng = tmp_path_factory.mktemp("data") / "colours", np.random.default_rng(0)
    for split, n in (("train", 16), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 240, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 3
                Image.fromarray(pixels).save(root / split / name / f"{k:02}.png")
    return root


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """Starts runs of the tiny recipe as processes: see tiny_runs.py."""
    from tiny_runs import Recipes

    recipes = Recipes(tmp_path_factory.mktemp("recipes"))
    yield recipes
    recipes.close()


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    """Runs on the tiny network in this process: see tiny_runs.py."""
    from tiny_runs import Tiny

    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tiny_folder.parent / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Tiny(tiny_folder, monkeypatch)
    torch.set_num_threads(threads)
