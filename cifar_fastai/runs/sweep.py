"""Trials to choose by: settings times seeds, on a validation split, a row of a csv file for each."""

import hashlib
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from joblib import Parallel, delayed

from cifar_fastai.errors import InputError, check_extra, printable, reason
from cifar_fastai.files import atomic_write, check_regular, lock_folder
from cifar_fastai.recipes import resolve_recipe
from cifar_fastai.runs.train import train
from cifar_fastai.training.signals import Stopped, catch_signals

__all__ = ["COLUMNS", "sweep"]

COLUMNS = ["settings", "seed", "valid_accuracy", "seconds"]


def sweep(
    trials,
    seeds="1,2,3",
    valid_pct=0.1,
    out="sweep.csv",
    runs="runs/sweep",
    recipe="resnet18",
    workers=None,
    storage=None,
):
    """Train each of `trials`, a list of (label, overrides), with each of `seeds` ("1,2,3"); the rows of `out`.

    A trial that has a row in `out` is skipped, and one that was interrupted goes on: the same call continues a sweep,
    also with a longer list or in several processes. The folder `runs` keeps config.json and history.csv of each trial.
    `workers`: how many are trained side by side, by default one for each GPU. `storage`: the file of an Optuna journal,
    out of which machines take trials that share all these files. Raises InputError for settings, seeds or files that
    cannot be used, before the first trial starts.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's: its processes would train different trials as one run
        raise InputError("a sweep starts its own processes; set `workers`")
    if workers is not None and workers < 1:
        raise InputError("must be at least 1", workers=workers)
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
    out, n = Path(out), workers or max(1, torch.cuda.device_count())
    _read_rows(out)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")  # workers import torch anew
    try:
        with catch_signals():
            Parallel(n)(delayed(_work)(plan, recipe, out, Path(runs), storage, n, k) for k in range(n))
    except (Stopped, OSError) as error:
        error.resume = "the same command"
        raise
    return _read_rows(out).to_dict("records")


def _work(plan, recipe, out, runs, storage, n, k):
    """Train those of `plan` that nobody has trained or trains; worker `k` of `n` is silent and has a GPU of its own."""
    device = dict(device=f"cuda:{k % torch.cuda.device_count()}") if n > 1 and torch.cuda.is_available() else {}
    for label, seed, overrides in _in_turn(plan, storage, out):
        if _accuracy(out, label, seed) is None:
            with redirect_stdout(sys.stdout if n == 1 else None):
                _train_trial(label, seed, overrides, recipe, out, runs, device)


def _in_turn(plan, storage, out):
    """The trials of `plan`; with `storage` first those that Optuna hands out to this process alone."""
    if storage:
        check_extra("sweep", "optuna")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
        study = optuna.create_study(study_name="sweep", storage=journal, direction="maximize", load_if_exists=True)
        while (trial := study.ask()).number < len(plan):
            trial.set_user_attr("trial", plan[trial.number][:2])
            yield plan[trial.number]
            accuracy = _accuracy(out, *plan[trial.number][:2])  # None: another process trains it
            study.tell(trial, accuracy, optuna.trial.TrialState.FAIL if accuracy is None else None)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    yield from plan  # those that were interrupted


def _accuracy(out, label, seed):
    """The validation accuracy that a trial has in `out`, or None."""
    rows = _read_rows(out)
    values = rows["valid_accuracy"][(rows["settings"] == label) & (rows["seed"] == seed)]
    return None if values.empty else float(values.iloc[0])


def _train_trial(label, seed, overrides, recipe, out, runs, device):
    """Train a trial in a folder named by its settings, and write its row, unless another process trains it."""
    key = json.dumps([recipe, overrides], sort_keys=True, default=str)
    folder = runs / hashlib.sha256(key.encode()).hexdigest()[:12]

    def add_row(run):  # results, which `train` leaves to us, take longer than a short training
        epochs = run.history.rows
        with FileLock(out.with_name(f".{out.name}.lock")):  # several sweeps may write to one file
            rows, seconds = _read_rows(out), round(sum(epoch["seconds"] for epoch in epochs), 1)
            rows.loc[len(rows)] = [label, seed, epochs[-1]["valid_accuracy"], seconds]
            with atomic_write(out) as file:
                rows.to_csv(file, index=False, lineterminator="\n")
        print(f"{label}, seed {seed}: {epochs[-1]['valid_accuracy']:.2%}", file=sys.__stdout__, flush=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be created ({reason(error)})", runs=str(runs)) from None
    with lock_folder(folder, ".sweep.lock") as is_free:  # of sweeps; the run itself locks its folder after a while
        if is_free:
            with lock_folder(folder) as is_free:
                pass
        if not is_free:
            print(f"{folder}: another process is training this trial")
        elif _accuracy(out, label, seed) is None:
            is_interrupted = (folder / "checkpoint.pth").exists()
            arguments = dict(resume=folder) if is_interrupted else overrides | dict(out=str(folder))
            train(recipe, finish=add_row, **device | arguments)


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
