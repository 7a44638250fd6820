"""The misclassified images of a run as a page shows them: sprite sheets of images and of their heatmaps."""

import base64
import io
import math
from dataclasses import dataclass, fields, replace

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

__all__ = ["SHEET", "Tiles", "data_uri", "encoded", "sheets", "tile_rows"]

SHEET = 8  # tiles on a side of a sprite sheet
HEAT = (colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)  # (256, 3)


@dataclass(frozen=True)
class Tiles:
    """Misclassified images in any order and, where they were computed, their heatmaps.

    images: uint8 (K, H, W, 3); indices: int (K,), into the split; targets, predicted: K class names; confidence,
    losses: float (K,); cam_predicted, cam_true: float (K, H, W) in 0..1, or None (with a method that explains no class
    cam_true alone); negligible_predicted, negligible_true: bool (K,), the maps that are labelled and not drawn, or
    None; caption: how the maps were made ("GradCAM of layer3, 8 x 8 pixels"). Raises ValueError when they differ in
    length.
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
        sizes = {name: len(values) for name, values in self._arrays()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"tiles need one value for each image: {sizes}")

    def __len__(self):
        return len(self.images)

    def _arrays(self):
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "caption")
        return [(name, np.asarray(values)) for name, values in pairs if values is not None]

    def take(self, rows):
        """The tiles of these rows (an index array, a mask or a slice)."""
        return replace(self, **{name: values[rows] for name, values in self._arrays()})

    def worst_first(self):
        """The tiles that are errors, by falling loss."""
        order = np.argsort(-np.nan_to_num(np.asarray(self.losses, float), nan=np.inf), kind="stable")
        return self.take(order[np.asarray(self.targets)[order] != np.asarray(self.predicted)[order]])


def sheets(tiles, lossless):
    """Sprite sheets of SHEET x SHEET tiles as data URIs: dicts of image and, with heatmaps, predicted and true."""
    made = []
    for start in range(0, len(tiles), SHEET**2):
        part = tiles.take(slice(start, start + SHEET**2))
        sheet = {"image": _sheet(np.asarray(part.images), lossless)}
        for view in ("predicted", "true"):
            cams = getattr(part, f"cam_{view}")
            if cams is not None:
                heat = HEAT[(np.nan_to_num(cams).clip(0, 1) * 255).astype(np.uint8)]  # (K, H, W, 3)
                sheet[view] = _sheet(heat, lossless=False, quality=70)
        made.append(sheet)
    return made


def _sheet(images, lossless, quality=90):
    """Lay out uint8 (K, H, W, 3) from left to right, top to bottom. JPEG with full chroma keeps neighbours apart."""
    k, height, width, _ = images.shape
    n_rows = math.ceil(k / SHEET)
    cells = np.zeros((n_rows * SHEET, height, width, 3), np.uint8)
    cells[:k] = images
    cells = cells.reshape(n_rows, SHEET, height, width, 3).swapaxes(1, 2)  # (rows, H, SHEET, W, 3)
    sheet = Image.fromarray(cells.reshape(n_rows * height, SHEET * width, 3))
    if lossless:
        return data_uri(encoded(sheet, "WEBP", lossless=True, quality=60, method=3), "image/webp")
    return data_uri(encoded(sheet, "JPEG", quality=quality, subsampling=0), "image/jpeg")


def tile_rows(tiles, classes):
    """What stands under each picture; `faint` names the heatmaps that are negligible ("p", "t" or both)."""
    ids = {name: number for number, name in enumerate(classes)}
    faint = [
        np.zeros(len(tiles), bool) if flags is None else flags
        for flags in (tiles.negligible_predicted, tiles.negligible_true)
    ]
    columns = tiles.indices, tiles.targets, tiles.predicted, tiles.confidence, tiles.losses, *faint
    return [
        dict(
            index=int(index),
            t=ids[str(true)],
            p=ids[str(predicted)],
            confidence=float(sure),
            loss=float(loss),
            faint="p" * bool(p) + "t" * bool(t),
        )
        for index, true, predicted, sure, loss, p, t in zip(*columns, strict=True)
    ]


def encoded(image, kind, **options):
    """The bytes of a PIL image in a format of PIL's; `options` go to the encoder."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(data, mime):
    """`data` as an address that a page can hold; safe to put into HTML and CSS as it is."""
    return Markup(f"data:{mime};base64,{base64.b64encode(data).decode()}")
