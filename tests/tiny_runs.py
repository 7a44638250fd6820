"""Runs on the tiny network, in this process or as processes of their own; and what two runs have in common."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny_recipe import draw_nothing, strike, use_tiny_net

from cifar_fastai.config import Recipe
from cifar_fastai.runs import train as train_module
from cifar_fastai.runs.results import write_results
from cifar_fastai.runs.train import train
from cifar_fastai.training.checkpoint import load_checkpoint
from cifar_fastai.training.signals import Stopped

RECIPE = Recipe("resnet18", dict(epochs=3, bs=8, lr=0.15, cutout=8, device="cpu", compile="no"))
SCRIPT = Path(__file__).parent / "tiny_recipe.py"
CLOCK = ("images_per_second", "seconds")


class Tiny:
    """Runs in this process, on the tiny network, without pictures."""

    def __init__(self, data, monkeypatch):
        self.data, self.patch = data, monkeypatch
        use_tiny_net(monkeypatch.setattr)
        draw_nothing(monkeypatch.setattr)

    def train(self, folder, stop=None, **given):
        """Train into `folder`; `stop` = (point, n) sends a SIGTERM there. The run, or None after the signal."""
        return self._run(dict(data=str(self.data), out=str(folder), bs=8) | given, stop)

    def resume(self, folder, stop=None, **given):
        return self._run(dict(resume=str(folder)) | given, stop)

    def _run(self, given, stop):
        done = []

        def write_results_too(run):
            run.last = load_checkpoint(run.folder / "checkpoint.pth")
            write_results(run)
            done.append(run)

        with self.patch.context() as patch:
            patch.setattr(train_module, "write_results", write_results_too)
            if stop:
                strike(*stop, lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
            try:
                train(RECIPE, given)
            except Stopped as stopped:
                assert stop and stopped.signum == signal.SIGTERM
                return None
        return done[0]


class Recipes:
    """`tiny_recipe.py --serve`: starts runs in a moment, as processes of their own."""

    def __init__(self, folder):
        self.folder, self.n = folder, 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "CIFAR_FASTAI_CACHE": str(folder / "cache"), "MPLBACKEND": "agg"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
            cwd=SCRIPT.parent.parent,
        )
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, args, cwd, stdout=None, **env):
        """Start a run in the folder `cwd`; `env` are variables such as TINY_AT."""
        self.n += 1
        files = {name: str(self.folder / f"{self.n}.{name}") for name in ("stdout", "stderr")}
        files["stdout"] = stdout or files["stdout"]
        for file in files.values():
            open(file, "a").close()
        args, env = [str(arg) for arg in args], {name: str(value) for name, value in env.items()}
        return Process(self, self.ask(args=args, cwd=str(cwd), env=env, **files), files)

    def run(self, args, cwd, **env):
        """Start a run and wait for its end; its Process."""
        process = self.start(args, cwd, **env)
        process.wait()
        return process

    def close(self):
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()


class Process:
    """A run: `code` is its exit status once it has been waited for, -9 after a SIGKILL."""

    def __init__(self, recipes, pid, files):
        self.recipes, self.pid, self.files, self.code = recipes, pid, files, None

    def wait(self, seconds=120):
        if self.code is not None:
            return self.code
        self.code = self.recipes.ask(wait=self.pid, seconds=seconds)
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.recipes.ask(wait=self.pid, seconds=10)
            raise AssertionError(f"still running after {seconds} s\n{self.out}{self.err}")
        return self.code

    def kill(self, name="KILL"):
        os.kill(self.pid, getattr(signal, f"SIG{name}"))

    @property
    def out(self):
        return Path(self.files["stdout"]).read_text()

    @property
    def err(self):
        return Path(self.files["stderr"]).read_text()


def wait_for(happened, seconds=60):
    """Wait until `happened()`; AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


def history(folder):
    """The rows of history.csv as text, without the clock's columns."""
    with open(Path(folder) / "history.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def metrics(folder):
    """metrics.json without the clock's numbers."""
    found = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name not in CLOCK}


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


class Planted:
    """Unpickled, it calls `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call
