"""The recipe of ResNet18 as a process of its own, on a network that trains in a moment: to be killed and resumed.

    python tests/tiny_recipe.py --data FOLDER --epochs 3     one run
    python tests/tiny_recipe.py --serve                      a process for every line of JSON that it reads

Serving means that torch is imported once, and every run is a fork: a process like any other, without the seconds that
it takes to start, and to take the interpreter down. `TINY_AT="step 7 KILL"` does something to the run at its 7th step;
POINTS and ACTIONS name where and what. `TINY_KEEP=FILE` keeps the last checkpoint, which a run that is done removes;
`TINY_QUICK=1` draws no pictures; `TINY_SECOND` is what the clock says to those that name folders by it, `TINY_LIMIT` a
limit to the size of files.
"""

import atexit
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from fastai.learner import Learner
from torch import nn

from cifar_fastai import models
from cifar_fastai.runs import folder as runs
from cifar_fastai.runs import results as outputs
from cifar_fastai.runs import train
from cifar_fastai.training import checkpoint, runlog
from cifar_fastai.training import loggers as tensorboard

RECIPE = Path(__file__).parent.parent / "recipes" / "resnet18.py"


class TinyNet(nn.Module):
    """The children that ResNet18 has, small: 32 x 32 pixels -> maps of 16, 8 and 8."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2, self.layer3 = self.layer(4, 8, 2), self.layer(8, 8, 2), self.layer(8, 8, 1)
        self.linear = nn.Linear(8, n_classes)

    @staticmethod
    def layer(n_in, n_out, stride):
        conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()  # (B, 4, 32, 32)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 8, 8, 8)
        return self.linear(x.mean((2, 3)))  # (B, n_classes)


def use_tiny_net(patch=setattr):
    """Let resnet18 name the tiny network; `patch(object, name, value)` sets it."""
    patch(models, "_FACTORIES", {**models._FACTORIES, "resnet18": TinyNet})


def draw_nothing(patch=setattr):
    """Leave pictures and page out, which take most of a tiny run's time; `patch(object, name, value)` sets it."""
    patch(outputs, "_draw", lambda *args: {})
    patch(outputs, "error_tiles", lambda *args: SimpleNamespace(indices=[]))
    patch(outputs, "write_report", lambda *args: None)


# Where a run can be hit: the function in front of which it happens, and what its call is the n-th of ----------------

POINTS = {
    "data": (train, "load_images"),
    "folder": (train, "make_folder"),
    "step": (Learner, "_do_grad_opt"),
    "validate": (Learner, "_do_epoch_validate"),
    "history": (runlog.RunLog, "write"),
    "tensorboard": (tensorboard.TensorBoardLog, "after_epoch"),
    "checkpoint": (checkpoint.Checkpoint, "after_epoch"),
    "results": (train, "write_results"),
    "export": (outputs, "export"),
    "picture": (outputs, "save_figure"),
    "metrics": (outputs, "write_json"),
    "report": (outputs, "write_report"),
}


@contextmanager
def _half_written(path, mode, act):
    """checkpoint.atomic_write, with `act` between the two halves of what is written."""
    with _atomic_write(path, mode) as file:
        write = file.write

        def write_in_halves(content):
            half = len(content) // 2
            write(content[:half])
            file.flush()
            act()
            write(content[half:])

        file.write = write_in_halves
        yield file


_atomic_write = checkpoint.atomic_write


def strike(point, n, act, patch=setattr):
    """Call `act` at the `n`-th passage of `point`, counted from 1 ("writing": within the n-th checkpoint)."""
    passed = [0]

    def count():
        passed[0] += 1
        if passed[0] == n:
            act()

    if point == "writing":
        patch(checkpoint, "atomic_write", lambda path, mode="w": _half_written(path, mode, count))
        return
    owner, name = POINTS[point]
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        count()
        return function(*args, **kwargs)

    patch(owner, name, wrapped)


def _signals(*names):
    def act():
        for name in names:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
            time.sleep(0.01)  # a bytecode or two, in which Python hears of it

    return act


def _fill():
    """Fill the disk that the run writes to."""
    with open(Path(os.environ["TINY_DISK"]) / "filler", "wb", buffering=0) as file:
        block = bytes(1 << 16)
        while len(block):
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


def _out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _wait():
    """Say that the point is reached by a file, and wait until the test takes it away."""
    ready, until = Path(os.environ["TINY_READY"]), time.monotonic() + 60
    ready.touch()
    while ready.exists() and time.monotonic() < until:
        time.sleep(0.01)


ACTIONS = {
    "KILL": _signals("KILL"),
    "INT": _signals("INT"),
    "TERM": _signals("TERM"),
    "TWICE": _signals("INT", "INT"),
    "FILL": _fill,
    "OOM": _out_of_memory,
    "WAIT": _wait,
    "VANISH": lambda: shutil.rmtree(os.environ["TINY_DISK"]),
    "UNCACHE": lambda: shutil.rmtree(os.environ["CIFAR_FASTAI_CACHE"]),
    "READONLY": lambda: os.system(f"mount -o remount,ro {os.environ['TINY_DISK']}"),
}


def _keep(path):
    write_results = train.write_results

    def keeping(run):
        shutil.copy(run.folder / "checkpoint.pth", path)
        write_results(run)

    train.write_results = keeping


def _serve():
    """Fork a process for every request on stdin; returns in each of them, and never in the server."""
    import sklearn.model_selection  # noqa: F401  (what runs import late)
    import torch.utils.tensorboard  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            until = time.monotonic() + request["seconds"]
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            while not pid and time.monotonic() < until:
                time.sleep(0.005)
                pid, status = os.waitpid(request["wait"], os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "null", flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv[1:] = request["args"]
        return
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    use_tiny_net()
    if "TINY_QUICK" in os.environ:
        draw_nothing()
    if "TINY_KEEP" in os.environ:
        _keep(os.environ["TINY_KEEP"])
    if "TINY_SECOND" in os.environ:  # every run starts in this one
        runs.time = SimpleNamespace(strftime=lambda form: os.environ["TINY_SECOND"])
    if "TINY_LIMIT" in os.environ:  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["TINY_LIMIT"]),) * 2)
    if "TINY_AT" in os.environ:
        where, n, what = os.environ["TINY_AT"].split()
        strike(where, int(n), ACTIONS[what])
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as end:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(end.code)
