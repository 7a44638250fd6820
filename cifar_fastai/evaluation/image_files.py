"""Predictions for image files of any size."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.vision.core import PILImage

from cifar_fastai.data.decode import SIZE
from cifar_fastai.data.photos import load_image
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import activation


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
