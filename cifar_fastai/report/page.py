"""A run folder -> report.html: one page that opens from disk, with the numbers, the settings and the errors.

The page asks no network for anything: style, script and pictures are inside it, and its own Content-Security-Policy
forbids the rest. Everything that comes from a file is escaped by the template engine.
"""

import base64
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from cifar_fastai.config import command_line
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.files import atomic_write
from cifar_fastai.report.tiles import SHEET, Tiles, data_uri, encoded, sheets, tile_rows
from cifar_fastai.training.history import read_history

__all__ = ["LIMIT", "Tiles", "write_report"]

LIMIT = 8_000_000  # bytes of a page
FIGURES_LIMIT = 2_500_000  # bytes of its figures
LOSSLESS_TILES = 2_500  # above, there is no room for lossless images: do not try
CONFIG = "recipe", "given", "parameters", "data_name", "classes", "hardware", "note"
METRICS = (
    "dataset",
    "model",
    "parameters",
    "epochs",
    "seed",
    "device",
    "precision",
    "eval_split",
    "train_accuracy",
    "valid_accuracy",
    "valid_loss",
    "test_accuracy",
    "tta_accuracy",
    "tta_shift_accuracy",
    "class_accuracy",
    "images_per_second",
    "seconds",
)

# name, title, how to treat it in dark mode, and whether the explorer shows the same and more
FIGURES = (
    ("schedule", "Schedule of the learning rate", "chart", False),
    ("lr_find", "Range test of the learning rate", "chart", False),
    ("augmentations", "What the network was shown", "photo", False),
    ("top_losses", "Highest losses", "photo", True),
    ("misclassified", "Misclassified images", "photo", True),
    ("gradcam", "Where the network looked", "photo", True),
)


def write_report(run_dir, tiles=None):
    """Write report.html into the run folder `run_dir` and return its path.

    Reads config.json and, where they are, metrics.json, history.csv, predictions.csv, summary.txt and the figures.
    `tiles`: the errors with their images, or None for a page without them. A page stays under `LIMIT` bytes: the
    images are stored as JPEG when they would not fit otherwise, then the errors of the lowest losses are left out, and
    the page says so. Raises InputError when `run_dir` is no run folder or one of its files cannot be read, ValueError
    when `tiles` disagree in length.
    """
    run_dir = Path(run_dir)
    config = dict.fromkeys(CONFIG) | _read_json(run_dir / "config.json")
    metrics = dict.fromkeys(METRICS) | _read_json(run_dir / "metrics.json", missing={})
    parameters, path = config["parameters"] or {}, run_dir / "history.csv"
    history = read_history(path) if path.is_file() else []
    classes = list(config["classes"] or metrics["class_accuracy"] or ())
    predictions = _read_predictions(run_dir / "predictions.csv", classes)
    matrix = np.zeros((len(classes),) * 2, int)
    if predictions is not None:
        classes, matrix = list(predictions.classes), predictions.confusion_matrix
    n_errors = int(matrix.sum() - matrix.trace())
    tiles = tiles.worst_first() if tiles is not None and n_errors else None
    split = "test" if metrics["test_accuracy"] is not None else metrics["eval_split"] or "test"
    environment = _environment()
    script = Markup(environment.get_template("report.js").render())
    context = dict(
        run=run_dir.resolve().name,
        metrics=metrics,
        history=history,
        parameters=parameters,
        title=f"{metrics['model'] or parameters.get('model')} on {metrics['dataset'] or config['data_name']}",
        notes=_notes(config, metrics, len(history), parameters.get("epochs")),
        split=split,
        split_name={"test": "test", "valid": "validation"}[split],
        accuracy=metrics[f"{split}_accuracy"],
        eval_name="Validation" if metrics["eval_split"] == "valid" else "Test",
        hardware=config["hardware"],
        charts=_charts(history, metrics["eval_split"] or "test"),
        figures=_figures(run_dir, explorer=tiles is not None),
        command=command_line(config),
        given=config["given"] or {},
        facts=_facts(config),
        summary=_read_text(run_dir / "summary.txt"),
        n_images=int(matrix.sum()),
        n_errors=n_errors,
        classes=classes,
        matrix=matrix.tolist(),
        missed=(matrix.sum(1) - matrix.diagonal()).tolist(),
        taken=(matrix.sum(0) - matrix.diagonal()).tolist(),
        class_rows=_class_rows(predictions) if predictions else [],
        pairs=_worst_pairs(predictions) if predictions else [],
        shades=_shades(matrix),
        sheet=SHEET,
        heatmaps=tiles is not None and tiles.cam_predicted is not None,
        classless=tiles is not None and tiles.cam_true is None,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    page = _largest_page(environment.get_template("report.html"), context, tiles)
    path = run_dir / "report.html"
    with atomic_write(path, "wb") as file:
        file.write(page)
    return path


def _largest_page(template, context, tiles):
    """The page as bytes, with as many of `tiles` as LIMIT allows."""

    def render(tiles, lossless):
        rows, pictures = ([], []) if tiles is None else (tile_rows(tiles, context["classes"]), sheets(tiles, lossless))
        return template.render(context, tiles=tiles, rows=rows, sheets=pictures, lossless=lossless).encode()

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
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the folder of a run") from None


def _notes(config, metrics, epochs, planned):
    """What a reader must know before the numbers."""
    notes = [config["note"]] if config["note"] else []
    if planned and epochs < planned:
        notes.append(f"The run ended after {epochs} of {planned} epochs.")
    if metrics["test_accuracy"] is None and metrics["valid_accuracy"] is None:
        notes.append("The run was not evaluated.")
    elif metrics["test_accuracy"] is None:
        notes.append("The test split was not read: these are numbers of the validation split, cut from train.")
    return notes


def _facts(config):
    """What config.json holds besides parameters; of nested values each is a fact of its own."""
    facts = {}
    for name, value in config.items():
        if name == "versions":
            facts |= value
        elif name not in CONFIG or name == "data_name":
            inner = value if isinstance(value, dict) else {"": value}
            facts |= {f"{name} {key}".strip(): item for key, item in inner.items()}
    return {name.replace("_", " "): value for name, value in facts.items() if value is not None}


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
                data, mime = encoded(image.convert("RGB"), "WEBP", quality=85), "image/webp"
            if len(data) * 4 / 3 <= room:
                room -= len(data) * 4 / 3
                figures.append(dict(name=name, title=title, kind=kind, uri=data_uri(data, mime), size=image.size))
    return figures


# --------------------------------------------------------------------------------------------- classes and confusions


def _read_predictions(path, classes):
    """What predictions.csv holds, None when there is no such file."""
    return Predictions.from_csv(path, tuple(classes) or None) if path.is_file() else None


def _class_rows(predictions):
    """One dict per class: the table of `Predictions`, and the class that it is most often taken for."""
    wrong = predictions.confusion_matrix * ~np.eye(len(predictions.classes), dtype=bool)
    return [
        row | dict(other=predictions.classes[errors.argmax()], n_other=int(errors.max()))
        for row, errors in zip(predictions.class_table, wrong, strict=True)
    ]


def _worst_pairs(predictions, n=6):
    """The classes that are confused most often: (true id, predicted id, images), most first."""
    return [
        (predictions.classes.index(true), predictions.classes.index(predicted), images)
        for true, predicted, images in predictions.most_confused()[:n]
    ]


def _shades(matrix):
    """Depth of colour of each cell, 0..1: errors against the largest, right ones against their row."""
    wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    shades = (wrong / max(1, wrong.max(initial=0))) ** 0.75
    np.fill_diagonal(shades, matrix.diagonal() / np.maximum(matrix.sum(1), 1))
    return shades.round(2).tolist()


# -------------------------------------------------------------------------------------------------------------- curves


def _charts(history, eval_split):
    """Accuracy and loss by epoch, in percent of a chart's box; none before there are two epochs to compare."""
    if len(history) < 2:
        return []
    splits = ("train", "train_"), (eval_split, "valid_")
    shown = [
        ("Accuracy", "percent", [(name, key + "accuracy") for name, key in splits]),
        ("Loss", "number", [(name, key + "loss") for name, key in splits]),
    ]
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
        title=title,
        unit=unit,
        digits=0 if step >= 0.01 else 1,
        lines=[dict(name=name, d=path(column), last=column[-1]) for name, column in lines],
        y=[(100 * k * step / (high - low), low + k * step) for k in range(round((high - low) / step) + 1)],
        x=[(x(row), row + 1) for row in range(n) if row % every == every - 1 or n <= 10],
    )


# ----------------------------------------------------------------------------------------------------- values as text


def _environment():
    environment = Environment(
        loader=PackageLoader("cifar_fastai.report", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
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
