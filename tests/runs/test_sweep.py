"""Trials are chosen on a split of train, written as they end, and not run twice."""

import csv
import os
import signal
from pathlib import Path

import pytest
from tiny_recipe import strike
from tiny_runs import history

from cifar_fastai.errors import InputError
from cifar_fastai.runs import sweep as module
from cifar_fastai.runs.sweep import COLUMNS, read_settings, sweep
from cifar_fastai.training.history import HISTORY_COLUMNS, write_history
from cifar_fastai.training.signals import Stopped

EPOCH = dict.fromkeys(HISTORY_COLUMNS, 1)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """What `train` is asked for; it leaves the history of a run of nothing."""
    asked = []

    def train(recipe, given, finish):
        asked.append(given)
        folder = tmp_path / given["out"]
        folder.mkdir(parents=True)
        write_history(folder / "history.csv", [EPOCH | {"valid_accuracy": 0.25}, EPOCH | {"valid_accuracy": 0.5}])
        return folder

    monkeypatch.setattr(module, "train", train)
    monkeypatch.chdir(tmp_path)
    return asked


def test_settings_times_seeds_on_a_split_of_train(trials, tmp_path):
    (tmp_path / "list.txt").write_text("# what we try\n--lr 0.2 --cutout 12\n\n")
    rows = sweep("list.txt", "1,2", out="out.csv")
    assert [(trial["lr"], trial["seed"]) for trial in trials] == [("0.2", 1), ("0.2", 2)]
    assert all(trial["no_test"] and trial["valid_pct"] == 0.1 for trial in trials)
    with open("out.csv") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == COLUMNS and len(written) == len(rows) == 2
    assert [(row["valid_accuracy"], row["seconds"]) for row in written] == [("0.5", "2.0")] * 2, "the last epoch's"
    sweep("list.txt", "1,2,3", out="out.csv")
    assert len(trials) == 3, "those that were written are not run again"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no settings"),
        ("--lrr 1", "--lrr is not for"),
        ("--epochs x", "not flags of resnet18.py"),
        ("--seed 1", "--seed is not for"),
        ("--no-test", "--no-test is not for"),
    ],
)
def test_lines_that_are_no_settings(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "list.txt")


def test_nothing_runs_where_one_setting_is_wrong(trials, tmp_path):
    (tmp_path / "list.txt").write_text("--lr 0.2\n--lr -1\n")
    with pytest.raises(InputError, match="--lr"):
        sweep("list.txt")
    with pytest.raises(InputError, match="--seeds a"):
        sweep("list.txt", "a")
    assert not trials


def test_broken_off_and_gone_on_with(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"--data {tiny_folder} --epochs 3 --bs 8 --lr 0.05 --device cpu --compile no"
    (tmp_path / "list.txt").write_text(line + "\n")
    (whole,) = sweep("list.txt", "1", out="whole.csv", runs="whole")
    with monkeypatch.context() as patch:
        strike("validate", 2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
        with pytest.raises(Stopped) as stopped:
            sweep("list.txt", "1", out="parts.csv", runs="parts")
    assert stopped.value.resume == "the same command" and not Path("parts.csv").exists()
    (row,) = sweep("list.txt", "1", out="parts.csv", runs="parts")
    assert row["valid_accuracy"] == whole["valid_accuracy"] and history("parts/001") == history("whole/001")
    assert [path.name for path in Path("parts").iterdir()] == ["001"]
    assert {path.name for path in Path("parts/001").iterdir()} == {"config.json", "history.csv"}, "nothing is drawn"
    sweep("list.txt", "2", out="parts.csv", runs="parts")
    assert sorted(path.name for path in Path("parts").iterdir()) == ["001", "002"]
