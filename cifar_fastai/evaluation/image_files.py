"""Predictions for image files of any size."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.vision.core import PILImage
from PIL import Image, ImageOps

from cifar_fastai.data.decode import MAX_PIXELS, SIZE, rgb, upright
from cifar_fastai.errors import InputError, reason
from cifar_fastai.evaluation.predictions import activation

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others include EPS, for which it runs Ghostscript


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """The prediction of a network for one image file."""

    file: Path
    image: np.ndarray  # (S, S, 3) uint8, the network's input before normalisation
    probs: np.ndarray  # (C,) float32
    classes: tuple[str, ...]  # C names
    note: str | None  # how the picture became S x S, if it had another size

    @property
    def top3(self):
        """[(class, probability)] of the three most probable classes (fewer where there are fewer classes)."""
        return [(self.classes[k], float(self.probs[k])) for k in np.argsort(-self.probs, kind="stable")[:3]]


def load_image(file, size=SIZE):
    """(image, note): uint8 (size, size, 3) of an image file of any size, and how it was resized, or None.

    The EXIF orientation is applied, transparent pixels become white, an oblong picture is cropped to its central
    square, and an animation is its first frame. Raises InputError for what is no readable file in one of `FORMATS`.
    """
    file = Path(file)
    try:
        if not file.is_file():  # a folder, or a pipe, for which Pillow would wait
            raise ValueError("No such file")
        with warnings.catch_warnings(action="ignore"):  # Pillow's, about large pictures and odd EXIF data
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"more than {MAX_PIXELS:,} pixels")
                frames = getattr(picture, "n_frames", 1)
                image = rgb(upright(picture))
    except Exception as error:  # Pillow raises many types for damaged files
        problem = "not an image" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise InputError(f"{file}: cannot be read ({problem}); use {', '.join(FORMATS)} files") from None
    (width, height), notes = image.size, [f"the first of {frames} pictures"] if frames > 1 else []
    if (width, height) != (size, size):
        how = "resized" if width == height else "cropped to its central square and resized"
        notes.append(f"{width} x {height}, {how} to {size} x {size}")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image), ", ".join(notes) or None


def image_batch(learn, images):
    """The model's input for images uint8 (N, H, W, 3): normalised (N, 3, H, W) on the learner's device."""
    return torch.cat([batch[0].as_subclass(torch.Tensor) for batch in _image_dl(learn, images)])


def _image_dl(learn, images):
    return learn.dls.test_dl([PILImage.create(np.ascontiguousarray(image)) for image in images], num_workers=0)


def predict_files(learn, files):
    """An `ImagePrediction` for each of `files`, one path or several, of images of any size (see `load_image`).

    Works on an exported learner, too. Raises InputError for the first file that is not an image, and without files.
    """
    files = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not files:
        raise InputError("no image files; name at least one", files=files)
    size = getattr(learn, "settings", {}).get("size") or SIZE
    images, notes = zip(*(load_image(file, size) for file in files), strict=True)
    probs, classes = class_probs(learn, images), tuple(map(str, learn.dls.vocab))
    return [ImagePrediction(*row, classes, note) for *row, note in zip(files, images, probs, notes, strict=True)]


def class_probs(learn, images):
    """The probability of each class for images uint8 (N, H, W, 3): float32 (N, C)."""
    probs, _ = learn.get_preds(dl=_image_dl(learn, images), act=activation(learn))
    return probs.float().cpu().as_subclass(torch.Tensor).numpy()
