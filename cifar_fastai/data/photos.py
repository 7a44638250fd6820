"""Pictures of any size as the networks take them."""

import io
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from fastai.vision.core import PILImage
from fasttransform import Transform
from PIL import Image

from cifar_fastai.data.decode import MAX_PIXELS, SIZE, fit, rgb, upright
from cifar_fastai.errors import InputError, reason
from cifar_fastai.files import check_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others include EPS, for which it runs Ghostscript


def load_image(file, size=SIZE):
    """(image, note): uint8 (size, size, 3) of an image file of any size, and how it was resized, or None.

    `file`: a path, the content of a file, or a PIL image. The EXIF orientation is applied, transparent pixels become
    white, an oblong picture is cropped to its central square, and an animation is its first frame. Raises InputError
    for what is no readable file in one of `FORMATS`.
    """
    file = Path(file) if isinstance(file, str) else file
    name, is_path = file if isinstance(file, Path) else type(file).__name__, isinstance(file, Path)
    try:
        if is_path:  # Pillow would wait for a pipe
            check_regular(file)
        with warnings.catch_warnings(action="ignore"):  # Pillow's, about large pictures and odd EXIF data
            file = io.BytesIO(file) if isinstance(file, bytes) else file
            with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"more than {MAX_PIXELS:,} pixels")
                frames = getattr(picture, "n_frames", 1)
                image = rgb(upright(picture))
    except Exception as error:  # Pillow raises many types for damaged files
        problem = "not an image" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise InputError(f"{name}: cannot be read ({problem}); use {', '.join(FORMATS)} files") from None
    (width, height), notes = image.size, [f"the first of {frames} pictures"] if frames > 1 else []
    if (width, height) != (size, size):
        how = "resized" if width == height else "cropped to its central square and resized"
        notes.append(f"{width} x {height}, {how} to {size} x {size}")
    return fit(image, size), ", ".join(notes) or None


class FitImage(Transform):
    """What `PILImage.create` takes -> a `PILImage` of `size` x `size` pixels, as `load_image` makes it."""

    input_types = str, Path, bytes, np.ndarray, torch.Tensor, Image.Image

    def __init__(self, size=SIZE):
        super().__init__()
        self.size = size

    def encodes(self, item: str | Path | bytes | np.ndarray | torch.Tensor | Image.Image):
        item = PILImage.create(item) if isinstance(item, (np.ndarray, torch.Tensor)) else item
        return PILImage.create(load_image(item, self.size)[0])
