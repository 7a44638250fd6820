"""The benchmark runs to its end, and its table and numbers are what they say; how fast anything is, is not tested."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.groups import few_images, write_archive, write_folder
from benchmarks.startup import peak_memory
from benchmarks.timing import Clock, Result, Row, markdown_table, take_turns
from cifar_fastai.data.images import load_images
from cifar_fastai.errors import InputError

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("benchmark_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tiny_images, tmp_path):
    write_folder(tiny_images, tmp_path / "tiny")
    return tmp_path / "tiny"


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quick_runs_to_its_end(folder, tmp_path):
    numbers = tmp_path / "numbers.json"
    done = subprocess.run(
        [sys.executable, RECIPE, "--data", folder, "--device", "cpu", "--quick", "--json", numbers, "--debug"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    table = [_cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == ["what", "who", "time", "images/s", "ours is", "goal", "spread", "peak memory"]
    assert {len(cells) for cells in table} == {8}
    rows = table[2:]
    groups = {}
    for what, who, *_ in rows:
        name = what or name  # noqa: F821  (a group is named in its first row)
        groups.setdefault(name, []).append(who)
    counts = {name.split(",")[0]: len(found) for name, found in groups.items()}
    assert counts == {"epoch": 5, "pipeline": 3, "step": 4, "start": 4}
    assert "scaled from 2 steps" in rows[0][0]
    assert [cells[4] for cells in rows if cells[1].startswith("ours")] == [""] * 3
    assert all(cells[7].endswith("MiB") for cells in rows[-4:]) or sys.platform == "win32"

    told = json.loads(numbers.read_text())
    assert len(told["rows"]) == len(rows)
    assert told["settings"]["quick"] and told["settings"]["train_images"] == 48
    assert told["machine"]["threads"] == 1 and told["machine"]["versions"]["torch"]
    for row, cells in zip(told["rows"], rows, strict=True):
        assert row["row"] == cells[1]
        assert len(row["seconds"]) == (1 if row["group"].startswith("start") else 2)
        assert all(seconds > 0 for seconds in row["seconds"])
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize(
    "given, told",
    [
        ({"json": "nowhere/numbers.json"}, "--json nowhere/numbers.json"),
        ({"repeats": 0}, "--repeats 0"),
        ({"steps": 1}, "--steps 1"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"compile": "perhaps", "device": "cpu"}, "--compile perhaps"),
        ({"precision": "half", "device": "cpu"}, "--precision half"),
    ],
)
def test_what_cannot_be_is_said_at_once(recipe, given, told):
    with pytest.raises(InputError, match=told):
        recipe.main(**given)


def test_too_large_batches_are_refused(recipe, folder):
    with pytest.raises(InputError, match="--bs 20: 48 train images"):
        recipe.main(data=str(folder), device="cpu", bs=20, quick=True)


class _Ticking:
    """A clock that a step moves on."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def ticking(monkeypatch):
    clock = _Ticking()
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", clock)
    return clock


def _pass(clock, ticking, seconds):
    clock.start()
    for step_seconds in seconds:
        ticking.now += step_seconds
        if clock.step():
            return
    raise AssertionError("the clock has not had enough")


def test_clock_counts_the_start_once(ticking):
    clock = Clock(torch.device("cpu"), steps=4)
    _pass(clock, ticking, [10, 1, 2, 3, 100])
    assert clock.done == 4
    assert clock.per_step == 2
    assert clock.seconds_for(4) == 16  # as measured
    assert clock.seconds_for(11) == 10 + 10 * 2


def test_clock_stops_after_its_seconds(ticking):
    clock = Clock(torch.device("cpu"), steps=100, warm=2, seconds=5)
    _pass(clock, ticking, [50, 50, 2, 2, 2, 2])
    assert clock.done == 5 and clock.per_step == 2


def test_rows_take_turns(ticking):
    order = []

    def row(name):
        def run(clock):
            order.append(name)
            _pass(clock, ticking, [1, 1])

        return Row(name, run)

    clocks = take_turns("a test", [row("A"), row("B"), row("C")], 2, lambda: Clock(torch.device("cpu"), 2))
    assert order == list("ABCABC")
    assert {name: len(found) for name, found in clocks.items()} == {"A": 2, "B": 2, "C": 2}


def test_results_are_compared_round_by_round():
    ours = Result("g", "ours", "epoch", [1.0, 2.0, 4.0], images=100)
    other = Result("g", "other", "epoch", [3.0, 4.0, 12.0], images=100, ours=ours, goal=2.5)
    assert (ours.median, ours.spread, ours.images_per_second, ours.ratio, ours.met) == (2.0, 1.5, 50.0, None, None)
    assert other.ratio == 3.0 and other.met  # of 3, 2 and 3
    assert Result("g", "start", "start", [9.0], limit=10.0).met
    assert not Result("g", "start", "start", [11.0], limit=10.0).met
    json.dumps([ours.as_dict(), other.as_dict()], allow_nan=False)


def test_table_names_a_group_once():
    ours = Result("g", "ours", "epoch", [1440.4], images=50_000)
    lines = markdown_table(
        [
            ours,
            Result("g", "other", "epoch", [3601.0], ours=ours, goal=4.0),
            Result("h", "start", "start", [0.0123], peak_bytes=5 * 2**20),
        ]
    )
    assert [_cells(line) for line in lines[2:]] == [
        ["g", "ours", "1,440 s/epoch", "35", "", "", "0.0%", ""],
        ["", "other", "3,601 s/epoch", "", "2.50x", "4x, missed", "0.0%", ""],
        ["h", "start", "12.3 ms", "", "", "", "0.0%", "5 MiB"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_few_images_keep_their_shares(tiny_images):
    few = few_images(tiny_images, 33)
    assert (few.n_train, few.n_test) == (24, 9)
    assert np.bincount(few.train_labels).tolist() == [8, 8, 8] and np.bincount(few.test_labels).tolist() == [3, 3, 3]
    assert np.array_equal(few.train_images[0], tiny_images.train_images[0])
    assert few_images(tiny_images, 66) is tiny_images and few_images(tiny_images, 1).n_train == 3


def test_archive_holds_the_same_images(tiny_images, folder, tmp_path):
    few = few_images(tiny_images, 33)
    read = load_images(write_archive(few, tmp_path / "few.tgz", folder))
    assert (read.n_train, read.n_test) == (24, 9) and read.classes == ("blue", "green", "red")
    assert sorted(x.tobytes() for x in read.train_images) == sorted(x.tobytes() for x in few.train_images)


@pytest.mark.skipif(sys.platform == "win32", reason="tells no peak")
def test_peak_memory_is_that_of_this_process_alone():
    ballast = np.ones(300 * 2**20, np.uint8)  # a process started from here must not inherit it
    code = "from benchmarks.startup import peak_memory; print(peak_memory())"
    home = str(RECIPE.parents[1])
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": home}
    )
    assert ballast.nbytes < peak_memory()
    if sys.platform == "linux":
        assert int(child.stdout) < 200 * 2**20
