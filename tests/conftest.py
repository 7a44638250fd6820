"""Tiny data and networks that the tests share."""

import os

import numpy as np
import pytest

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache of decoded images."""
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_images():
    """An ImageSet of three classes, 48 train and 18 test images, each class brightest in a channel of its own."""
    from cifar_fastai.data import ImageSet

    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(48) % 3, np.arange(18) % 3]).astype(np.int64)
    images = rng.integers(0, 160, (66, 3, 32, 32), dtype=np.uint8)
    images[np.arange(66), labels] += 90
    pixels = images[:48] / 255
    return ImageSet(
        name="tiny", classes=("red", "green", "blue"), images=images, labels=labels, n_train=48,
        mean=tuple(pixels.mean((0, 2, 3))), std=tuple(pixels.std((0, 2, 3))), fingerprint="f00d", source="made up",
        note=None,
    )  # fmt: skip
