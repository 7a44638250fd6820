"""Trials are chosen on a split of train, written as they end, and not run twice."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import joblib
import optuna
import pandas as pd
import pytest
from tiny_recipe import RECIPE, strike
from tiny_runs import history

from cifar_fastai import errors
from cifar_fastai.cli import read_settings
from cifar_fastai.errors import InputError
from cifar_fastai.runs import sweep as module
from cifar_fastai.runs.sweep import COLUMNS, sweep
from cifar_fastai.training.recorder import HISTORY_COLUMNS
from cifar_fastai.training.signals import Stopped

SWEEP = RECIPE.with_name("sweep.py")
EPOCH = dict.fromkeys(HISTORY_COLUMNS, 1)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """What `train` is called with; it has the history of a run of nothing."""
    calls = []

    def train(recipe, finish, out, **overrides):
        calls.append(overrides)
        rows = [EPOCH | {"valid_accuracy": 0.25}, EPOCH | {"valid_accuracy": 0.5}]
        finish(SimpleNamespace(history=SimpleNamespace(rows=rows)))

    monkeypatch.setattr(module, "train", train)
    monkeypatch.chdir(tmp_path)
    return calls


def test_settings_times_seeds_on_a_split_of_train(trials, tmp_path):
    (tmp_path / "list.txt").write_text("# what we try\n--lr 0.2 --cutout 12\n\n")
    rows = sweep(read_settings("list.txt"), "1,2", out="out.csv")
    assert [(trial["lr"], trial["seed"]) for trial in trials] == [("0.2", 1), ("0.2", 2)]
    assert all(trial["no_test"] and trial["valid_pct"] == 0.1 for trial in trials)
    written = pd.read_csv("out.csv")
    assert list(written) == COLUMNS and written.to_dict("records") == rows
    assert [(row["valid_accuracy"], row["seconds"]) for row in rows] == [(0.5, 2.0)] * 2, "the last epoch's"
    sweep(read_settings("list.txt"), "1,2,3", out="out.csv")
    assert len(trials) == 3, "those that were written are not run again"


def test_two_sweeps_write_to_one_file(trials):
    labels = [f"trial {n}" for n in range(3)]
    trial = [[(label, dict(cutout=n))] for n, label in enumerate(labels)]
    sweeps = [threading.Thread(target=sweep, args=(one, "1,2,3"), kwargs=dict(out="out.csv")) for one in trial]
    for thread in sweeps:
        thread.start()
    for thread in sweeps:
        thread.join()
    rows = pd.read_csv("out.csv")
    assert sorted(zip(rows["settings"], rows["seed"], strict=True)) == [(k, seed) for k in labels for seed in (1, 2, 3)]


def test_workers_train_each_trial_once(trials):
    with joblib.parallel_config(backend="threading"):  # processes would not have the trials of this test
        rows = sweep([(f"trial {n}", dict(cutout=n)) for n in range(3)], "1,2", out="out.csv", workers=2)
    assert len(rows) == len(trials) == 6


def test_optuna_hands_out_each_trial_once_and_the_rest_is_trained_later(trials, monkeypatch):
    plan, fails = [(f"trial {n}", dict(cutout=n)) for n in range(3)], [2]
    train = module.train

    def fail_once(*args, **kwargs):
        if kwargs["cutout"] in fails:
            fails.clear()
            raise Stopped(signal.SIGTERM)
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "train", fail_once)
    with pytest.raises(Stopped):
        sweep(plan, "1", out="out.csv", storage="journal")
    assert len(trials) == 2
    assert len(sweep(plan, "1", out="out.csv", storage="journal")) == len(trials) == 3
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("journal"))
    study = optuna.load_study(study_name="sweep", storage=storage)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert [(trial.user_attrs["trial"], trial.value) for trial in done] == [
        (["trial 0", 1], 0.5),
        (["trial 1", 1], 0.5),
    ]


def test_a_missing_optuna_is_named(trials, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'optuna is not installed: pip install "cifar_fastai\[sweep\]"'):
        sweep([("one", {})], "1", out="out.csv", storage="journal")


def test_torchrun_starts_no_sweep(trials, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a sweep starts its own processes; set `workers`"):
        sweep([("one", {})], "1", out="out.csv")
    assert not trials


@pytest.mark.slow
def test_workers_are_processes(tmp_path):
    (tmp_path / "list.txt").write_text("--data digits --width 16 --subset 100 --bs 20 --epochs 1 --device cpu\n")
    command = [sys.executable, str(SWEEP), "list.txt", "--seeds", "1,2", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 2, done.stdout
    assert sorted(pd.read_csv(tmp_path / "sweep.csv")["seed"]) == [1, 2]


def test_a_trial_that_another_sweep_begins_is_left_to_it(trials, monkeypatch, capsys):
    """Its run has no folder yet while it reads its images."""
    train, trial = module.train, [("one", {})]

    def begin(*args, **kwargs):
        assert not trials and sweep(trial, "1", out="out.csv") == []
        return train(*args, **kwargs)

    monkeypatch.setattr(module, "train", begin)
    assert len(sweep(trial, "1", out="out.csv")) == len(trials) == 1
    assert "another process is training this trial" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no settings in it"),
        ("--lrr 1", "list.txt: --lrr 1: --lrr is not a flag of a recipe"),
        ("--epochs x", "not flags of a recipe"),
        ('--data "x', "No closing quotation"),
    ],
)
def test_lines_that_are_no_settings(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "trial, arguments, message",
    [
        (dict(lr=-1.0), {}, "lr=-1.0"),
        (dict(seed=1), {}, "`seed` is set by the sweep"),
        (dict(no_test=True), {}, "`no_test` is set by the sweep"),
        ({}, dict(workers=-3), "workers=-3: must be at least 1"),
        ({}, dict(seeds="a"), "seeds='a': must be whole numbers"),
        ({}, dict(out="nowhere/out.csv"), "out='nowhere/out.csv': must be a csv file in a folder that exists"),
        ({}, dict(out="."), "must be a csv file"),
        ({}, dict(runs="strange.csv"), "runs='strange.csv': cannot be created"),
        ({}, dict(out="strange.csv"), "not the csv file of a sweep; its columns are a, b"),
    ],
)
def test_nothing_runs_where_anything_is_wrong(trials, tmp_path, trial, arguments, message):
    Path("strange.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=message):
        sweep([("good", dict(lr=0.2)), ("bad", trial)], **arguments)
    assert not trials


def test_an_interrupted_trial_goes_on(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trials = [("one", dict(data=str(tiny_folder), epochs=3, bs=8, lr=0.05))]
    (whole,) = sweep(trials, "1", out="whole.csv", runs="whole")
    with monkeypatch.context() as patch:
        strike("validate", 2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
        with pytest.raises(Stopped) as stopped:
            sweep(trials, "1", out="parts.csv", runs="parts")
    assert stopped.value.resume == "the same command" and not Path("parts.csv").exists()
    (row,) = sweep(trials, "1", out="parts.csv", runs="parts")
    (folder,), (other,) = Path("parts").iterdir(), Path("whole").iterdir()
    assert row["valid_accuracy"] == whole["valid_accuracy"] and history(folder) == history(other)
    assert {path.name for path in folder.iterdir()} == {"config.json", "history.csv"}, "nothing is drawn"
    sweep(trials, "2", out="parts.csv", runs="parts")
    assert len(list(Path("parts").iterdir())) == 2
