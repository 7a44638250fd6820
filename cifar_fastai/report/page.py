"""A run folder -> report.html: one page that opens from disk, with the numbers, the settings and the errors.

The page requests nothing: style, script and pictures are inside it, and its Content-Security-Policy forbids the rest.
The template engine escapes everything that comes from a file.
"""

import base64
import hashlib
import io
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib import rc_context

from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.files import atomic_write, read_json
from cifar_fastai.plots.charts import MANY_CLASSES, MOST_CONFUSED, plot_curves
from cifar_fastai.plots.style import BLUE, GREY, VERMILION
from cifar_fastai.report.tiles import SHEET, data_uri
from cifar_fastai.training.recorder import history_columns, read_history

LABELS = dict(dataset="data set", tta_accuracy="with flip TTA", tta_shift_accuracy="with flip and shift TTA")
LABELS |= dict(images_per_second="images/s", seconds="training time")
LIMIT = 8_000_000  # bytes of a page
FIGURES_LIMIT = 2_500_000  # bytes of its figures
LOSSLESS_TILES = 2_500  # more lossless images would not fit
NO_FACTS = "recipe", "given", "parameters", "classes", "hardware", "note"  # of config.json, shown elsewhere
FIGURES = {
    "schedule": "Schedule of the learning rate",
    "lr_find": "Range test of the learning rate",
    "augmentations": "Augmentations of the train images",
    "top_losses": "Highest losses",
    "misclassified": "Misclassified images",
    "gradcam": "Where the network looked",
}
COLORS = {"#000000": "currentColor", BLUE: "var(--accent)", VERMILION: "var(--wrong)", GREY: "var(--soft)"}
OF_ERRORS = "top_losses", "misclassified", "gradcam"  # figures of which the explorer shows the same and more


def write_report(run_dir, tiles=None, command=None):
    """Write report.html into the run folder `run_dir` and return its path.

    Reads config.json and, where they exist, metrics.json, history.csv, predictions.csv, summary.txt and the figures.
    `tiles`: the errors with their images, worst loss first, or None for a page without them; `command`: the command
    that repeats the run. A page stays under `LIMIT` bytes: where lossless images do not fit they become JPEG, then
    the errors with the lowest losses are left out, and the page says so. Raises InputError where `run_dir` is not a
    run folder or one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    config, metrics = (_none_by_default(run_dir / name) for name in ("config.json", "metrics.json"))
    paths = {name: run_dir / name for name in ("history.csv", "summary.txt", "predictions.csv")}
    exists = {name: path.is_file() for name, path in paths.items()}
    history = read_history(paths["history.csv"]) if exists["history.csv"] else []
    summary = paths["summary.txt"].read_text("utf-8", "replace") if exists["summary.txt"] else ""
    classes = tuple(config["classes"] or metrics["class_accuracy"] or ())
    predictions = Predictions.from_csv(paths["predictions.csv"], classes) if exists["predictions.csv"] else None
    classes = predictions.classes if predictions else classes
    matrix = predictions.confusion_matrix if predictions else np.zeros((len(classes),) * 2, int)
    pairs = predictions.most_confused() if predictions else []
    n_images, n_errors = int(matrix.sum()), int(matrix.sum() - matrix.trace())
    tiles = tiles if n_errors else None
    eval_split = metrics["eval_split"] or config["eval_split"] or "test"
    split = "test" if metrics["test_accuracy"] is not None else eval_split
    script = Markup(get_template("report.js").render())
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context = dict(run=run_dir.resolve().name, config=config, metrics=metrics, history=history, summary=summary)
    context |= dict(command=command, split=split, facts=_facts(config), classes=classes, predictions=predictions)
    context |= dict(pairs=pairs, most_confused_with={true: (name, n) for true, name, n in reversed(pairs)})
    numbers = {name: k for k, name in enumerate(classes)}
    context |= dict(errors=[(numbers[true], numbers[name], n) for true, name, n in pairs])
    if len(classes) <= MANY_CLASSES:
        context |= dict(matrix=matrix.tolist(), shades=_shades(matrix).tolist())
    context |= dict(n_pairs=MOST_CONFUSED, n_images=n_images, n_errors=n_errors)
    context |= dict(tiles=tiles, sheet=SHEET, script=script, script_hash=script_hash, eval_split=eval_split)
    context |= dict(columns=history_columns(history), of_errors=OF_ERRORS)
    context |= dict(curves=draw_panels(plot_curves(history, eval_split)) if len(history) > 1 else [])
    context |= dict(figures=_read_figures(run_dir, OF_ERRORS if tiles else () if n_errors else OF_ERRORS[1:]))
    with atomic_write(run_dir / "report.html", "wb") as file:
        file.write(_render(get_template("report.html"), context, tiles))
    return run_dir / "report.html"


def get_template(name):
    """A template of this package; it escapes every value."""
    loader = PackageLoader("cifar_fastai.report", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "duration": _duration, "value": format_value}
    return environment.get_template(name)


def describe_metrics(metrics):
    """What metrics.json says, for people: {name: text}, without what was not measured."""
    texts, split = {}, metrics.get("eval_split") or "valid"  # of which the numbers are that are called valid_
    for name, value in metrics.items():
        if isinstance(value, (str, int, float)) and name != "eval_split":
            form = ",.0f" if name in ("parameters", "images_per_second") else ".2%" if name.endswith("accuracy") else ""
            text = _number(value, form) if form else format_value(value)
            label = LABELS.get(name) or name.replace("valid", split).replace("_", " ")
            texts[label] = _duration(value) if name == "seconds" else text
    return texts


def _render(template, context, tiles):
    """The page as bytes, with as many of `tiles` as LIMIT allows."""
    n = len(tiles) if tiles else 0
    lossless = n <= LOSSLESS_TILES
    while True:
        rows = tiles[:n].rows(context["classes"]) if n else []
        sheets = tiles[:n].sheets(lossless) if n else []
        page = template.render(context, rows=rows, sheets=sheets, lossless=lossless).encode()
        if len(page) < LIMIT or not n:
            return page
        n = n if lossless else int(0.98 * n * LIMIT / len(page))
        lossless = False


def _none_by_default(path):
    """A JSON file as a dict with None for keys that it lacks; metrics.json is missing after an interrupted run."""
    return defaultdict(lambda: None, {} if path.name == "metrics.json" and not path.exists() else read_json(path))


def _facts(config):
    """What config.json holds besides parameters, nested values one by one."""
    facts = {}
    for name, value in config.items():
        inner = value if isinstance(value, dict) else {"": value}
        prefix = "" if name == "versions" else name
        if name not in NO_FACTS:
            facts |= {f"{prefix} {key}".strip().replace("_", " "): item for key, item in inner.items()}
    return {name: value for name, value in facts.items() if value is not None}


def draw_panels(fig):
    """The panels of a Figure as (title, SVG) in the colours of the page, which differ in dark mode."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    charts = []
    for ax in fig.axes:
        for other in fig.axes:
            other.set_visible(other is ax)
        box = ax.get_tightbbox().transformed(fig.dpi_scale_trans.inverted()).padded(0.05)
        file, title = io.StringIO(), ax.get_title()
        with rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):  # the same ids each time, text as text
            fig.savefig(file, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
        svg = re.sub(r'<g id="[^"]*"', "<g", file.getvalue()[file.getvalue().index("<svg") :])
        for color, name in COLORS.items():
            svg = svg.replace(color.lower(), name)
        charts.append((title, Markup(svg)))
    return charts


def _read_figures(run_dir, omitted):
    """The run's figures but the `omitted` ones as (name, title, data URI), as far as there is room."""
    figures, room = [], FIGURES_LIMIT
    for name, title in FIGURES.items():
        path = run_dir / f"{name}.png"
        uri = data_uri(path.read_bytes(), "image/png") if path.is_file() and name not in omitted else ""
        if 0 < len(uri) <= room:
            room -= len(uri)
            figures.append((name, title, uri))
    return figures


def _shades(matrix):
    """Depth of colour of each cell, 0..1: errors on a scale to 5 at least, right answers by their share of the row."""
    right = np.eye(len(matrix), dtype=bool)
    errors = (matrix / max(5, matrix[~right].max(initial=0))) ** 0.7
    return np.where(right, matrix / np.maximum(matrix.sum(1, keepdims=True), 1), errors).round(2)


def _number(number, form=".4g"):
    return "–" if number is None else f"{number:{form}}".replace("-", "−").replace("%", " %")


def _duration(seconds):
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def format_value(value):
    """A setting as a person would type it."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, (list, dict)):
        items = value.items() if isinstance(value, dict) else [("", item) for item in value]
        return ", ".join(f"{key} {format_value(item)}".strip() for key, item in items)
    return f"{value:g}" if isinstance(value, float) else str(value)
