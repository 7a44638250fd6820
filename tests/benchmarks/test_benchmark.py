"""The benchmark runs to its end, and its table and numbers are what they say; how fast anything is, is not tested."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.groups import few_images, write_archive, write_folder
from benchmarks.run import run_benchmark
from benchmarks.startup import peak_memory
from benchmarks.timing import Clock, Result, Row, markdown_table, take_turns
from cifar_fastai.data.images import load_images
from cifar_fastai.errors import InputError

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark.py"


@pytest.fixture
def folder(tiny_images, tmp_path):
    write_folder(tiny_images, tmp_path / "tiny")
    return tmp_path / "tiny"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quick_runs_to_its_end(folder, tmp_path):
    numbers = tmp_path / "numbers.json"
    words = [RECIPE, "--data", folder, "--device", "cpu", "--quick", "--json", numbers, "--debug"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    header, _, *rows = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    assert header == ["what", "who", "time", "images/s", "ours is", "goal", "spread", "peak memory"]
    assert {len(row) for row in rows} == {8} and "scaled from 2 steps" in rows[0][0]
    assert [row[4] for row in rows if row[1].startswith("ours")] == [""] * 3
    assert all(row[7].endswith("MiB") for row in rows[-4:]) or sys.platform == "win32"

    written = json.loads(numbers.read_text())
    assert written["settings"]["quick"] and written["settings"]["train_images"] == 48
    assert written["machine"]["threads"] == 1 and written["machine"]["versions"]["torch"]
    groups = Counter(row["group"].split(",")[0] for row in written["rows"])
    assert groups == {"epoch": 5, "pipeline": 3, "step": 4, "start": 4}
    assert [row["row"] for row in written["rows"]] == [row[1] for row in rows]
    for row in written["rows"]:
        assert len(row["seconds"]) == (1 if row["group"].startswith("start") else 2) and min(row["seconds"]) > 0
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(json="nowhere/numbers.json"), "json='nowhere/numbers.json'"),
        (dict(repeats=0), "repeats=0"),
        (dict(minutes=float("nan")), "minutes=nan"),
        (dict(compile="perhaps", device="cpu"), "compile='perhaps'"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        run_benchmark(**arguments)


def test_too_large_batches_are_refused(folder):
    with pytest.raises(InputError, match="bs=20: 48 train images"):
        run_benchmark(data=str(folder), device="cpu", bs=20, quick=True)


@pytest.fixture
def passes(monkeypatch):
    """A function that lets a clock see steps of so many seconds, until it has had enough."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])

    def run(clock, seconds):
        clock.start()
        for step_seconds in seconds:
            now[0] += step_seconds
            if clock.step():
                return
        raise AssertionError("the clock has not had enough")

    return run


def test_clock_counts_the_start_once(passes):
    clock = Clock(torch.device("cpu"), steps=4)
    passes(clock, [10, 1, 2, 3, 100])
    assert clock.done == 4 and clock.per_step == 2
    assert clock.seconds_for(4) == 16  # as measured
    assert clock.seconds_for(11) == 10 + 10 * 2


def test_clock_stops_after_its_seconds(passes):
    clock = Clock(torch.device("cpu"), steps=100, warm=2, seconds=5)
    passes(clock, [50, 50, 2, 2, 2, 2])
    assert clock.done == 5 and clock.per_step == 2


def test_rows_take_turns(passes):
    order = []

    def row(name):
        def run(clock):
            order.append(name)
            passes(clock, [1, 1])

        return Row(name, run)

    clocks = take_turns("a test", [row("A"), row("B"), row("C")], 2, lambda: Clock(torch.device("cpu"), 2))
    assert order == list("ABCABC")
    assert {name: len(rounds) for name, rounds in clocks.items()} == {"A": 2, "B": 2, "C": 2}


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
    other = Result("g", "other", "epoch", [3601.0], ours=ours, goal=4.0)
    lines = markdown_table([ours, other, Result("h", "start", "start", [0.0123], peak_bytes=5 * 2**20)])
    assert [cells(line) for line in lines[2:]] == [
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
    env = os.environ | {"PYTHONPATH": str(RECIPE.parents[1])}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ballast.nbytes < peak_memory()
    if sys.platform == "linux":
        assert int(child.stdout) < 200 * 2**20
