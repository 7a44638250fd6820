"""The recipe of ResNet18 on a network that trains in a moment: a process that can be hit at any point of its run."""

import atexit
import os
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
from tiny_net import TinyNet

from cifar_fastai import models
from cifar_fastai.runs import folder, results, run, train
from cifar_fastai.training import checkpoint, loggers, recorder

RECIPE = Path(__file__).parent.parent / "recipes" / "resnet18.py"
POINTS = {  # where a run can be hit: in front of these functions
    "data": (train, "load_images"),
    "images": (run, "load_images"),
    "folder": (train, "make_folder"),
    "step": (Learner, "_do_grad_opt"),
    "validate": (Learner, "_do_epoch_validate"),
    "history": (recorder.History, "write"),
    "tensorboard": (loggers.TensorBoardLog, "after_epoch"),
    "checkpoint": (checkpoint.Checkpoint, "after_epoch"),
    "results": (results, "write_results"),
    "export": (results, "export"),
    "picture": (results, "save_figure"),
    "metrics": (results, "write_json"),
    "report": (results, "write_report"),
}


def use_tiny_net(patch=setattr):
    """Let resnet18 name the tiny network; `patch(object, name, value)` sets it."""
    patch(models, "_FACTORIES", {**models._FACTORIES, "resnet18": TinyNet})


def draw_nothing(patch=setattr):
    """Leave out pictures and page, which take most of a tiny run's time."""
    patch(results, "_draw", lambda *args: {})
    patch(results, "error_tiles", lambda *args: SimpleNamespace(indices=[]))
    patch(results, "write_report", lambda *args: None)


def strike(point, n, act, patch=setattr):
    """Call `act` before the `n`-th call at `point`, counted from 1; "writing": in the middle of the n-th checkpoint."""
    calls = [0]

    def count():
        calls[0] += 1
        if calls[0] == n:
            act()

    def counted(*args, **kwargs):
        count()
        return function(*args, **kwargs)

    @contextmanager
    def half_written(path, mode):
        with function(path, mode) as file:
            write = file.write

            def write_in_halves(content):
                half = len(content) // 2
                write(content[:half])
                file.flush()
                count()
                write(content[half:])

            file.write = write_in_halves
            yield file

    owner, name = (checkpoint, "atomic_write") if point == "writing" else POINTS[point]
    function = getattr(owner, name)
    patch(owner, name, half_written if point == "writing" else counted)


def _send(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        time.sleep(0.01)  # a few bytecodes, after which Python runs the handler


def _fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        block = bytes(1 << 16)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


ACTIONS = {
    "KILL": lambda _: _send("KILL"),
    "INT": lambda _: _send("INT"),
    "TERM": lambda _: _send("TERM"),
    "TWICE": lambda _: _send("INT", "INT"),
    "FILL": _fill,
    "REMOVE": shutil.rmtree,
}


def main(
    args,
    cwd,
    outputs,
    at=None,
    place=None,
    tiny=True,
    pictures=False,
    cache=None,
    second=None,
    closed=(),
    environment=(),
):
    """The process of a run with the command line `args`; stdout and stderr go to the files `outputs`.

    `at="step 7 KILL"` acts at the 7th step (POINTS, ACTIONS); `place` is the folder that an action needs. The run's
    last checkpoint is kept as last.pth in `cwd`. `second` replaces the time of day, `tiny=False` uses the real network,
    and the descriptors in `closed` are closed. `environment`: variables, as of torchrun.
    """
    for descriptor, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), descriptor)
    os.chdir(cwd)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process would have it ignored
    os.environ.update(CIFAR_FASTAI_CACHE=str(cache), **{name: str(value) for name, value in dict(environment).items()})
    if tiny:
        use_tiny_net()
    if not pictures:
        draw_nothing()
    if at:
        point, n, action = at.split()
        strike(point, int(n), lambda: ACTIONS[action](place))
    write_results = results.write_results

    def keep_checkpoint(run, **arguments):
        shutil.copy(run.folder / "checkpoint.pth", cwd / "last.pth")
        write_results(run, **arguments)

    results.write_results = keep_checkpoint
    if second:
        folder.time = SimpleNamespace(strftime=lambda form: second)
    sys.argv = [str(RECIPE), *args]
    for descriptor in closed:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as at Python's start
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
