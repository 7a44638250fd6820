"""`load_images`: a data set located, verified, decoded once, and returned as one `ImageSet`."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from cifar_fastai.data import cache
from cifar_fastai.data.cifar10 import in_official_order
from cifar_fastai.data.decode import decode, resize
from cifar_fastai.data.download import download, mirrors
from cifar_fastai.data.sources import open_source
from cifar_fastai.errors import InputError, printable, reason
from cifar_fastai.settings import check_values

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 train images, pixels in 0..1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_SPLITS = (50_000, 10_000)  # train, test
CIFAR10, CIFAR10_JPEG, CIFAR10_OTHER = "CIFAR-10", "CIFAR-10 (JPEG copy)", "CIFAR-10 (other pixels)"
CIFAR100, CIFAR100_COARSE, DIGITS = "CIFAR-100", "CIFAR-100 (coarse)", "digits"
COPIES = {  # what such images mean for comparisons
    CIFAR10_JPEG: "JPEG compression has changed their pixels: compare results with others on this copy only",
    CIFAR10_OTHER: "not CIFAR-10's own pixels: results cannot be compared with published ones",
}
RESERVED = (CIFAR10, *COPIES, CIFAR100, CIFAR100_COARSE, DIGITS)  # no folder gives its data set such a name
NAMED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "cifar100-coarse": CIFAR100_COARSE}  # what `data` may name
FASTAI_SOURCE = "fastai URLs.CIFAR"


class NotAvailable(InputError):
    """An official data set is in none of the places; `failures` says for each one why."""

    def __init__(self, data, failures):
        self.failures, self.advice = failures, f"to its archive or folder, or {data.upper()}_URL to an address"
        super().__init__(f"{NAMED[data]} is not available: {'; '.join(failures)}; set `data` {self.advice}")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set in memory: train images first, then test images. An image is (3, S, S), S = 32 as a rule, in RGB."""

    name: str  # one of `RESERVED`, or the folder's name
    classes: tuple[str, ...]
    images: np.ndarray  # uint8 (N, 3, S, S)
    labels: np.ndarray  # int64 (N,)
    n_train: int
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    source: str  # the path or address, in a user's words
    note: str | None = None  # where the result differs from the request
    coarse: tuple[str, ...] | None = None  # CIFAR-100: the name of each class's superclass

    def __deepcopy__(self, memo):
        return self  # nothing in it changes, and a copy would take as much memory again

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

    size = property(lambda self: self.images.shape[-1])  # pixels a side
    n_test = property(lambda self: len(self.images) - self.n_train)
    train_images = property(lambda self: self.images[: self.n_train])  # (n_train, 3, S, S)
    train_labels = property(lambda self: self.labels[: self.n_train])
    test_images = property(lambda self: self.images[self.n_train :])  # (n_test, 3, S, S)
    test_labels = property(lambda self: self.labels[self.n_train :])
    flip = property(lambda self: 0.0 if self.name == DIGITS else 0.5)  # a mirror changes digits


def load_images(data="auto", cache_dir=None, progress=True, size=None, offline=False):
    """The data set that `data` names, as an `ImageSet`.

    data: "digits", scikit-learn's; "cifar10", "cifar100" or "cifar100-coarse" (20 superclasses), the official images
    from the cache, fastai's own copy, or the network (from the address in CIFAR10_URL or CIFAR100_URL, then from the
    mirrors in `cifar_fastai.data.download`); a folder with `train/<class>/*` and `test/<class>/*` (png or jpg), a .tgz,
    .tar.gz or .tar of one, the official batches in their folder or archive; "auto" (or None), the path in the
    environment variable CIFAR10_PATH, else "cifar10", else, where that is not available, "digits" with a note of why.
    cache_dir: where decoded images are kept, by default the user's cache folder (a note says where that fails).
    progress: draw a progress line where stderr is a terminal or in a notebook.
    size: pixels a side; images of another size are resized, the shorter side to `size`, and their centre is cut.
    Without it, images must be 32 x 32.
    offline: take nothing from the network.
    Raises InputError where the data are missing, damaged or in another layout.
    """
    check_values(size=size)
    cache_dir = cache.cache_folder() if cache_dir is None else Path(cache_dir)
    data = "auto" if data is None else os.fspath(data)
    path = os.environ.get("CIFAR10_PATH") if data == "auto" else None
    try:
        if data == "digits":
            images = _load_digits()
        elif path or data not in ("auto", *NAMED):
            images = _load_path(path or data, cache_dir, progress, size)
        else:
            images = _load_named("cifar10" if data == "auto" else data, cache_dir, progress, offline)
    except InputError as error:
        if path:
            raise InputError(f"{error} (the environment variable CIFAR10_PATH names it)") from None
        if data != "auto":
            raise
        lines = f"{CIFAR10} is not available, so scikit-learn's digits are used instead:", *error.failures
        advice = f"To use {CIFAR10}, set CIFAR10_PATH {error.advice}."
        images = replace(_load_digits(), note="\n  ".join(lines) + f"\n{advice}")
    if size in (None, images.size):
        return images
    pixels = resize(images.images, size, progress)
    mean, std = channel_statistics(pixels[: images.n_train])
    return replace(images, images=pixels, mean=mean, std=std)


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


def _load_path(path, cache_dir, progress, size=None, address=None, name=None):
    """The data set in a folder or archive, from the cache where it has been decoded before; `name`: what it must be."""
    source = open_source(os.path.expanduser(path))
    place, address = printable(address or os.path.abspath(source.path)), printable(address or path)
    key = source.key()
    resized_key = hashlib.sha256(f"{key} {size}".encode()).hexdigest()
    fields = cache.load(cache_dir, key) or (cache.load(cache_dir, resized_key) if size else None)
    is_new = fields is None
    if is_new:
        decoded = decode(source, progress, size)
        fields, key = _identify(decoded, printable(source.root)), resized_key if decoded.is_resized else key
    if name not in (None, fields["name"]):
        n, n_train = len(fields["labels"]), fields["n_train"]
        raise InputError(f"{printable(path)}: {n_train:,} train and {n - n_train:,} test images, but not {name}'s")
    note = f"{fields['name']}: {COPIES[fields['name']]}" if fields["name"] in COPIES else None
    try:
        if is_new:
            cache.store(cache_dir, key, fields | {"source": place})  # to be found from any folder
    except OSError as error:
        problem = f"decoded images cannot be kept there ({reason(error)}), so each start decodes them again"
        note = f"{printable(cache_dir)}: {problem}; CIFAR_FASTAI_CACHE names another folder"
    stem = fields["name"] or _folder_name(source.stem)  # "" is stored for a source that may be renamed
    return ImageSet(**fields | {"name": stem, "source": address, "note": note})


def _identify(decoded, folder):
    """The fields of an ImageSet, its source apart: the content decides what it is called, else `folder`."""
    images, labels, classes, n_train, has_jpeg, _, coarse, is_cifar100 = decoded
    mean, std, name = CIFAR10_MEAN, CIFAR10_STD, CIFAR100 if is_cifar100 else _folder_name(folder)
    if classes == CIFAR10_CLASSES and (n_train, len(images) - n_train) == CIFAR10_SPLITS:
        images, labels, is_official = in_official_order(images, labels)
        name = CIFAR10 if is_official else CIFAR10_JPEG if has_jpeg else CIFAR10_OTHER
    if name not in (CIFAR10, *COPIES) or images.shape[-1] != 32:
        mean, std = channel_statistics(images[:n_train])
    fields = dict(name=name, classes=classes, images=images, labels=labels, n_train=n_train, mean=mean, std=std)
    return fields | {"coarse": coarse}


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


def _load_named(data, cache_dir, progress, offline):
    """The official images of a name in `NAMED`. Raises InputError with each place and why it has none."""
    if data == "cifar100-coarse":
        images = _load_named("cifar100", cache_dir, progress, offline)
        classes = tuple(sorted(set(images.coarse)))
        labels = np.array([classes.index(name) for name in images.coarse])[images.labels]
        return replace(images, name=CIFAR100_COARSE, classes=classes, labels=labels, coarse=None)
    name = NAMED[data]
    if images := _load_cached(name, cache_dir):
        return images
    copies, folder = _fastai_copies() if data == "cifar10" else [], cache_dir / cache.DOWNLOADS
    failures = [f"{printable(cache_dir)}: not in the cache"]
    if data == "cifar10" and not copies:
        failures.append("fastai's folder: no copy")
    for path in copies:
        try:
            return _load_path(path, cache_dir, progress, None, FASTAI_SOURCE, name)
        except InputError as error:
            failures.append(str(error))
    if offline:
        raise NotAvailable(data, failures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # a second process waits for the first one's download
            if images := _load_cached(name, cache_dir):
                return images
            for url in mirrors(data):
                try:
                    return _fetch(url, folder, cache_dir, progress, name)
                except InputError as error:
                    failures.append(f"{printable(_public(url))}: {error}")
    except OSError as error:
        problem = f"cannot be written ({reason(error)}); CIFAR_FASTAI_CACHE names another folder"
        failures.append(f"{printable(folder)}: {problem}")
    raise NotAvailable(data, failures)


def _load_cached(name, cache_dir):
    """The ImageSet of this name in the cache, whatever path it came by, or None."""
    for about in cache.entries(cache_dir):
        if about["name"] == name and (fields := cache.load(cache_dir, about["key"])):
            return ImageSet(**fields)


def _fetch(url, folder, cache_dir, progress, name):
    """The images of the archive at `url`. InputError where it does not arrive, or is not what it should be."""
    archive = download(url, folder, progress)
    try:
        images = _load_path(archive, cache_dir, progress, None, _public(url), name)
    except InputError:
        os.replace(archive, archive.with_name(f"{archive.name}.wrong"))
        raise
    if not images.note:  # it is in the cache now
        archive.unlink()
    return images


def _public(url):
    """An address without its query, which may hold a key."""
    return url.partition("?")[0]


def _fastai_copies():
    """The paths of fastai's own copies of CIFAR-10, archive first."""
    with suppress(Exception):  # fastai makes a folder for its configuration, where it may not be allowed to
        from fastai.data.external import URLs, fastai_path

        archive = fastai_path("archive") / URLs.CIFAR.rsplit("/", 1)[-1]
        return [path for path in (archive, fastai_path("data") / archive.stem) if path.exists()]
    return []
