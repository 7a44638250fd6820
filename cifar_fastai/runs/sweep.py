"""Trials to choose by: settings times seeds, on a validation split, a row of a csv file for each."""

import hashlib
import json
from pathlib import Path

import pandas as pd
from filelock import FileLock

from cifar_fastai.errors import InputError, printable, reason
from cifar_fastai.files import atomic_write, check_regular, lock_folder
from cifar_fastai.recipes import resolve_recipe
from cifar_fastai.runs.train import train
from cifar_fastai.training.recorder import read_history
from cifar_fastai.training.signals import Stopped

__all__ = ["COLUMNS", "sweep"]

COLUMNS = ["settings", "seed", "valid_accuracy", "seconds"]


def sweep(trials, seeds="1,2,3", valid_pct=0.1, out="sweep.csv", runs="runs/sweep", recipe="resnet18"):
    """Train each of `trials`, a list of (label, overrides), with each of `seeds` ("1,2,3"); the rows of `out`.

    A trial that has a row in `out` is skipped, and one that was interrupted goes on: the same call continues a sweep,
    also with a longer list or in several processes. The folder `runs` keeps config.json and history.csv of each trial.
    Raises InputError for settings, seeds or files that cannot be used, before the first trial starts.
    """
    try:
        seeds = [int(seed) for seed in str(seeds).split(",")]
    except ValueError:
        raise InputError("must be whole numbers, separated by commas", seeds=seeds) from None
    plan = []
    for label, overrides in trials:
        for name in overrides.keys() & {"seed", "valid_pct", "no_test", "out"}:
            raise InputError(f"{label}: `{name}` is set by the sweep itself")
        for seed in seeds:
            plan.append((label, seed, overrides | dict(seed=seed, valid_pct=valid_pct, no_test=True)))
            try:
                resolve_recipe(recipe, plan[-1][-1])
            except InputError as error:
                raise InputError(f"{error.text} (in the line {label})", **error.arguments) from None
    out = Path(out)
    _read_rows(out)
    for label, seed, overrides in plan:
        rows = _read_rows(out)
        if ((rows["settings"] == label) & (rows["seed"] == seed)).any():
            continue
        folder = _train_trial(recipe, overrides, Path(runs))
        if folder is None:
            continue
        epochs = read_history(folder / "history.csv")
        with FileLock(out.with_name(f".{out.name}.lock")):  # several sweeps may write to one file
            rows = _read_rows(out)
            if ((rows["settings"] == label) & (rows["seed"] == seed)).any():
                continue  # another process has trained it meanwhile
            seconds = round(sum(epoch["seconds"] for epoch in epochs), 1)
            rows.loc[len(rows)] = [label, seed, epochs[-1]["valid_accuracy"], seconds]
            with atomic_write(out) as file:
                rows.to_csv(file, index=False, lineterminator="\n")
    return _read_rows(out).to_dict("records")


def _train_trial(recipe, overrides, runs):
    """The folder of the trained trial, named by its settings; None where another process trains it."""
    key = json.dumps([recipe, overrides], sort_keys=True, default=str)
    folder = runs / hashlib.sha256(key.encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be created ({reason(error)})", runs=str(runs)) from None
    with lock_folder(folder, ".sweep.lock") as is_first:  # of sweeps; the run itself locks its folder after a while
        with lock_folder(folder) as is_free:
            pass
        if not (is_first and is_free):
            print(f"{folder}: another process is training this trial")
            return None
        is_interrupted = (folder / "checkpoint.pth").exists()
        arguments = dict(resume=folder) if is_interrupted else overrides | dict(out=str(folder))
        try:
            return train(recipe, finish=lambda run: None, **arguments)  # results take longer than a short training
        except (Stopped, OSError) as error:
            error.resume = "the same command"
            raise


def _read_rows(out):
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise InputError("must be a csv file in a folder that exists", out=str(out))
    if not out.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        rows = pd.read_csv(check_regular(out))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as a sweep ({reason(error)})", out=str(out)) from None
    if list(rows.columns) != COLUMNS:
        columns = printable(", ".join(map(str, rows.columns)))
        raise InputError(f"not the csv file of a sweep; its columns are {columns}", out=str(out))
    return rows
