"""Finished runs beside each other: a table, and compare.html."""

import os
from collections import namedtuple
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pandas as pd

from cifar_fastai.errors import InputError, printable, reason
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.files import atomic_write, read_json
from cifar_fastai.plots.charts import LINES, plot_together
from cifar_fastai.report.page import COLORS, describe_metrics, draw_panels, format_value, get_template
from cifar_fastai.report.tiles import SHEET, image_uri
from cifar_fastai.runs.folder import describe_run, picture_path, read_config
from cifar_fastai.runs.run import load_reported
from cifar_fastai.settings import OPTIONS, PLACES
from cifar_fastai.training.recorder import read_history

MAX_RUNS = 2 * len(LINES)  # colours times line styles
MAX_GROUPS, MAX_IMAGES = 8, 24  # of images about which the runs disagree; images of a group
Entry = namedtuple("Entry", "letter name config numbers history predictions images split")  # a finished run


def compare_runs(runs, out="compare.html", data=None):
    """Print a table of finished runs, write the page `out`, and return its path.

    `runs`: folders, from 2 to 10; `data`: where their images are, if they have moved. Runs with other images or another
    split are compared as far as that makes sense, and one line says so. Raises InputError for what is no finished run.
    """
    folders, out = list(dict.fromkeys(os.path.realpath(run) for run in runs)), picture_path(out, ".html")
    if not 2 <= len(folders) <= MAX_RUNS:
        raise InputError(f"{len(folders)} different runs; name from 2 to {MAX_RUNS}")
    entries = [_read(letter, Path(folder)) for letter, folder in zip(ascii_uppercase, folders, strict=False)]
    note, numbers = _difference(entries), pd.DataFrame({each.letter: each.numbers for each in entries}).fillna("–")
    settings = pd.DataFrame({each.letter: _settings(each.config["parameters"]) for each in entries})
    settings = settings[(settings.nunique(axis=1) > 1) & ~settings.index.isin(numbers.index)]
    groups = [] if note else _disagreements(entries, data)
    if groups and not groups[0]["rows"]:
        note = "The images are not shown: the data set of these runs is not on this machine."
    context = dict(entries=entries, numbers=numbers, settings=settings, note=note, groups=groups, sheet=SHEET)
    classes = pd.DataFrame({each.letter: each.predictions.class_accuracy for each in entries}, dtype=float).dropna()
    spread = (classes.max(axis=1) - classes.min(axis=1)).sort_values(ascending=False, kind="stable")
    context |= dict(classes=classes.loc[spread.index], colors=[COLORS.get(color, color) for color in LINES])
    context["charts"] = draw_panels(plot_together({each.letter: each.history for each in entries}))
    with atomic_write(out) as file:
        file.write(get_template("compare.html").render(context))
    names = [f"{each.letter}: {printable(each.name)}" for each in entries]
    table = pd.concat([numbers, settings]).map(printable).rename(index=printable).to_string()
    print(*names, table, *[printable(note)] * bool(note), f"page: {printable(out)}", sep="\n")
    return out


def _read(letter, folder):
    config, _ = read_config(folder), describe_run(folder)  # which raises where it is not finished
    try:
        predictions = Predictions.from_csv(folder / "predictions.csv", tuple(config["classes"]))
        numbers, history = describe_metrics(read_json(folder / "metrics.json")), read_history(folder / "history.csv")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its files are damaged ({reason(error)})") from None
    images = config.get("data_name"), config.get("data_fingerprint")
    cut = [config["parameters"].get(name) for name in ("no_test", "valid_pct", "split_seed", "subset")]
    split = ("validation" if cut[0] else "test", cut[0] and str(cut), predictions.targets.tobytes())
    return Entry(letter, folder.name, config, numbers, history, predictions, images, split)


def _settings(parameters):
    """{setting: text}; one that is newer than the run was neutral in it."""
    values = {name: parameters.get(name, option.default) for name, option in OPTIONS.items() if name not in PLACES}
    return {name: format_value(value) for name, value in values.items()}


def _difference(entries):
    """Why neither accuracies nor single images compare, in a sentence, or None."""
    for name in "images", "split":
        values = [getattr(entry, name) for entry in entries]
        if len(set(values)) > 1:
            texts = ", ".join(f"{entry.letter}: {value[0]}" for entry, value in zip(entries, values, strict=True))
            texts = f"all called {values[0][0]}" if len({value[0] for value in values}) == 1 else texts
            return f"The runs differ in their {name} ({texts}), so neither accuracies nor single images compare."


def _disagreements(entries, data):
    """[Groups of images that some runs get right and others wrong], the largest first; of each, the surest errors."""
    predictions, letters = [entry.predictions for entry in entries], np.array([entry.letter for entry in entries])
    right = np.stack([each.predicted == each.targets for each in predictions])  # (runs, N)
    doubt = (np.stack([each.confidence for each in predictions]) * ~right).max(0)  # (N,)
    images = (load_reported(entry.config, entry.predictions, data) for entry in entries)
    images, groups = next((array for array in images if array is not None), None), []
    kinds, numbers, counts = np.unique(right, axis=1, return_inverse=True, return_counts=True)
    for k in np.argsort(-counts, kind="stable"):
        kind, positions = kinds[:, k], np.flatnonzero(numbers.ravel() == k)
        if 0 < kind.sum() < len(entries) and len(groups) < MAX_GROUPS:
            worst = positions[np.argsort(-doubt[positions], kind="stable")][: 0 if images is None else MAX_IMAGES]
            group = dict(right=", ".join(letters[kind]), wrong=", ".join(letters[~kind]), n=len(positions))
            groups.append(group | dict(rows=[(i, image_uri(images[i])) for i in worst]))
    return groups
