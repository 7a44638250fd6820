"""`load_images`: a data set located, verified, decoded once, and returned as one `ImageSet`."""

import hashlib
import io
import os
import sys
import threading
import urllib.request
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from fastcore.imports import in_notebook
from PIL import Image

from cifar_fastai.data import cache
from cifar_fastai.data.cifar10 import in_official_order
from cifar_fastai.data.decode import decode
from cifar_fastai.data.sources import open_source
from cifar_fastai.errors import InputError, printable, reason

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 train images, pixels in 0..1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_SPLITS = (50_000, 10_000)  # train, test
CIFAR10, CIFAR10_JPEG, DIGITS = "CIFAR-10", "CIFAR-10 (JPEG copy)", "digits"
CIFAR10_OTHER = "CIFAR-10 (other pixels)"
COPIES = (CIFAR10_JPEG, CIFAR10_OTHER)
RESERVED = (CIFAR10, CIFAR10_JPEG, CIFAR10_OTHER, DIGITS)  # no folder gives its data set such a name
FASTAI_SOURCE = "fastai URLs.CIFAR"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set in memory: train images first, then test images. An image is (3, 32, 32), its channels RGB."""

    name: str  # "CIFAR-10", "CIFAR-10 (JPEG copy)", "CIFAR-10 (other pixels)", "digits", or the folder's name
    classes: tuple[str, ...]
    images: np.ndarray  # uint8 (N, 3, 32, 32)
    labels: np.ndarray  # int64 (N,)
    n_train: int
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    source: str  # the path or address, in a user's words
    note: str | None = None  # one line, where the result differs from the request

    def __repr__(self):
        """One line, and the note where there is one: a notebook shows it."""
        sizes = f"{self.n_train:,} train and {self.n_test:,} test images of {len(self.classes)} classes"
        about = f"{self.name}: {sizes}, from {Path(self.source).name}"
        return f"{about}\n{self.note}" if self.note else about

    @cached_property
    def fingerprint(self):
        """Hash of images, labels and classes in hex: the same on every machine, in any format."""
        digest = hashlib.sha256(repr((self.images.shape, self.n_train, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8"))
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()

    n_test = property(lambda self: len(self.images) - self.n_train)
    train_images = property(lambda self: self.images[: self.n_train])  # (n_train, 3, 32, 32)
    train_labels = property(lambda self: self.labels[: self.n_train])
    test_images = property(lambda self: self.images[self.n_train :])  # (n_test, 3, 32, 32)
    test_labels = property(lambda self: self.labels[self.n_train :])
    flip = property(lambda self: 0.0 if self.name == DIGITS else 0.5)  # a mirror changes digits


def load_images(data="auto", cache_dir=None, progress=True):
    """The data set that `data` names, as an `ImageSet`.

    data: "digits", scikit-learn's; "cifar10", from the cache, fastai's own copy, or the network; a folder with
    `train/<class>/*` and `test/<class>/*` (32 x 32, png or jpg), a .tgz, .tar.gz or .tar of one, the official
    `cifar-10-batches-py` folder or its archive; "auto" (or None), the path in the environment variable CIFAR10_PATH,
    else "cifar10", else, where that is not available, "digits" with a note that says why.
    cache_dir: where decoded images are kept, by default the user's cache folder (a note says where that fails).
    progress: draw a progress line where stderr is a terminal or in a notebook.
    Raises InputError where the data are missing, damaged or in another layout.
    """
    cache_dir = cache.cache_folder() if cache_dir is None else Path(cache_dir)
    data = "auto" if data is None else os.fspath(data)
    path = os.environ.get("CIFAR10_PATH") if data == "auto" else None
    try:
        if data == "digits":
            return _load_digits()
        if path or data not in ("auto", "cifar10"):
            return _load_path(path or data, cache_dir, progress)
        return _load_cifar10(cache_dir, progress)
    except InputError as error:
        if path:
            raise InputError(f"{error} (the environment variable CIFAR10_PATH names it)") from None
        if data != "auto":
            raise
        note = f"CIFAR-10 is not available ({error}); scikit-learn's digits are used instead"
        return replace(_load_digits(), note=note)


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 `images` (N, 3, H, W), pixels in 0..1: two 3-tuples."""
    n = images[:, 0].size
    mean = images.sum(axis=(0, 2, 3)) / n / 255  # (3,)
    squares = np.einsum("nchw,nchw->c", images, images, dtype=np.int64, casting="unsafe") / n / 255**2  # without a copy
    std = (squares - mean**2).clip(1 / 255**2) ** 0.5  # images of one colour: avoids a division by zero
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def stratified_cut(labels, rows, n, seed):
    """`rows` (int) in two parts, each class in proportion: `n` of them and the rest, both in order."""
    from sklearn.model_selection import train_test_split  # takes a second to load

    part, rest = train_test_split(rows, train_size=n, stratify=labels[rows], random_state=seed)
    return np.sort(part), np.sort(rest)


def _load_path(path, cache_dir, progress, address=None):
    """The data set in a folder or archive, from the cache where it has been decoded before."""
    source, address, note = open_source(os.path.expanduser(path)), printable(address or path), None
    key = source.key()
    fields = cache.load(cache_dir, key)
    if fields is None:
        images, labels, classes, n_train, has_jpeg = decode(source, progress)
        if classes == CIFAR10_CLASSES and (n_train, len(images) - n_train) == CIFAR10_SPLITS:  # the content decides
            images, labels, is_official = in_official_order(images, labels)
            name = CIFAR10 if is_official else CIFAR10_JPEG if has_jpeg else CIFAR10_OTHER
            mean, std = CIFAR10_MEAN, CIFAR10_STD
        else:
            name, (mean, std) = _folder_name(printable(source.root)), channel_statistics(images[:n_train])
        fields = dict(name=name, classes=classes, images=images, labels=labels, n_train=n_train, mean=mean, std=std)
        try:
            cache.store(cache_dir, key, fields | {"source": address})
        except OSError as error:
            problem = f"decoded images cannot be kept there ({reason(error)}), so each start decodes them again"
            note = f"{printable(cache_dir)}: {problem}; CIFAR_FASTAI_CACHE names another folder"
    name = fields["name"] or _folder_name(source.stem)  # "" is stored for a source that may be renamed
    return ImageSet(**fields | {"name": name, "source": address, "note": note})


def _folder_name(name):
    return f"folder {name}" if name in RESERVED else name


def _load_digits():
    """scikit-learn's digits: 1,797 of handwriting, 8 x 8 grey -> 32 x 32 RGB; 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    grey = (grey.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    train, test = stratified_cut(labels, np.arange(len(labels)), len(labels) - 360, seed=0)
    rows = np.concatenate([train, test])
    large = [np.asarray(Image.fromarray(grey[row]).resize((32, 32), Image.Resampling.BILINEAR)) for row in rows]
    images, labels = np.repeat(np.stack(large)[:, None], 3, axis=1), labels[rows].astype(np.int64)  # (1797, 3, 32, 32)
    statistics = channel_statistics(images[: len(train)])
    return ImageSet(DIGITS, tuple("0123456789"), images, labels, len(train), *statistics, "scikit-learn load_digits")


def _load_cifar10(cache_dir, progress):
    """CIFAR-10 from the cache, from fastai's own copy, or by fastai's download. Raises InputError with the cause."""
    for about in sorted(cache.entries(cache_dir), key=lambda about: about["source"] != FASTAI_SOURCE):
        if _is_cifar10(**about) and (fields := cache.load(cache_dir, about["key"])):
            return ImageSet(**fields)
    for path in _fastai_copies():
        try:
            images = _load_path(path, cache_dir, progress, FASTAI_SOURCE)
            if _is_cifar10(images.name, FASTAI_SOURCE):
                return images
            failure = f"{printable(path)}: {images.n_train:,} train and {images.n_test:,} test images"
        except InputError as error:
            failure = str(error)
    raise InputError(f"fastai's copy is not complete ({failure}); delete it and start again")


def _is_cifar10(name, source, **_):
    return name == CIFAR10 or (name, source) == (CIFAR10_JPEG, FASTAI_SOURCE)


def _fastai_copies():
    """The paths of fastai's own copies, archive first; downloads one if there is none. Raises InputError."""
    from fastai.data.external import URLs, fastai_path, untar_data

    try:  # errors of fastai, of the network, of the disk
        archive = fastai_path("archive") / URLs.CIFAR.rsplit("/", 1)[-1]
        copies = [path for path in (archive, fastai_path("data") / archive.stem) if path.exists()]
        if copies:
            return copies
        _probe(URLs.CIFAR)  # fastai's download has no timeout
        shows_bar = sys.stdout.isatty() or in_notebook()
        with nullcontext() if shows_bar else redirect_stdout(io.StringIO()):  # the bar would flood a log
            return [untar_data(URLs.CIFAR)]
    except Exception as error:
        raise InputError(f"download of {URLs.CIFAR}: {reason(error)}") from None


def _probe(url, seconds=15):
    """Raise the error unless `url` answers in time. In a thread, as urllib's timeout leaves out the host's look-up."""
    errors = [TimeoutError(f"no answer within {seconds} s")]

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
