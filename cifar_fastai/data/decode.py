"""From the files of a data set to arrays: folders of PNG and JPEG images, or the official batches of CIFAR."""

import hashlib
import io
import sys
import warnings
from contextlib import suppress
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from fastcore.imports import in_notebook
from PIL import ExifTags, Image, ImageFile, ImageOps

from cifar_fastai.data.official import CIFAR100_MD5, read_batch, read_label_names
from cifar_fastai.data.sources import BATCH_FILES, CIFAR100_FILES, SPLITS
from cifar_fastai.errors import InputError, printable

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".jpe"}
SIZE = 32  # pixels a side
MAX_IMAGE_BYTES, MAX_BATCH_BYTES, MAX_NAME = 2**20, 2**28, 255
MAX_PHOTO_BYTES, MAX_PIXELS = 2**25, 50_000_000  # of an image that is resized
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # Exif 2 to 8


class Decoded(NamedTuple):
    """What the files of a data set hold."""

    images: np.ndarray  # uint8 (N, 3, S, S), train first, by class and file name or as in the official batches
    labels: np.ndarray  # int64 (N,)
    classes: tuple[str, ...]  # sorted
    n_train: int
    has_jpeg: bool = False
    is_resized: bool = False  # whether any image had another size than 32 x 32
    coarse: tuple[str, ...] | None = None  # CIFAR-100: the name of each class's superclass
    is_cifar100: bool = False  # by the published MD5 of its files


def decode(source, progress=True, size=None):
    """The `Decoded` content of `source`, a Folder or Archive.

    `size`: images of another size than 32 x 32 are resized, and with them all others; without it they are refused.
    `progress`: draw a progress line where stderr is a terminal or in a notebook. Raises InputError that names the first
    wrong file or folder.
    """
    has_batches = _is_cifar100(source) or any(name[0] in BATCH_FILES for name in source.files)
    allows_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # set by other libraries
    try:
        with warnings.catch_warnings(action="ignore"):
            return _decode_batches(source, progress) if has_batches else _decode_images(source, progress, size)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allows_truncated


def resize(images, size, progress=False):
    """`images` uint8 (N, 3, H, W) as (N, 3, size, size): the shorter side becomes `size`, then the centre is cut."""
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for i in progress_bar(range(len(images)), f"resizing to {size} x {size}", progress):
        resized[i] = fit(Image.fromarray(images[i].transpose(1, 2, 0)), size).transpose(2, 0, 1)
    return resized


def fit(image, size):
    """The pixels (size, size, 3) of an RGB image: its shorter side becomes `size`, and its centre is kept."""
    image = image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def upright(image):
    """A PIL image turned the way its Exif orientation says."""
    image.load()  # by which Pillow turns a TIFF itself
    orientation = 1
    with suppress(Exception):  # ImageOps.exif_transpose fails where any other part of the Exif is odd
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return image.transpose(Image.Transpose[_TURNS[orientation - 2]]) if orientation in range(2, 9) else image


def rgb(image):
    """A PIL image of any mode in RGB: transparent pixels become white, and 16 bits of grey become 8."""
    if image.mode == "F":  # floats, of no standard range: from the least to the greatest
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        image = Image.fromarray((255 * (values - values.min()) / max(np.ptp(values), 1e-12)).round().astype(np.uint8))
    if image.mode.startswith("I"):  # which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _decode_images(source, progress, size):
    names, side, max_bytes = _list_images(source), SIZE, MAX_PHOTO_BYTES if size else MAX_IMAGE_BYTES
    n_train, classes = sum(name[0] == "train" for name in names), tuple(sorted({name[1] for name in names}))
    images, has_jpeg, is_resized = np.empty((len(names), 3, SIZE, SIZE), np.uint8), False, False
    for i, content in enumerate(_read(source, names, max_bytes, "decoding images", progress)):
        image, is_jpeg = _decode_image(content, source.where(names[i]), size)
        if image.size != (SIZE, SIZE) and side != size:  # the first of another size
            images, side = (
                np.concatenate([resize(images[:i], size), np.empty((len(names) - i, 3, size, size), np.uint8)]),
                size,
            )
        is_resized |= image.size != (SIZE, SIZE)
        images[i], has_jpeg = fit(image, side).transpose(2, 0, 1), has_jpeg | is_jpeg
    labels = np.array([classes.index(name[1]) for name in names], dtype=np.int64)  # CIFAR-10's order is alphabetical
    return Decoded(images, labels, classes, n_train, has_jpeg, is_resized)


def _list_images(source):
    """The names of the image files, (split, class, file), train first, by class and file."""
    names, where = [], printable(source.path)
    for name in source.files:
        is_image = PurePath(name[-1]).suffix.lower() in IMAGE_SUFFIXES
        if len(name) > 3 or is_image != (len(name) == 3):  # other files at the top or beside the classes do no harm
            place = f"must be an image, png or jpg, in {name[0]}/<class>/"
            raise InputError(f"{source.where(name)}: {place}; convert, move or remove it")
        names += [name] if is_image else []
    train, test = ({name[1] for name in names if name[0] == split} for split in SPLITS)
    for name in sorted(train | test):
        if name not in train & test:
            missing = f"{SPLITS[name in train]}/{printable(name)}/"
            raise InputError(f"{where}: no images in {missing}; every class needs some in train and in test")
        if not name.isprintable() or len(name) > MAX_NAME:
            raise InputError(
                f"{where}: class {printable(name)}: a name with control characters, or too long; rename it"
            )
    if len(train) < 2:
        raise InputError(f"{where}: holds images of {len(train)} classes in train/<class>/; at least two are needed")
    return sorted(names, key=lambda name: (name[0] != "train", name))


def _decode_image(content, where, size):
    """`(image, is_jpeg)`: a PIL image in RGB, and the format by the content, whatever the name says."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            (width, height), is_jpeg = image.size, image.format != "PNG"
            is_usable = width * height <= MAX_PIXELS if size else width == height == SIZE
            pixels = rgb(upright(image)) if is_usable else None
        if not is_jpeg:
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding leaves out
    except Exception:  # of a damaged file: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{where}: damaged, or neither png nor jpg; replace or remove it") from None
    if pixels is None:
        hint = f"at most {MAX_PIXELS:,} can be resized" if size else "every image must be 32x32, or `size` resizes them"
        raise InputError(f"{where}: {width}x{height} pixels; {hint}")
    return pixels, is_jpeg


def _is_cifar100(source):
    return all((file,) in source.files for file in CIFAR100_FILES)


def _decode_batches(source, progress):
    is_cifar100 = _is_cifar100(source)
    files, kinds = (CIFAR100_FILES, ("fine_label", "coarse_label")) if is_cifar100 else (BATCH_FILES, ("label",))
    for file in files:
        if (file,) not in source.files:
            raise InputError(f"{printable(source.path)}: no {file} beside the other batches; get the archive again")
    meta, *contents = _read(source, [(file,) for file in files], MAX_BATCH_BYTES, "reading batches", progress)
    names = {kind: read_label_names(meta, source.where(files[:1]), f"{kind}_names") for kind in kinds}
    counts = {f"{kind}s": len(names[kind]) for kind in kinds}
    parts = [
        read_batch(content, source.where((file,)), **counts) for content, file in zip(contents, files[1:], strict=True)
    ]
    images, labels, *coarse = map(np.concatenate, zip(*parts, strict=True))
    classes = tuple(sorted(names[kinds[0]]))
    labels = np.array([classes.index(name) for name in names[kinds[0]]])[labels].astype(np.int64)
    decoded = Decoded(images, labels, classes, len(images) - len(parts[-1][0]))
    if not is_cifar100:
        return decoded
    ids = np.zeros(len(classes), np.int64)  # the superclass of each class
    ids[labels] = coarse[0]
    if (ids[labels] != coarse[0]).any():
        raise InputError(f"{printable(source.path)}: a class with two superclasses; get the archive again")
    digests = [hashlib.md5(content, usedforsecurity=False).hexdigest() for content in (meta, *contents)]
    is_official = digests == [CIFAR100_MD5[file] for file in files]
    return decoded._replace(coarse=tuple(names[kinds[1]][k] for k in ids), is_cifar100=is_official)


def _read(source, names, max_bytes, text, progress):
    """Yield the contents of files."""
    for name in progress_bar(names, text, progress):
        yield source.read(name, max_bytes)


def progress_bar(iterable, text, progress=True, **options):
    """tqdm's bar over `iterable` on a terminal or in a notebook; a log gets none of it."""
    with warnings.catch_warnings(action="ignore"):  # in a notebook without ipywidgets
        from tqdm.auto import tqdm
    shows = progress and (sys.stderr.isatty() or in_notebook())
    return tqdm(iterable, text, leave=False, disable=not shows, **options)
