"""The misclassified images of a run as a page shows them: sprite sheets of images and of their heatmaps."""

import base64
import io
from dataclasses import dataclass, fields, replace

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from cifar_fastai.plots.style import check_lengths

SHEET = 8  # tiles on a side of a sprite sheet


@dataclass(frozen=True)
class Tiles:
    """Misclassified images, worst loss first, and their heatmaps where they were computed.

    images: uint8 (K, H, W, 3); indices: int (K,), into the split; targets, predicted: K class names; confidence,
    losses: float (K,); cam_predicted, cam_true: float (K, H, W) in 0..1, or None (cam_true alone with a method that
    explains no class); negligible_predicted, negligible_true: bool (K,), maps that are labelled and not drawn, or None;
    caption: how the maps were made ("GradCAM of layer3, 8 x 8 pixels"). Raises ValueError on unequal lengths.
    """

    images: np.ndarray
    indices: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray
    cam_predicted: np.ndarray | None = None
    cam_true: np.ndarray | None = None
    negligible_predicted: np.ndarray | None = None
    negligible_true: np.ndarray | None = None
    caption: str = ""

    def __post_init__(self):
        check_lengths(self._arrays())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        return replace(self, **{name: array[rows] for name, array in self._arrays().items()})

    def _arrays(self):
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "caption"}
        return {name: array for name, array in values.items() if array is not None}

    def rows(self, classes):
        """One dict for each tile; `negligible` holds "p" and "t" for the heatmaps (predicted, true) not to draw."""
        targets, predicted = (map(classes.index, names) for names in (self.targets, self.predicted))
        flags = self.negligible_predicted, self.negligible_true
        flags = (np.zeros(len(self), bool) if array is None else array for array in flags)
        negligible = ["p" * bool(p) + "t" * bool(t) for p, t in zip(*flags, strict=True)]
        columns = self.indices, targets, predicted, self.confidence, self.losses, negligible
        keys = "index", "t", "p", "confidence", "loss", "negligible"
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]

    def sheets(self, lossless):
        """Sprite sheets of SHEET x SHEET tiles: dicts of data URIs, image and, with heatmaps, predicted and true."""
        sheets, kind = [], {"kind": "WEBP", "lossless": True, "method": 3} if lossless else {"kind": "JPEG"}
        for start in range(0, len(self), SHEET**2):
            part = self[start : start + SHEET**2]
            sheets.append({"image": _sheet(part.images, quality=60 if lossless else 90, **kind)})
            for view, maps in ("predicted", part.cam_predicted), ("true", part.cam_true):
                if maps is not None:
                    heat = colormaps["inferno"](np.nan_to_num(maps), bytes=True)[..., :3]  # (K, H, W, 3)
                    sheets[-1][view] = _sheet(heat, "JPEG", quality=70)
        return sheets


def _sheet(images, kind, **options):
    """uint8 (K, H, W, 3) as one picture. JPEG needs full chroma to keep neighbours apart."""
    _, height, width, _ = images.shape
    n_rows = -(-len(images) // SHEET)
    cells = np.zeros((n_rows * SHEET, height, width, 3), np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(n_rows, SHEET, height, width, 3).swapaxes(1, 2)  # (rows, H, SHEET, W, 3)
    options = options | ({"subsampling": 0} if kind == "JPEG" else {})
    return image_uri(cells.reshape(n_rows * height, SHEET * width, 3), kind, **options)


def image_uri(pixels, kind="PNG", **options):
    """uint8 (H, W, 3) as the address of a picture inside a page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return data_uri(file.getvalue(), f"image/{kind.lower()}")


def data_uri(data, mime):
    """Bytes as an address inside a page, safe in HTML and CSS."""
    return Markup(f"data:{mime};base64,{base64.b64encode(data).decode()}")
