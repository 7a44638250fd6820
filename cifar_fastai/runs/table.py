"""The runs that README quotes, kept in the repository, and the tables that are made from them."""

import os
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from cifar_fastai.data.images import CIFAR10, COPIES
from cifar_fastai.errors import InputError, reason
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.files import atomic_write, read_json, write_json
from cifar_fastai.recipes import resolve_recipe
from cifar_fastai.runs.folder import public_config
from cifar_fastai.runs.run import suit_data
from cifar_fastai.settings import OPTIONS, PLACES, Settings
from cifar_fastai.training.recorder import read_history

__all__ = ["Result", "keep_result", "load_results", "overrides_today", "results_table", "update_table"]

BEGIN, END = "<!-- results: made by recipes/results.py -->", "<!-- end of results -->"
_FILES = ("history.csv", "metrics.json", "predictions.csv", "curves.png")
_NOT_COMPARED = {*PLACES, "seed", "precision", "flip"}  # a row has several seeds; device and data set the others


class Result(NamedTuple):
    """A kept run: the content of its config.json and metrics.json, and its folder."""

    config: dict
    metrics: dict
    folder: Path


def keep_result(run, folder):
    """Copy the files that document a finished run into `folder`/<run's name>, without any path of the machine.

    Raises InputError where `run` is not finished, or damaged.
    """
    run, target = Path(run), Path(folder) / Path(os.path.realpath(run)).name
    paths = [run / name for name in ("config.json", *_FILES)]
    missing = [path.name for path in paths if path.is_symlink() or not path.is_file()]
    if missing:
        raise InputError(f"{run}: no {', '.join(missing)} in it; only a finished run can be kept")
    config = public_config(run)
    if not config.get("recipe"):
        raise InputError(f"{run}: was made in a notebook; only a run that a command repeats can be kept")
    try:
        metrics = read_json(run / "metrics.json")
        if [type(metrics[name]) for name in ("dataset", "model", "seed")] != [str, str, int]:
            raise TypeError("metrics.json holds no dataset, model or seed")
        results_table([Result(config, metrics, run)], lambda *_, **__: "")
        read_history(run / "history.csv")
        Predictions.from_csv(run / "predictions.csv", config["classes"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run}: its files are damaged ({reason(error)})") from None
    if target.is_symlink():
        raise InputError(f"{target}: is a link; remove it")
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", config)
    for name in _FILES:
        with atomic_write(target / name, "wb") as file:  # which replaces a link there, and does not follow it
            file.write((run / name).read_bytes())
    return target


def load_results(folder):
    """The runs kept in `folder`, by name: a list of `Result`."""
    runs = sorted(path.parent for path in Path(folder).glob("*/metrics.json"))
    return [Result(read_json(run / "config.json"), read_json(run / "metrics.json"), run) for run in runs]


def results_table(results, command_line, summary=False):
    """Markdown: a row for each command and commit, with mean and standard deviation over its seeds.

    The most accurate first in each data set. `summary`: fewer columns, and for each data set and network the row whose
    settings are closest to those of today's recipe, with the most seeds; copies of CIFAR-10 only where there is no row
    of CIFAR-10 itself. `results`: `Result`s; `command_line(config, without)` gives a command.
    """
    table = []
    for (dataset, command, commit), runs in _rows(results, command_line, summary):
        metrics = [run.metrics for run in runs]
        names = "test_accuracy", "tta_accuracy", "tta_shift_accuracy"
        accuracy, flip, shift = (_percent([m[name] for m in metrics]) for name in names)
        minutes = f"{mean(m['seconds'] for m in metrics) / 60:.1f} min"
        hardware = "; ".join(dict.fromkeys(f"{m['hardware']}, {m['precision']}" for m in metrics))
        row = {"data": dataset, "network": metrics[0]["model"], "epochs": metrics[0]["epochs"]}
        row["seeds"] = ", ".join(str(m["seed"]) for m in metrics)
        row |= {"test accuracy": accuracy, "with flip TTA": flip} | ({} if summary else {"and shifts": shift})
        row |= {"training": minutes, "hardware": hardware} | ({} if summary else {"commit": commit})
        table.append(row | {"command": f"`{command} --seed {metrics[0]['seed']}`"})
    if not table:
        return ""
    head, *lines = ("| " + " | ".join(map(str, cells)) + " |" for cells in (table[0], *(row.values() for row in table)))
    return "\n".join([head, "|---" * len(table[0]) + "|", *lines])


def overrides_today(config):
    """The overrides with which the recipe of today has the parameters of a kept run, in the order of `Settings`.

    These are the overrides of that run, and the defaults that have changed since; a parameter that is newer than the
    run was neutral. Raises InputError where the recipe is gone.
    """
    overrides, saved = config["given"], Settings.from_dict(config["parameters"]).to_dict()
    settings, _ = resolve_recipe(config["recipe"], overrides)
    bs, lr = suit_data(settings, overrides, config["train_images"])
    current = settings.to_dict() | dict(bs=bs, lr=lr)
    names = OPTIONS.keys() - overrides.keys() - _NOT_COMPARED - ({"lr"} if "lr_find" in config else set())
    changes = {name for name in names if current[name] != saved[name]}
    if "bs" in changes and "lr" in names:  # with `bs` set, a default rate is not lowered
        changes.add("lr")
    values = {name: saved[name] for name in changes} | overrides
    return {name: values[name] for name in OPTIONS if name in values}


def _rows(results, command_line, summary=False):
    """[((dataset, command, commit), runs by seed)], the most accurate first in each data set."""
    rows = defaultdict(list)
    for run in sorted(results, key=lambda run: run.metrics["seed"]):
        found = ("data",) if run.metrics["dataset"] == CIFAR10 else ()  # it is downloaded, wherever it was for this run
        command = command_line(run.config | {"given": overrides_today(run.config)}, without=("seed", *found))
        commit = run.config.get("versions", {}).get("git_commit") or "-"
        rows[run.metrics["dataset"], command, commit].append(run)

    def rank(row):
        (dataset, *names), runs = row
        return dataset, -mean(run.metrics["test_accuracy"] or 0 for run in runs), names

    rows = sorted(rows.items(), key=rank)
    if not summary:
        return rows
    left_out = COPIES if any(dataset == CIFAR10 for (dataset, *_), _ in rows) else ()
    closest = {}  # by data set and network; never chosen by accuracy on the test split
    for key, runs in sorted(rows, key=lambda row: (len(row[0][1].split()), -len(row[1]))):
        closest.setdefault((key[0], runs[0].metrics["model"]), key)
    return [(key, runs) for key, runs in rows if key in closest.values() and key[0] not in left_out]


def _percent(values):
    if None in values:
        return "-"
    spread = f" ± {stdev(values):.2%}" if len(values) > 1 else ""
    return f"{mean(values):.2%}{spread}"


def update_table(page, folder, command_line, check=False, summary=False):
    """Write the table of the results in `folder` between the two marks in `page`, a Markdown file.

    `summary`: see `results_table`. Returns whether the page changed; with `check` nothing is written. Raises InputError
    where the marks are missing.
    """
    text, results = Path(page).read_text(encoding="utf-8"), load_results(folder)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page}: the lines {BEGIN} and {END} must stand in it once")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = results_table(results, command_line, summary)
    new = f"{before}{BEGIN}\n{table}\n{END}{after}"
    if new != text and not check:
        with atomic_write(page) as file:
            file.write(new)
    return new != text
