"""A run folder -> report.html: one page that opens from disk, with the numbers, the settings and the errors.

The page asks no network for anything: style, script and pictures are inside it, and its own Content-Security-Policy
forbids the rest. Everything that comes from a file is escaped by the template engine.
"""

import base64
import csv
import hashlib
import io
import json
import math
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from cifar_fastai.config import BASE
from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write

__all__ = ["LIMIT", "Tiles", "write_report"]

LIMIT = 8_000_000  # bytes of a page
FIGURES_LIMIT = 2_500_000  # bytes of its figures
SHEET = 8  # tiles on a side of a sprite sheet
LOSSLESS_TILES = 2_500  # above, there is no room for lossless images: do not try
HEAT = (colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)  # (256, 3)
METRICS = ("dataset", "model", "parameters", "epochs", "seed", "device", "precision", "eval_split", "train_accuracy",
           "valid_accuracy", "valid_loss", "test_accuracy", "tta_accuracy", "tta_shift_accuracy", "class_accuracy",
           "images_per_second", "seconds")  # fmt: skip
NOT_FLAGS = ("out", "resume", "debug")  # a repeated run starts afresh, in a folder of its own

# name, title, how to treat it in dark mode, and whether the explorer shows the same and more
FIGURES = (
    ("schedule", "Schedule of the learning rate", "chart", False),
    ("lr_find", "Range test of the learning rate", "chart", False),
    ("augmentations", "What the network was shown", "photo", False),
    ("top_losses", "Highest losses", "photo", True),
    ("misclassified", "Misclassified images", "photo", True),
    ("gradcam", "Where the network looked", "photo", True),
)


@dataclass(frozen=True)
class Tiles:
    """Misclassified images in any order and, where they were computed, their heatmaps.

    images: uint8 (K, H, W, 3); indices: int (K,), into the split; targets, predicted: K class names; confidence,
    losses: float (K,); cam_predicted, cam_true: float (K, H, W) in 0..1, or None; negligible_predicted,
    negligible_true: bool (K,), the maps that are labelled and not drawn, or None; caption: how the maps were made
    ("GradCAM of layer3, 8 x 8 pixels"). Raises ValueError when they differ in length.
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


def write_report(run_dir, tiles=None):
    """Write report.html into the run folder `run_dir` and return its path.

    Reads config.json and, where they are, metrics.json, history.csv, predictions.csv, summary.txt and the figures.
    `tiles`: the errors with their images, or None for a page without them. A page stays under `LIMIT` bytes: the
    images are stored as JPEG when they would not fit otherwise, then the errors of the lowest losses are left out, and
    the page says so. Raises InputError when `run_dir` is no run folder, ValueError when `tiles` disagree in length.
    """
    run_dir = Path(run_dir)
    config = _read_json(run_dir / "config.json")
    metrics = dict.fromkeys(METRICS) | _read_json(run_dir / "metrics.json", missing={})
    history, predictions = _read_csv(run_dir / "history.csv"), _read_csv(run_dir / "predictions.csv")
    names = *(metrics["class_accuracy"] or ()), *(row[key] for row in predictions for key in ("target", "predicted"))
    classes = list(dict.fromkeys(names))
    matrix = _confusion_matrix(predictions, classes)
    n_errors = int(matrix.sum() - matrix.trace())
    tiles = tiles.worst_first() if tiles is not None and n_errors else None
    split = "valid" if metrics["test_accuracy"] is None else "test"
    environment = _environment()
    script = Markup(environment.get_template("report.js").render())
    context = dict(
        run=run_dir.resolve().name, metrics=metrics, history=history, classes=classes, matrix=matrix.tolist(),
        title=f"{metrics['model'] or config.get('model') or 'A run'} on {metrics['dataset'] or 'images'}",
        notes=_notes(config, metrics, history), split=split, split_name={"test": "test", "valid": "validation"}[split],
        accuracy=metrics[f"{split}_accuracy"], eval_name="Validation" if metrics["eval_split"] == "valid" else "Test",
        n_images=len(predictions), n_errors=n_errors, missed=(matrix.sum(1) - matrix.diagonal()).tolist(),
        taken=(matrix.sum(0) - matrix.diagonal()).tolist(), charts=_charts(history, metrics["eval_split"] or "test"),
        class_rows=_class_rows(matrix, classes), pairs=_worst_pairs(matrix), shades=_shades(matrix),
        command=_command(config), given=config.get("given") or {}, facts=_facts(config),
        parameters={name: config[name] for name in BASE if name in config},
        summary=_read_text(run_dir / "summary.txt"), figures=_figures(run_dir, explorer=tiles is not None),
        heatmaps=tiles is not None and tiles.cam_predicted is not None, sheet=SHEET, limit=LIMIT, script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    page = _largest_page(environment.get_template("report.html"), context, tiles)
    path = run_dir / "report.html"
    with atomic_write(path, "wb") as file:
        file.write(page)
    return path


def _largest_page(template, context, tiles):
    """The page as bytes, with as many of `tiles` as LIMIT allows."""

    def render(tiles, lossless):
        sheets = [] if tiles is None else _sheets(tiles, lossless)
        return template.render(context, tiles=tiles, rows=_tile_rows(tiles, context["classes"]), sheets=sheets,
                               lossless=lossless).encode()  # fmt: skip

    if tiles is None or len(tiles) <= LOSSLESS_TILES:
        page = render(tiles, lossless=True)
        if tiles is None or len(page) < LIMIT:
            return page
    page = render(tiles, lossless=False)
    while len(page) >= LIMIT and len(tiles):
        tiles = tiles.take(slice(int(0.98 * len(tiles) * LIMIT / len(page))))
        page = render(tiles, lossless=False)
    return page


# ------------------------------------------------------------------------------------------------- what a run wrote


def _read_text(path):
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path, missing=None):
    if not path.is_file() and missing is not None:
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the folder of a run") from None


def _read_csv(path):
    """The rows as dicts, empty when there is no file: classes as text, other values as numbers, None where blank."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: text if name in ("target", "predicted") else float(text) if text else None
                 for name, text in row.items()} for row in csv.DictReader(file)]  # fmt: skip


def _command(config):
    """The command line that repeats the run, quoted for a shell; None when the run does not say its recipe."""
    if not config.get("recipe"):
        return None
    words = ["python", f"recipes/{config['recipe']}.py"]
    for name, value in (config.get("given") or {}).items():
        if name in NOT_FLAGS or value is None or value is False:
            continue
        flag, text = "--" + name.replace("_", "-"), str(value)
        words += [flag] if value is True else [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)


def _notes(config, metrics, history):
    """What a reader must know before the numbers."""
    notes = [note for note in (config.get("note"), metrics.get("note")) if note]
    planned = config.get("epochs")
    if planned and len(history) < planned:
        notes.append(f"The run ended after {len(history)} of {planned} epochs.")
    if metrics["test_accuracy"] is None and metrics["valid_accuracy"] is None:
        notes.append("The run was not evaluated.")
    elif metrics["test_accuracy"] is None:
        notes.append("The test split was not read: these are numbers of the validation split, cut from train.")
    return notes


def _facts(config):
    """What config.json holds besides parameters, nested names joined: {"versions torch": "2.9.1", ...}."""
    facts = {}
    for name, value in config.items():
        if name not in BASE and name not in ("recipe", "given", "note"):
            inner = value if isinstance(value, dict) else {"": value}
            facts |= {f"{name} {key}".strip().replace("_", " "): item for key, item in inner.items()}
    return facts


def _figures(run_dir, explorer):
    """The run's figures as data URIs; one that is large is made smaller, or left out when there is no room for it."""
    figures, room = [], FIGURES_LIMIT
    for name, title, kind, in_explorer in FIGURES:
        path = run_dir / f"{name}.png"
        if not path.is_file() or (explorer and in_explorer):
            continue
        data, mime = path.read_bytes(), "image/png"
        with Image.open(path) as image:
            if len(data) > 400_000:
                image.thumbnail((1800, 6000))
                data, mime = _encoded(image.convert("RGB"), "WEBP", quality=85), "image/webp"
            if len(data) * 4 / 3 <= room:
                room -= len(data) * 4 / 3
                figures.append(dict(name=name, title=title, kind=kind, uri=_data_uri(data, mime), size=image.size))
    return figures


# --------------------------------------------------------------------------------------------- classes and confusions


def _confusion_matrix(predictions, classes):
    """int (C, C): images by true class (rows) and predicted class (columns)."""
    ids = {name: number for number, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), int)
    for row in predictions:
        matrix[ids[row["target"]], ids[row["predicted"]]] += 1
    return matrix


def _class_rows(matrix, classes):
    """One dict per class; fractions without a denominator are None."""

    def ratio(part, whole):
        return part / whole if whole else None

    rows, wrong = [], matrix * ~np.eye(len(classes), dtype=bool)
    for number, name in enumerate(classes):
        images, taken = int(matrix[number].sum()), int(matrix[:, number].sum())
        correct, other = int(matrix[number, number]), int(wrong[number].argmax())
        rows.append(dict(
            name=name, images=images, correct=correct, accuracy=ratio(correct, images), precision=ratio(correct, taken),
            f1=ratio(2 * correct, images + taken), other=classes[other], n_other=int(wrong[number, other]),
        ))  # fmt: skip
    return rows


def _worst_pairs(matrix, n=6):
    """The largest cells off the diagonal: (true, predicted, images), largest first."""
    cells = [(int(matrix[t, p]), int(t), int(p)) for t, p in np.argwhere(matrix) if t != p]
    return [(t, p, images) for images, t, p in sorted(cells, key=lambda cell: (-cell[0], cell[1:]))[:n]]


def _shades(matrix):
    """Depth of colour of each cell, 0..1: errors against the largest, right ones against their row."""
    wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    shades = (wrong / max(1, wrong.max(initial=0))) ** 0.75
    np.fill_diagonal(shades, matrix.diagonal() / np.maximum(matrix.sum(1), 1))
    return shades.round(2).tolist()


# -------------------------------------------------------------------------------------------------------------- curves


def _charts(history, eval_split):
    """Accuracy, loss and learning rate by epoch, in percent of a chart's box."""
    splits = ("train", "train_"), (eval_split, "valid_")
    shown = [("Accuracy", "percent", [(name, key + "accuracy") for name, key in splits]),
             ("Loss", "number", [(name, key + "loss") for name, key in splits])]  # fmt: skip
    charts = []
    for title, unit, lines in shown:
        known = [(name, [row.get(key) for row in history]) for name, key in lines]
        values = [v for _, column in known for v in column if v is not None and math.isfinite(v)]
        if values:
            charts.append(_chart(title, unit, known, min(values), max(values)))
    return charts


def _chart(title, unit, lines, low, high):
    step = 10 ** math.floor(math.log10(max(high - low, 0.01 * abs(high), 1e-6)))
    step *= next(m for m in (0.2, 0.5, 1, 2) if max(high - low, 0.01 * abs(high), 1e-6) / (m * step) <= 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    high = max(high, low + step)
    n = max(len(column) for _, column in lines)

    def x(row):
        return 50 if n == 1 else 100 * row / (n - 1)

    def path(column):
        """SVG path; a value that is missing breaks the line, one that stands alone is a dot."""
        d, pen_down = "", False
        for row, v in enumerate(column):
            known = v is not None and math.isfinite(v)
            if known:
                d += f"{'L' if pen_down else 'M'}{x(row):.2f} {100 - 100 * (v - low) / (high - low):.2f}"
                d += "" if pen_down else "h0"
            pen_down = known
        return d

    every = max(1, math.ceil(n / 10))
    return dict(
        title=title, unit=unit, digits=0 if step >= 0.01 else 1,
        lines=[dict(name=name, d=path(column), last=column[-1]) for name, column in lines],
        y=[(100 * k * step / (high - low), low + k * step) for k in range(round((high - low) / step) + 1)],
        x=[(x(row), row + 1) for row in range(n) if row % every == every - 1 or n <= 10],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tiles


def _sheets(tiles, lossless):
    """Sprite sheets of SHEET x SHEET tiles as data URIs: dicts of image and, with heatmaps, predicted and true."""
    sheets = []
    for start in range(0, len(tiles), SHEET**2):
        part = tiles.take(slice(start, start + SHEET**2))
        sheet = {"image": _sheet(np.asarray(part.images), lossless)}
        for view in ("predicted", "true"):
            cams = getattr(part, f"cam_{view}")
            if cams is not None:
                heat = HEAT[(np.nan_to_num(cams).clip(0, 1) * 255).astype(np.uint8)]  # (K, H, W, 3)
                sheet[view] = _sheet(heat, lossless=False, quality=70)
        sheets.append(sheet)
    return sheets


def _sheet(images, lossless, quality=90):
    """Lay out uint8 (K, H, W, 3) from left to right, top to bottom. JPEG with full chroma keeps neighbours apart."""
    k, height, width, _ = images.shape
    n_rows = math.ceil(k / SHEET)
    cells = np.zeros((n_rows * SHEET, height, width, 3), np.uint8)
    cells[:k] = images
    cells = cells.reshape(n_rows, SHEET, height, width, 3).swapaxes(1, 2)  # (rows, H, SHEET, W, 3)
    sheet = Image.fromarray(cells.reshape(n_rows * height, SHEET * width, 3))
    if lossless:
        return _data_uri(_encoded(sheet, "WEBP", lossless=True, quality=60, method=3), "image/webp")
    return _data_uri(_encoded(sheet, "JPEG", quality=quality, subsampling=0), "image/jpeg")


def _tile_rows(tiles, classes):
    """What stands under each picture; `faint` names the heatmaps that are negligible ("p", "t" or both)."""
    if tiles is None:
        return []
    ids = {name: number for number, name in enumerate(classes)}
    faint = [np.zeros(len(tiles), bool) if flags is None else flags
             for flags in (tiles.negligible_predicted, tiles.negligible_true)]  # fmt: skip
    columns = tiles.indices, tiles.targets, tiles.predicted, tiles.confidence, tiles.losses, *faint
    return [dict(index=int(index), t=ids[str(true)], p=ids[str(predicted)], confidence=float(np.nan_to_num(sure)),
                 loss=float(np.nan_to_num(loss)), faint="p" * bool(p) + "t" * bool(t))
            for index, true, predicted, sure, loss, p, t in zip(*columns, strict=True)]  # fmt: skip


def _encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _data_uri(data, mime):
    return Markup(f"data:{mime};base64,{base64.b64encode(data).decode()}")


# ----------------------------------------------------------------------------------------------------- values as text


def _environment():
    environment = Environment(loader=PackageLoader("cifar_fastai", "templates"), autoescape=True,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= dict(percent=_percent, count=_count, number=_number, duration=_duration, value=_value)
    return environment


def _percent(fraction, digits=2):
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def _count(number):
    return "–" if number is None else f"{number:,.0f}"


def _number(number, digits=4):
    return "–" if number is None else f"{number:.{digits}g}"


def _duration(seconds):
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def _value(value):
    """A parameter as a person would type it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
