"""Trials to choose by: settings times seeds, on a validation split, a line of csv for each."""

import csv
import shlex
from pathlib import Path

from fastcore.script import anno_parser

from cifar_fastai.config import resolve
from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write
from cifar_fastai.recipe_pages import recipe_page
from cifar_fastai.runs.folder import read_config
from cifar_fastai.runs.train import train
from cifar_fastai.training.history import read_history
from cifar_fastai.training.signals import Stopped

__all__ = ["COLUMNS", "read_settings", "sweep"]

COLUMNS = ("settings", "seed", "valid_accuracy", "seconds")
_FIXED = ("seed", "valid_pct", "no_test", "out", "resume")  # the sweep's own to set


def sweep(settings, seeds="1,2,3", valid_pct=0.1, out="sweep.csv", runs="runs/sweep"):
    """Train each line of the file `settings` with each of `seeds` (text, "1,2,3") and write `out`; its rows.

    A trial that stands in `out` is not run again, and one that was broken off goes on from its last epoch: the same
    call goes on with a sweep, also with a longer list. Of a trial, `runs` keeps config.json and history.csv alone.
    InputError for settings or seeds that no run could take, before the first one starts.
    """
    recipe, lines = read_settings(settings)
    try:
        seeds = [int(seed) for seed in str(seeds).split(",")]
    except ValueError:
        raise InputError(f"--seeds {seeds}: give whole numbers, separated by commas") from None
    trials = []
    for line, given in lines:
        for seed in seeds:
            trial = given | dict(seed=seed, valid_pct=valid_pct, no_test=True)
            resolve(recipe, trial)
            trials.append((line, seed, trial))
    out, rows = Path(out), []
    if out.exists():
        with open(out, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    for line, seed, trial in trials:
        if any(row["settings"] == line and row["seed"] == str(seed) for row in rows):
            continue
        folder = _begun(recipe, trial, runs)
        given = trial | {"out": _new(runs)} if folder is None else {"resume": str(folder)}
        try:
            folder = train(recipe, given, finish=_nothing)
        except (Stopped, OSError) as error:
            error.resume = "the same command"
            raise
        epochs = read_history(folder / "history.csv")
        seconds = round(sum(epoch["seconds"] for epoch in epochs), 1)
        rows.append(dict(zip(COLUMNS, (line, str(seed), epochs[-1]["valid_accuracy"], seconds), strict=True)))
        with atomic_write(out) as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return rows


def _begun(recipe, trial, runs):
    """The folder in `runs` of this trial where it was broken off after an epoch, or None."""
    cfg = resolve(recipe, trial)
    wanted = recipe.name, {name: getattr(cfg, name) for name in trial}
    for path in sorted(Path(runs).glob("*/checkpoint.pth")):
        config = read_config(path.parent)
        given = {name: value for name, value in config["given"].items() if name != "out"}
        if (config["recipe"], given) == wanted:
            return path.parent
    return None


def _new(runs):
    """The name of a folder in `runs` that is not there yet: 001, 002, ..."""
    number = 1
    while (Path(runs) / f"{number:03}").exists():
        number += 1
    return str(Path(runs) / f"{number:03}")


def _nothing(run):
    """What is done with a trained trial: TTA, heatmaps and pictures take longer than a short trial's training."""


def read_settings(path, recipe="resnet18"):
    """(recipe, [(line, given)]) of a file with flags of recipes/<recipe>.py on each line. InputError for others."""
    found = recipe_page(recipe)
    parser = anno_parser(found["main"])
    parser.exit_on_error = False
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    parsed = []
    for line in lines:
        try:
            given, unknown = parser.parse_known_args(shlex.split(line))
        except (Exception, SystemExit) as error:
            raise InputError(f"{path}: {line}: not flags of {recipe}.py ({error})") from None
        given = {name: value for name, value in vars(given).items() if name not in ("pdb", "xtra")}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        wrong = unknown or [f"--{name.replace('_', '-')}" for name in given if name in _FIXED]
        if wrong:
            raise InputError(f"{path}: {line}: {wrong[0]} is not for a line of a sweep")
        parsed.append((line, given))
    if not parsed:
        raise InputError(f"{path}: no settings in it; write flags of {recipe}.py on each line")
    return found["RECIPE"], parsed
