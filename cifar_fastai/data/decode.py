"""From the files of a data set to arrays: folders of PNG and JPEG images, or CIFAR-10's official batches."""

import hashlib
import io
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageFile

from cifar_fastai.data.official import BATCH_FILES, TEST_BATCH, TRAIN_BATCHES, read_batch, read_label_names
from cifar_fastai.data.sources import MAX_FILE_BYTES, open_source
from cifar_fastai.errors import InputError, printable, reason

__all__ = ["Decoded", "channel_statistics", "decode", "find_source", "in_notebook", "rgb"]

SPLITS = ("train", "test")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
OTHER_IMAGE_SUFFIXES = {".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".npy"}  # refused, rather than left out
SIZE = (32, 32)  # width, height
MAX_IMAGE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Decoded:
    """The decoded images of a source, train first, each split by class and then by file name, or in a batch's order."""

    images: np.ndarray  # uint8 (N, 3, 32, 32)
    labels: np.ndarray  # int64 (N,)
    classes: tuple  # of names, sorted
    n_train: int
    has_jpeg: bool
    folder: str  # on top of the data set within its source; empty where there is none
    mean: tuple  # of the train pixels in 0..1, one for each channel
    std: tuple

    @cached_property
    def fingerprint(self):
        """A hash of images, labels and classes: the same wherever the same content lies, in whatever form."""
        digest = hashlib.sha256(repr((self.images.shape, self.n_train, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8"))
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()


def find_source(path):
    """The data set at `path`, a folder or an archive (see `archives`). Raises InputError."""
    return open_source(path, marks=(*SPLITS, *BATCH_FILES))


def decode(source, progress=True):
    """All images of `source`. Raises InputError that names the first file or folder that is not as it must be.

    Archive: `train/<class>/*` and `test/<class>/*` of 32 x 32 pixels, or the official batches. `progress`: draw a
    progress line where stderr is a terminal.
    """
    if set(BATCH_FILES).intersection(entry.name for entry in source.entries):
        images, labels, classes, n_train, has_jpeg = _decode_batches(source, progress)
    else:
        images, labels, classes, n_train, has_jpeg = _decode_images(source, progress)
    mean, std = channel_statistics(images[:n_train])
    return Decoded(images, labels, classes, n_train, has_jpeg, "".join(source.root), mean, std)


def channel_statistics(images):
    """Mean and standard deviation of each channel of uint8 `images` (N, 3, H, W), pixels in 0..1: two 3-tuples."""
    counts = np.zeros((3, 256))
    for start in range(0, len(images), 1000):  # bincount makes 8 bytes of every pixel
        for channel in range(3):
            pixels = images[start : start + 1000, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    values = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)  # (3, 256)
    mean = (weights * values).sum(axis=1)
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
    std = std.clip(min=1 / 255)  # of images all of one colour: something to divide by
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def _decode_images(source, progress):
    files, labels, classes, n_train = _plan(source)
    images = np.empty((len(files), 3, *SIZE), dtype=np.uint8)
    has_jpeg = False
    contents = source.read(files, MAX_IMAGE_BYTES)
    with _strict_and_silent_pillow():
        for i, content in _progress(contents, len(files), "decoding images", progress):
            images[i], is_jpeg = _decode_image(content, source.where(files[i]))
            has_jpeg |= is_jpeg
    return images, labels, classes, n_train, has_jpeg


def _plan(source):
    """Which file has which label: `(files, labels, classes, n_train)`, in the order of the arrays."""
    found = _classes_found(source)
    where = printable(source.path)
    for split in SPLITS:
        if split not in found:
            raise InputError(f"{where}: no {split} folder; the images belong in {split}/<class>/")
        if not found[split]:
            raise InputError(f"{where}: no class folders in {split}; the images belong in {split}/<class>/")
    train, test = (found[split] for split in SPLITS)
    for name in sorted(train.keys() ^ test.keys()):
        there, missing = SPLITS if name in train else SPLITS[::-1]
        raise InputError(f"{where}: class {name} is in {there} and not in {missing}; each class belongs in both")
    for split in SPLITS:
        for name, files in sorted(found[split].items()):
            if not files:
                raise InputError(f"{where}: no png or jpg image in {split}/{name}; fill the folder or remove the class")
    if len(train) < 2:
        raise InputError(f"{where}: only one class, {name}; there must be two at least")
    classes = tuple(sorted(train))  # CIFAR-10's official order is alphabetical
    files, labels = [], []
    for split in SPLITS:
        for label, name in enumerate(classes):
            files += sorted(found[split][name])
            labels += [label] * len(found[split][name])
    return files, np.array(labels, dtype=np.int64), classes, sum(map(len, train.values()))


def _classes_found(source):
    """{split: {class: [image files]}} for the folders that there are."""
    found = {}
    for entry in source.entries:
        split, *inside = entry.parts
        if split not in SPLITS or not (entry.is_dir or inside):
            continue
        classes = found.setdefault(split, {})
        suffix = PurePath(entry.parts[-1]).suffix.lower()
        is_image = not entry.is_dir and suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES
        if is_image and suffix in OTHER_IMAGE_SUFFIXES:
            raise InputError(f"{source.where(entry)}: neither png nor jpg; convert or remove it")
        if len(inside) == 2 and not entry.is_dir:
            files = classes.setdefault(inside[0], [])
            if is_image:
                files.append(entry)
        elif len(inside) == 1 and entry.is_dir:
            classes.setdefault(inside[0], [])
        elif is_image or len(inside) == 2:
            raise InputError(
                f"{source.where(entry)}: images belong in {split}/<class>/, neither above nor deeper; move or remove it"
            )
    return found


def _decode_image(content, where):
    """`(pixels, is_jpeg)`: uint8 (3, 32, 32), and what the content (not the name) says it is."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.size != SIZE:
                width, height = image.size
                raise InputError(f"{where}: {width}x{height} pixels; every image must be 32x32, so resize it")
            is_jpeg = image.format != "PNG"
            pixels = np.asarray(rgb(image))  # (32, 32, 3)
        if not is_jpeg:
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding leaves out
    except InputError:
        raise
    except Exception as error:  # of a damaged file: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{where}: cannot be read as an image ({_image_cause(error)}); replace or remove it") from None
    return pixels.transpose(2, 0, 1), is_jpeg


def rgb(image):
    """A PIL image of any mode in RGB: what is transparent becomes white, and 16 bits of grey become 8."""
    if image.mode == "F":  # floats, whose black and white nobody knows: its least and its greatest
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        image = Image.fromarray((255 * (values - values.min()) / max(np.ptp(values), 1e-12)).round().astype(np.uint8))
    if image.mode.startswith("I"):  # which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _strict_and_silent_pillow():
    """No half images, whatever another library has asked Pillow for, and no warnings between our lines."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _image_cause(error):
    return "neither png nor jpg" if isinstance(error, Image.UnidentifiedImageError) else reason(error)


def _decode_batches(source, progress):
    files = {entry.name: entry for entry in source.entries if not entry.is_dir}
    for name in BATCH_FILES:
        if name not in files:
            raise InputError(f"{printable(source.path)}: no {name} beside the other batches; get the archive again")
    meta = files["batches.meta"]
    [(_, content)] = source.read([meta], MAX_FILE_BYTES)
    names = read_label_names(content, source.where(meta))
    if len(names) < 2:
        raise InputError(f"{source.where(meta)}: must name two classes at least, and names {len(names)}")
    batches = [files[name] for name in (*TRAIN_BATCHES, TEST_BATCH)]
    parts = [None] * len(batches)
    contents = source.read(batches, MAX_FILE_BYTES)
    for i, content in _progress(contents, len(batches), "reading batches", progress):
        parts[i] = read_batch(content, len(names), source.where(batches[i]))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    classes = tuple(sorted(names))
    labels = np.array([classes.index(name) for name in names])[labels].astype(np.int64)
    return images, labels, classes, len(images) - len(parts[-1][0]), False


def in_notebook():
    """Whether Jupyter or Colab runs this."""
    if "IPython" not in sys.modules:
        return False
    from fastprogress.core import in_notebook

    return in_notebook()


def _progress(items, total, text, on):
    """Yield `items`, drawing how many of `total` are done on a terminal or in a notebook; a log gets none of it."""
    if on and in_notebook():
        from fastprogress import progress_bar

        yield from progress_bar(items, total=total, leave=False, comment=text)
        return
    on, drawn = on and sys.stderr.isatty(), 0.0
    try:
        for done, item in enumerate(items):
            if on and time.monotonic() - drawn > 0.1:
                drawn = time.monotonic()
                bar = "=" * (20 * done // total)
                print(f"\r{text} [{bar:<20}] {done:,} of {total:,} \033[K", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        if on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
