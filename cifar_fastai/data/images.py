"""Where the images come from: found, verified, decoded once, and handed over as one `ImageSet`."""

import io
import os
import sys
import threading
import urllib.request
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_fastai.data import cache
from cifar_fastai.data.decode import Decoded, channel_statistics, decode, find_source, in_notebook
from cifar_fastai.errors import InputError, printable, reason

__all__ = ["CIFAR10_CLASSES", "CIFAR10_MEAN", "CIFAR10_STD", "ImageSet", "load_images"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 train images, pixels in 0..1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_SPLITS = (50_000, 10_000)  # train, test
CIFAR10, CIFAR10_JPEG, DIGITS = "CIFAR-10", "CIFAR-10 (JPEG copy)", "digits"  # the names of data sets that we know
FASTAI_SOURCE = "fastai URLs.CIFAR"
PROBE_SECONDS = 15


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set in memory: train images first, then test images. An image is (3, 32, 32), its channels RGB."""

    name: str  # "CIFAR-10", "CIFAR-10 (JPEG copy)", "digits", or the folder's name
    classes: tuple[str, ...]
    images: np.ndarray  # uint8 (N, 3, 32, 32)
    labels: np.ndarray  # int64 (N,)
    n_train: int
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    fingerprint: str  # hex, of images, labels and classes: the same content has the same on every machine
    source: str  # as a user would say it
    note: str | None = None  # what went otherwise than asked, in one line

    def __repr__(self):
        """One line, and the note where there is one: what a notebook shows."""
        about = (
            f"{self.name}: {self.n_train:,} train and {self.n_test:,} test images of {len(self.classes)} classes, "
            f"from {Path(self.source).name}"
        )
        return f"{about}\n{self.note}" if self.note else about

    @property
    def n_test(self):
        return len(self.images) - self.n_train

    @property
    def train_images(self):
        return self.images[: self.n_train]  # (n_train, 3, 32, 32)

    @property
    def train_labels(self):
        return self.labels[: self.n_train]

    @property
    def test_images(self):
        return self.images[self.n_train :]  # (n_test, 3, 32, 32)

    @property
    def test_labels(self):
        return self.labels[self.n_train :]

    @property
    def flip(self):
        """The probability to mirror a train image: a digit in a mirror is no digit."""
        return 0.0 if self.name == DIGITS else 0.5


def load_images(data="auto", cache_dir=None, progress=True):
    """The data set that `data` names, as an `ImageSet`.

    data: a folder with `train/<class>/*` and `test/<class>/*` (32 x 32, png or jpg), a .tgz, .tar.gz or .tar of one,
    the official `cifar-10-batches-py` folder or its archive; "digits", scikit-learn's; "cifar10", from the cache,
    fastai's own copy, or the network; "auto" (or None), what the environment variable CIFAR10_PATH names, else
    "cifar10", else, where that cannot be had, "digits" with a note that says why.
    cache_dir: where decoded images are kept, by default the user's cache folder; one that cannot be written to costs
    a note. progress: draw a progress line where stderr is a terminal.

    Raises InputError where the data are not there or not as they must be.
    """
    data = "auto" if data is None else os.fspath(data)
    cache_dir = cache.cache_folder() if cache_dir is None else Path(cache_dir)
    if data == "auto" and (named := os.environ.get("CIFAR10_PATH")):
        try:
            return _load(named, cache_dir, progress)
        except InputError as error:
            raise InputError(f"{error} (the environment variable CIFAR10_PATH names it)") from None
    return _load(data, cache_dir, progress)


def _load(data, cache_dir, progress):
    if data == "digits":
        return _load_digits()
    if data == "cifar10":
        return _load_cifar10(cache_dir, progress)
    if data == "auto":
        try:
            return _load_cifar10(cache_dir, progress)
        except InputError as error:
            note = f"CIFAR-10 cannot be had ({error}); this is scikit-learn's digits in its place"
            return replace(_load_digits(), note=note)
    return _load_path(data, cache_dir, progress, source=data)


def _load_path(path, cache_dir, progress, source):
    """The data set in a folder or archive, out of the cache where it has been decoded before."""
    found = find_source(os.path.expanduser(path))
    key, note = found.key(), None
    decoded = cache.load(cache_dir, key)
    if decoded is None:
        decoded = decode(found, progress)
        try:
            cache.store(cache_dir, key, decoded, name=_name(decoded, found.stem), source=printable(source))
        except OSError as error:
            note = (
                f"{printable(cache_dir)}: decoded images cannot be kept there ({reason(error)}), so each start decodes "
                "them again; CIFAR_FASTAI_CACHE names another folder"
            )
    return _image_set(decoded, _name(decoded, found.stem), printable(source), note)


def _name(decoded, stem):
    """What the data set is called: by its content where that is CIFAR-10's, else by its folder."""
    splits = decoded.n_train, len(decoded.images) - decoded.n_train
    if decoded.classes == CIFAR10_CLASSES and splits == CIFAR10_SPLITS:
        return CIFAR10_JPEG if decoded.has_jpeg else CIFAR10
    name = printable(decoded.folder) or stem
    return f"folder {name}" if name in (CIFAR10, CIFAR10_JPEG, DIGITS) else name  # only the real ones are called so


def _image_set(decoded, name, source, note=None):
    mean, std = decoded.mean, decoded.std
    if name in (CIFAR10, CIFAR10_JPEG):
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    return ImageSet(
        name,
        decoded.classes,
        decoded.images,
        decoded.labels,
        decoded.n_train,
        mean,
        std,
        decoded.fingerprint,
        source,
        note,
    )


def _load_digits():
    """scikit-learn's digits: 1,797 of handwriting, 8 x 8 grey -> 32 x 32 RGB; 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    grey = (grey.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    rows = np.concatenate([np.sort(train), np.sort(test)])
    large = [np.asarray(Image.fromarray(grey[row]).resize((32, 32), Image.Resampling.BILINEAR)) for row in rows]
    images = np.repeat(np.stack(large)[:, None], 3, axis=1)  # (1797, 3, 32, 32)
    mean, std = channel_statistics(images[: len(train)])
    decoded = Decoded(images, labels[rows].astype(np.int64), tuple("0123456789"), len(train), False, "", mean, std)
    return _image_set(decoded, DIGITS, "scikit-learn load_digits")


def _load_cifar10(cache_dir, progress):
    """CIFAR-10 from the cache, from fastai's own copy, or by fastai's download. Raises InputError with the cause."""
    stored = [
        about
        for about in cache.entries(cache_dir)
        if about["name"] == CIFAR10 or (about["name"], about["source"]) == (CIFAR10_JPEG, FASTAI_SOURCE)
    ]
    for about in sorted(stored, key=lambda about: about["source"] != FASTAI_SOURCE):  # the same again, if it is there
        decoded = cache.load(cache_dir, about["key"])
        if decoded is not None:
            return _image_set(decoded, about["name"], about["source"])
    failures = []
    for path in _fastai_copies():
        try:
            images = _load_path(path, cache_dir, progress, FASTAI_SOURCE)
        except InputError as error:
            failures.append(str(error))
            continue
        if images.name in (CIFAR10, CIFAR10_JPEG):
            return images
        failures.append(f"{printable(path)}: {images.n_train:,} train and {images.n_test:,} test images")
    raise InputError(f"fastai's copy is not the whole of it ({failures[0]}); delete it and start again")


def _fastai_copies():
    """The paths of fastai's own copies, archive first; where there is none it is downloaded. Raises InputError."""
    from fastai.data.external import URLs, fastai_path, untar_data

    try:
        archive = fastai_path("archive") / URLs.CIFAR.rsplit("/", 1)[-1]
        copies = [path for path in (archive, fastai_path("data") / archive.stem) if path.exists()]
        if copies:
            return copies
        failure = _probe(URLs.CIFAR)
        if failure is None:
            shown_well = sys.stdout.isatty() or in_notebook()
            with nullcontext() if shown_well else redirect_stdout(io.StringIO()):  # the bar would flood a log
                return [untar_data(URLs.CIFAR)]
    except Exception as error:  # of fastai, of the network, of the disk: the run may do without
        failure = reason(error)
    raise InputError(f"download of {URLs.CIFAR}: {failure}")


def _probe(url, seconds=PROBE_SECONDS):
    """None where `url` answers within `seconds`, else why not. urllib's own timeout leaves out the search for a host's
    address, so the question is asked on a thread that can be left behind."""
    answer = [f"no answer within {seconds} s"]

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answer[0] = None
        except Exception as error:
            answer[0] = reason(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]
