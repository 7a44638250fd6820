"""Runs of the tiny recipe as processes that the tests start, signal and wait for; and what runs must have in common."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "tiny_recipe.py"
CLOCK = ("images_per_second", "seconds")


class Recipes:
    """`tiny_recipe.py --serve`: starts runs in a moment, as processes of their own."""

    def __init__(self, folder):
        self.folder, self.n = folder, 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "CIFAR_FASTAI_CACHE": str(folder / "cache"), "MPLBACKEND": "agg"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=env, text=True, cwd=SCRIPT.parent.parent,
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, args, cwd, **env):
        """Start a run in the folder `cwd`; `env` are variables such as TINY_AT."""
        self.n += 1
        files = {name: str(self.folder / f"{self.n}.{name}") for name in ("stdout", "stderr")}
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
