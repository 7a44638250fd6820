"""The runs that README quotes, kept in the repository, and the table that is made from them."""

import json
import shutil
from collections import defaultdict
from inspect import signature
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import NamedTuple

from cifar_fastai.config import BASE, command_line, parameters
from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write, write_json
from cifar_fastai.presets import PRESETS
from cifar_fastai.recipe_pages import recipe_page
from cifar_fastai.runs.folder import suit_batches

__all__ = ["Kept", "keep_result", "load_results", "results_table", "to_repeat", "update_readme"]

BEGIN, END = "<!-- results: made by recipes/results.py -->", "<!-- end of results -->"
_KEPT = ("history.csv", "metrics.json", "predictions.csv", "curves.png")
_PATHS = ("out", "data", "resume")  # parameters that may name a place on somebody's disk
_OF_THE_RUN = (*_PATHS, "seed", "device", "precision", "flip")  # what the machine and the images decide


class Kept(NamedTuple):
    """A run that is kept: what its config.json and metrics.json hold, and where."""

    config: dict
    metrics: dict
    folder: Path


def keep_result(run, folder):
    """Copy what is needed to check a finished run into `folder`/<run's name>, without any path of the machine.

    Raises InputError where `run` is not finished.
    """
    run, target = Path(run), Path(folder) / Path(run).resolve().name
    missing = [name for name in ("config.json", *_KEPT) if not (run / name).exists()]
    if missing:
        raise InputError(f"{run}: no {', '.join(missing)} in it; only a finished run can be kept")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    if not config.get("recipe"):
        raise InputError(f"{run}: was made in a notebook; only a run that a command repeats can be kept")
    target.mkdir(parents=True, exist_ok=True)
    for name in _PATHS:
        for values in (config["parameters"], config["given"]):
            if values.get(name) is not None:
                values[name] = _public(name, values[name])
    config["data_source"] = _public("data", config["data_source"])
    write_json(target / "config.json", config)
    for name in _KEPT:
        shutil.copyfile(run / name, target / name)
    return target


def _public(name, value):
    """`value` where it is a word that anybody may give, else the file's name alone."""
    return value if name == "data" and "/" not in str(value) and "\\" not in str(value) else Path(str(value)).name


def load_results(folder):
    """The runs kept in `folder`, by name, each a `Kept`."""
    runs = sorted(path.parent for path in Path(folder).glob("*/metrics.json"))
    names = "config.json", "metrics.json"
    return [Kept(*(json.loads((run / name).read_text(encoding="utf-8")) for name in names), run) for run in runs]


def results_table(results):
    """Markdown: a row for each setting, with mean and standard deviation over its seeds, and its command.

    By data set, the most accurate first. `results`: a list of `Kept`.
    """
    lines = [
        "| data | network | epochs | seeds | test accuracy | with flip TTA | and shifts | training | hardware |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    commands = []
    for (command, dataset, hardware, precision), runs in _rows(results):
        columns = [
            _percent([run.metrics[name] for run in runs])
            for name in ("test_accuracy", "tta_accuracy", "tta_shift_accuracy")
        ]
        first, minutes = runs[0].metrics, mean(run.metrics["seconds"] for run in runs) / 60
        facts = [
            dataset,
            first["model"],
            first["epochs"],
            len(runs),
            *columns,
            f"{minutes:.1f} min",
            f"{hardware}, {precision}",
        ]
        lines.append("| " + " | ".join(str(fact) for fact in facts) + " |")
        commands.append(f"`{command} --seed {' | '.join(str(run.metrics['seed']) for run in runs)}`")
    return "\n".join([*lines, "", "The commands, row by row: " + "; ".join(commands) + "."])


def to_repeat(config):
    """`config`, a kept run's, with what repeats it today as `given`: what was given then, and what the recipe's
    defaults were that are others now; in the order of `parameters`, so that its repetition says the same.

    InputError where there is no such recipe any more.
    """
    given, then = config["given"], BASE | config["parameters"]  # a parameter that was not there yet changed nothing
    preset = PRESETS[given["preset"]].settings if given.get("preset") in PRESETS else {}
    now = SimpleNamespace(**recipe_page(config["recipe"])["RECIPE"].settings | preset | given, given=given)
    suit_batches(now, config["train_images"])
    others = then.keys() - given.keys() - set(_OF_THE_RUN) - ({"lr"} if "lr_find" in config else set())
    changed = {name for name in others if getattr(now, name, None) != then[name]}
    if "bs" in changed and "lr" in others:  # a default rate would no longer be lowered with it
        changed.add("lr")
    named, order = {name: then[name] for name in changed} | given, [*signature(parameters).parameters, *given]
    return config | {"given": {name: named[name] for name in order if name in named}}


def _rows(results):
    """[((command, dataset, hardware, precision), runs by seed)], the most accurate first in each data set."""
    rows = defaultdict(list)
    for run in sorted(results, key=lambda run: run.metrics["seed"]):
        about = (run.metrics[name] for name in ("dataset", "hardware", "precision"))
        rows[command_line(to_repeat(run.config), without=("seed",)), *about].append(run)

    def rank(row):
        (command, dataset, *machine), runs = row
        return dataset, -mean(run.metrics["test_accuracy"] or 0 for run in runs), command, machine

    return sorted(rows.items(), key=rank)


def _curves(results, root):
    """The curves of the first row's first run, as lines of Markdown for a file in the folder `root`; no run, none."""
    if not results:
        return ""
    _, (run, *_) = _rows(results)[0]
    told, path = run.metrics, (run.folder / "curves.png").resolve().relative_to(Path(root).resolve())
    return (
        f"\n\n![Loss and accuracy by epoch: {told['model']}, {told['epochs']} epochs of {told['dataset']}, "
        f"seed {told['seed']}]({path.as_posix()})"
    )


def _percent(values):
    if None in values:
        return "-"
    spread = f" ± {stdev(values):.2%}" if len(values) > 1 else ""
    return f"{mean(values):.2%}{spread}"


def update_readme(readme, folder, check=False):
    """Write the table of the results in `folder`, and the first one's curves, into `readme`; whether it changed.

    They stand between its two marks. With `check` nothing is written. Raises InputError where the marks are missing.
    """
    text = Path(readme).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{readme}: the lines {BEGIN} and {END} must stand in it once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    results = load_results(folder)
    made = results_table(results) + _curves(results, Path(readme).parent)
    new = f"{before}{BEGIN}\n{made}\n{END}{after}"
    if new != text and not check:
        with atomic_write(readme) as file:
            file.write(new)
    return new != text
