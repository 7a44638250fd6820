"""Runs on the tiny network, in this process or as processes of their own, and what two runs have in common."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import tiny_recipe
import torch

from cifar_fastai.recipes import RECIPES
from cifar_fastai.runs import results
from cifar_fastai.runs.train import train
from cifar_fastai.settings import Settings
from cifar_fastai.training.checkpoint import load_checkpoint
from cifar_fastai.training.signals import Stopped

TINY = Settings(
    epochs=3,
    bs=8,
    lr=0.15,
    nesterov="yes",
    wd=5e-4,
    wd_bn_bias="no",
    sched="one-cycle",
    pct_start=0.25,
    div_final=1e5,
    padding=4,
    cutout=8,
    flip=None,
    device="cpu",
    compile="no",
)
PICTURES = "curves schedule augmentations class_accuracy confusion_matrix top_losses misclassified gradcam".split()
TEXTS = "config.json history.csv metrics.json predictions.csv model.pth learner.pkl summary.txt report.html".split()
FILES = {*TEXTS, *(f"{name}.png" for name in PICTURES)}  # of a finished run
CLOCK = ["images_per_second", "seconds"]


class Tiny:
    """Runs in this process, on the tiny network, without pictures."""

    def __init__(self, data, monkeypatch):
        self.data, self.patch = data, monkeypatch
        tiny_recipe.use_tiny_net(monkeypatch.setattr)
        tiny_recipe.draw_nothing(monkeypatch.setattr)
        monkeypatch.setitem(RECIPES, "resnet18", TINY)

    def train(self, folder, stop=None, **overrides):
        """Train into `folder`; `stop` = (point, n) sends a SIGTERM there. The run, or None after the signal."""
        return self._run(dict(data=str(self.data), out=str(folder), bs=8) | overrides, stop)

    def resume(self, folder, stop=None, **overrides):
        return self._run(dict(resume=str(folder)) | overrides, stop)

    def _run(self, overrides, stop):
        runs = []

        def finish(run):
            run.last = load_checkpoint(run.folder / "checkpoint.pth")
            results.write_results(run)
            runs.append(run)

        with self.patch.context() as patch:
            if stop:
                tiny_recipe.strike(*stop, lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
            try:
                train("resnet18", finish=finish, **overrides)
            except Stopped as stopped:
                assert stop and stopped.signum == signal.SIGTERM
                return None
        return runs[0]


class Recipes:
    """Runs as processes of their own, forked from a server that has imported torch."""

    def __init__(self, data, folder):
        self.data, self.folder, self.n, self.finished = data, folder, 0, {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tiny_recipe", "sklearn.model_selection", "torch.utils.tensorboard"])
        with pytest.MonkeyPatch.context() as patch:  # the server has this environment
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            multiprocessing.forkserver.ensure_running()

    def arguments(self, *more):
        return ["--data", self.data, "--epochs", 3, "--bs", 8, "--lr", 0.15, "--cutout", 8, *more]

    def start(self, args, cwd, stdout=None, **options):
        """Start a run in the folder `cwd`; `options` are those of tiny_recipe.main."""
        self.n += 1
        outputs = [stdout or self.folder / f"{self.n}.out", self.folder / f"{self.n}.err"]
        for path in outputs:
            open(path, "a").close()
        options = dict(cache=self.folder / "cache") | options
        process = self.context.Process(
            target=tiny_recipe.main, args=([*map(str, args)], cwd, outputs), kwargs=options, daemon=True
        )
        process.start()
        return Process(process, outputs)

    def train(self, out, *more, **options):
        """A run into the folder `out`, when it has ended."""
        return self.start(self.arguments("--out", out, *more), out.parent, **options).wait()

    def resume(self, out, *more, **options):
        return self.start(["--resume", out, *more], out.parent, **options).wait()

    def whole(self, *more, **options):
        """The folder of a run with these flags that nothing happened to."""
        key = (*more, *options)
        if key not in self.finished:
            self.finished[key] = self.folder / f"whole{len(self.finished)}" / "run"
            self.finished[key].parent.mkdir()
            process = self.train(self.finished[key], *more, **options)
            assert process.code == 0, process.err
        return self.finished[key]


class Process:
    """A run; `code` is its exit status once it has ended, -9 after a SIGKILL."""

    def __init__(self, process, outputs):
        self.process, self.outputs = process, outputs

    out = property(lambda self: Path(self.outputs[0]).read_text())
    err = property(lambda self: Path(self.outputs[1]).read_text())
    code = property(lambda self: self.process.exitcode)

    def wait(self, seconds=120):
        self.process.join(seconds)
        if self.code is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s\n{self.err}")
        return self

    def send(self, name):
        with suppress(ProcessLookupError):  # it may have ended
            os.kill(self.process.pid, getattr(signal, f"SIG{name}"))


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


def history(folder):
    """The rows of history.csv as text, without the clock's columns."""
    return (
        pd.read_csv(Path(folder) / "history.csv", dtype=str, keep_default_na=False)
        .drop(columns=CLOCK)
        .to_dict("records")
    )


def metrics(folder):
    """metrics.json without the clock's numbers."""
    values = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: value for name, value in values.items() if name not in CLOCK}


def same(one, other):
    """Whether two nests of dicts, lists, tensors and plain values are equal, tensors by torch.equal."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


def assert_same_state(one, other):
    """Two checkpoints: weights, momenta, averages, counters, random states, all but the clock."""
    for key in ("epoch", "model", "opt", "callbacks", "random", "lrs", "moms", "train_iter"):
        assert same(one[key], other[key]), key


def assert_same_folders(one, other):
    """Two finished runs of processes: every file of theirs, and their last checkpoints."""
    assert history(one) == history(other) and metrics(one) == metrics(other)
    assert_same_state(*(load_checkpoint(folder.parent / "last.pth") for folder in (one, other)))
    names = [{path.name for path in folder.rglob("*") if "tfevents" not in path.name} for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0] - {"config.json", "history.csv", "metrics.json", "learner.pkl", "report.html", "tensorboard"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
