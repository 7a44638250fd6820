"""Trials are chosen on a split of train, written as they end, and not run twice."""

import csv

import pytest

from cifar_fastai import sweep as module
from cifar_fastai.errors import InputError
from cifar_fastai.sweep import COLUMNS, read_settings, sweep


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """What `train` is asked for; it leaves the metrics of a run of nothing."""
    asked = []

    def train(recipe, given):
        asked.append(given)
        folder = tmp_path / given["out"]
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"valid_accuracy": 0.5, "seconds": 2.0}')
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
    sweep("list.txt", "1,2,3", out="out.csv")
    assert len(trials) == 3, "those that were written are not run again"


@pytest.mark.parametrize("text, message", [
    ("", "no settings"), ("--lrr 1", "--lrr is not for"), ("--epochs x", "not flags of resnet18.py"),
    ("--seed 1", "--seed is not for"), ("--no-test", "--no-test is not for"),
])  # fmt: skip
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
