"""Tiny data sets, on disk and in archives, good and bad."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_fastai.data.images import CIFAR10_CLASSES, load_images
from cifar_fastai.data.sources import BATCH_FILES
from cifar_fastai.errors import InputError

CLASSES = ("cat", "dog")


def encoded(image, format="PNG", **options):
    """The bytes of an image file, from a PIL image or uint8 (H, W, 3)."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def random_pixels(seed, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def tiny_files(classes=CLASSES, n_train=3, n_test=2, top=""):
    """{name: content} of an image folder; every picture is another."""
    splits = [("train", n_train), ("test", n_test)]
    names = [f"{top}{split}/{name}/{i:04}.png" for split, n in splits for name in classes for i in range(n)]
    return {name: encoded(random_pixels(seed)) for seed, name in enumerate(names)}


TINY = tiny_files()


def without(files, part):
    return {name: content for name, content in files.items() if part not in name}


def write_folder(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    for field, value in {"size": len(content), **fields}.items():
        setattr(info, field, value)
    return info, content


def write_tar(path, files, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for info, content in [*(member(*file) for file in files.items()), *extra]:
            tar.addfile(info, io.BytesIO(content))
    return path


def batch_files(n=4, protocol=2, names=CIFAR10_CLASSES, **changes):
    """The official batches with `n` rows each; `changes` replaces the content of files."""
    rng = np.random.default_rng(0)
    content = {"batches.meta": {b"label_names": [name.encode() for name in names], b"num_vis": 3072}}
    for name in BATCH_FILES[1:]:
        content[name] = {
            b"batch_label": name.encode(),
            b"labels": rng.integers(0, len(names), n).tolist(),
            b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"filenames": [f"{i}.png".encode() for i in range(n)],
        }
    content |= changes
    return {k: v if isinstance(v, bytes) else pickle.dumps(v, protocol) for k, v in content.items()}


def cifar100_files(n=300, protocol=2, **changes):
    """CIFAR-100's files in the official format, `n` train and `n` // 2 test images; `changes` replaces files."""
    rng = np.random.default_rng(0)
    names = {b"fine_label_names": [f"class{k:02}" for k in range(100)]}
    content = {"meta": names | {b"coarse_label_names": [f"super{k:02}" for k in range(20)]}}
    for name, size in ("train", n), ("test", n // 2):
        labels = [k % 100 for k in range(size)]
        content[name] = {
            b"filenames": [f"{k}.png".encode() for k in range(size)],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": labels,
            b"coarse_labels": [7 * label % 20 for label in labels],
            b"data": rng.integers(0, 256, (size, 3072), dtype=np.uint8),
        }
    return {name: pickle.dumps(value, protocol) for name, value in (content | changes).items()}


def refused(path, message):
    """Assert that `path` is refused with one line that matches, and nothing cached."""
    with pytest.raises(InputError, match=message) as refusal:
        load_images(path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 700 and refusal.value.status == 2
    assert not list(Path(os.environ["CIFAR_FASTAI_CACHE"]).glob("*"))
