"""From the files of a data set to arrays: folders of PNG and JPEG images, or CIFAR-10's official batches."""

import io
import sys
import warnings
from contextlib import suppress
from pathlib import PurePath

import numpy as np
from fastcore.imports import in_notebook
from PIL import ExifTags, Image, ImageFile

from cifar_fastai.data.official import read_batch, read_label_names
from cifar_fastai.data.sources import BATCH_FILES, SPLITS
from cifar_fastai.errors import InputError, printable

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".jpe"}
SIZE = (32, 32)  # width, height
MAX_IMAGE_BYTES, MAX_BATCH_BYTES, MAX_NAME = 2**20, 2**26, 255
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # Exif 2 to 8


def decode(source, progress=True):
    """`(images, labels, classes, n_train, has_jpeg)` of `source`, a Folder or Archive.

    images uint8 (N, 3, 32, 32), train first, by class and file name or in the order of the official batches; labels
    int64 (N,); classes a sorted tuple of names; has_jpeg whether any image is a JPEG. `progress`: draw a progress line
    where stderr is a terminal or in a notebook. Raises InputError that names the first wrong file or folder.
    """
    is_official = any(name[0] in BATCH_FILES for name in source.files)
    allows_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # set by other libraries
    try:
        with warnings.catch_warnings(action="ignore"):
            return (_decode_batches if is_official else _decode_images)(source, progress)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allows_truncated


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


def _decode_images(source, progress):
    names = _list_images(source)
    n_train, classes = sum(name[0] == "train" for name in names), tuple(sorted({name[1] for name in names}))
    images, has_jpeg = np.empty((len(names), 3, *SIZE), dtype=np.uint8), False
    for i, content in enumerate(_read(source, names, MAX_IMAGE_BYTES, "decoding images", progress)):
        images[i], is_jpeg = _decode_image(content, source.where(names[i]))
        has_jpeg |= is_jpeg
    labels = np.array([classes.index(name[1]) for name in names], dtype=np.int64)  # CIFAR-10's order is alphabetical
    return images, labels, classes, n_train, has_jpeg


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


def _decode_image(content, where):
    """`(pixels, is_jpeg)`: uint8 (3, 32, 32), and the format by the content, whatever the name says."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            size, is_jpeg = image.size, image.format != "PNG"
            pixels = np.asarray(rgb(upright(image))) if size == SIZE else None  # (32, 32, 3)
        if not is_jpeg:
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding leaves out
    except Exception:  # of a damaged file: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(f"{where}: damaged, or neither png nor jpg; replace or remove it") from None
    if size != SIZE:
        raise InputError(f"{where}: {size[0]}x{size[1]} pixels; every image must be 32x32, so resize it")
    return pixels.transpose(2, 0, 1), is_jpeg


def _decode_batches(source, progress):
    for file in BATCH_FILES:
        if (file,) not in source.files:
            raise InputError(f"{printable(source.path)}: no {file} beside the other batches; get the archive again")
    meta, *contents = _read(source, [(file,) for file in BATCH_FILES], MAX_BATCH_BYTES, "reading batches", progress)
    names = read_label_names(meta, source.where(BATCH_FILES[:1]))
    parts = [read_batch(contents[i], len(names), source.where((BATCH_FILES[i + 1],))) for i in range(len(contents))]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    classes = tuple(sorted(names))
    labels = np.array([classes.index(name) for name in names])[labels].astype(np.int64)
    return images, labels, classes, len(images) - len(parts[-1][0]), False


def _read(source, names, max_bytes, text, progress):
    """Yield the contents of files, with a progress bar on a terminal or in a notebook; a log gets none of it."""
    from tqdm.auto import tqdm  # here, where warnings are silent: it warns in a notebook without ipywidgets

    for name in tqdm(names, text, leave=False, disable=not (progress and (sys.stderr.isatty() or in_notebook()))):
        yield source.read(name, max_bytes)
