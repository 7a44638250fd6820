"""What a run does when it is stopped, when the disk fails, when the loss or the memory run out, and beside others."""

import copy
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from tiny_net import TinyNet
from tiny_recipe import RECIPE
from tiny_runs import assert_same_folders, history, metrics, same, wait_for

from cifar_fastai import cli, files
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import RunError
from cifar_fastai.training import checkpoint
from cifar_fastai.training.callbacks import WeightAverage
from cifar_fastai.training.checkpoint import load_checkpoint, random_states
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test

STATUS = {"INT": 130, "TERM": 143, "TWICE": 130}


def one_line(process):
    """The only line on stderr."""
    (line,) = process.err.strip().splitlines()
    return line


def last_line(process):
    """After a signal: a line before it may say that the step is being finished."""
    assert "Traceback" not in process.err
    return process.err.splitlines()[-1]


def how_to_go_on(out):
    python = Path(sys.executable)  # by name where the shell finds it; it is not below the folder of the run
    return f"go on with: {python.name if shutil.which(python.name) == str(python) else python} {RECIPE} --resume {out}"


def test_a_program_is_named_as_the_shell_here_finds_it(tmp_path, monkeypatch):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    assert cli._as_called(python) == str(python)
    monkeypatch.chdir(tmp_path)
    assert cli._as_called(python) == os.path.join(".venv", "bin", "python")
    monkeypatch.setenv("PATH", str(python.parent))
    assert cli._as_called(python) == "python"


def last_epoch(out):
    return load_checkpoint(out / "checkpoint.pth")["epoch"]


def assert_goes_on(recipes, out, *more):
    """A resumed run ends as one that nothing happened to."""
    process = recipes.resume(out)
    assert (process.code, process.err) == (0, "")
    assert_same_folders(recipes.whole(*more), out)


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at, epoch",
    [
        ("step 8 INT", 1),
        ("validate 2 TERM", 1),
        ("history 2 INT", 2),
        ("writing 2 INT", 2),
        ("writing 3 TERM", 3),
        ("results 1 INT", 3),
        ("metrics 1 TERM", 3),
    ],
)
def test_a_signal_ends_the_step_and_tells_how_to_go_on(recipes, tmp_path, at, epoch):
    out = tmp_path / "run"
    process = recipes.train(out, at=at)
    assert (process.code, last_line(process)) == (STATUS[at.split()[-1]], f"stopped; {how_to_go_on(out)}")
    assert last_epoch(out) == epoch and not list(out.glob(".*"))
    assert_goes_on(recipes, out)


@pytest.mark.parametrize("at, names", [("data 1 INT", None), ("folder 1 TERM", None), ("step 2 INT", ["config.json"])])
def test_a_signal_before_the_first_epoch_is_over(recipes, tmp_path, at, names):
    out = tmp_path / "run"
    process = recipes.train(out, at=at)
    assert (process.code, last_line(process)) == (STATUS[at.split()[-1]], "stopped")
    assert (sorted(os.listdir(out)) if out.exists() else None) == names


def test_a_signal_in_the_range_test(recipes, tmp_path):
    process = recipes.train(tmp_path / "run", "--lr", "find", at="step 30 INT")
    assert (process.code, last_line(process)) == (130, "stopped")
    assert os.listdir(tmp_path / "run") == ["config.json"] and os.listdir(tmp_path) == ["run"]


def test_a_signal_while_a_resumed_run_reads_its_data(recipes, tmp_path):
    out = tmp_path / "run"
    recipes.train(out, at="step 8 TERM")
    process = recipes.resume(out, at="images 1 INT")
    assert (process.code, last_line(process)) == (130, f"stopped; {how_to_go_on(out)}")
    assert_goes_on(recipes, out)


@pytest.mark.parametrize("at, epoch", [("step 8 TWICE", 1), ("writing 2 TWICE", 1), ("export 1 TWICE", 3)])
def test_a_second_signal_ends_at_once(recipes, tmp_path, at, epoch):
    """Within the step, within the writing of a checkpoint, whose old one stays, and among the results."""
    out = tmp_path / "run"
    process = recipes.train(out, at=at)
    assert process.code == 130 and "Traceback" not in process.err and last_epoch(out) == epoch
    assert_goes_on(recipes, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT", "TERM"])
@pytest.mark.parametrize("seed", range(4))
def test_signals_at_random_moments(recipes, tmp_path, name, seed):
    """From outside, at any time after the start, with pictures and page."""
    out, moments = tmp_path / "run", random.Random(seed)
    for n_signals in range(5):
        args = ["--resume", out] if (out / "checkpoint.pth").exists() else recipes.arguments("--out", out)
        process = recipes.start(args, tmp_path, pictures=True)
        if n_signals < 4:
            wait_for(lambda process=process: "files:" in process.out)  # it has begun
            time.sleep(moments.uniform(0, 1.5))
            process.send(name)
        if process.wait().code == 0:
            break
        kept = (out / "checkpoint.pth").exists()
        assert process.code == STATUS[name]
        assert last_line(process) == (f"stopped; {how_to_go_on(out)}" if kept else "stopped")
    assert process.code == 0
    assert_same_folders(recipes.whole(pictures=True), out)


# The disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB of its own; skipped where it cannot be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("only root can mount a disk; test_any_write_may_fail stands for it")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize(
    "at, name, more",
    [
        ("checkpoint 2", "checkpoint.pth", ()),
        ("results 1", "predictions.csv", ()),
        ("export 1", "learner.pkl", ()),
        ("metrics 1", "metrics.json", ()),
        ("tensorboard 2", "", ("--tensorboard",)),
    ],
)
def test_a_full_disk_ends_in_one_line(recipes, disk, at, name, more):
    out = disk / "run"
    process = recipes.train(out, *more, at=f"{at} FILL", place=disk)
    line = one_line(process)
    assert process.code == 1 and line.startswith(f"error: {out / name}")
    assert re.search("No space left on device|is the disk full", line) and line.endswith(how_to_go_on(out))
    assert last_epoch(out) in (1, 3) and not list(out.glob(".*"))
    (disk / "filler").unlink()
    assert_goes_on(recipes, out, *more)


def test_a_read_only_disk(recipes, disk):
    recipes.train(disk / "run", at="step 8 KILL")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    process = recipes.resume(disk / "run")
    assert process.code == 1 and re.match(f"error: {disk}/run/.*: Read-only file system; go on", one_line(process))
    for out, reason in (
        (disk / "new", "cannot be created (Read-only file system)"),
        (disk, "cannot be written to; choose another folder"),
    ):
        process = recipes.train(out)
        assert (process.code, one_line(process)) == (2, f"error: --out {out}: {reason}")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert_goes_on(recipes, disk / "run")


@pytest.mark.parametrize("number, code", [(1, errno.ENOSPC), (2, errno.EROFS), (3, errno.ENOSPC), (5, errno.EROFS)])
def test_any_write_may_fail(tiny, tmp_path, monkeypatch, capsys, number, code):
    """The n-th file that a run writes cannot be: one line, no half file, and what is there goes on to the same end."""
    tiny.train(tmp_path / "whole", epochs=2)
    count, fsync = [0], os.fsync

    def failing(handle):
        count[0] += 1
        if count[0] == number:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    out = tmp_path / "run"
    monkeypatch.setattr(files.os, "fsync", failing)
    capsys.readouterr()
    assert cli._run(lambda: tiny.train(out, epochs=2), False) == 1
    kept, err = (out / "checkpoint.pth").exists(), capsys.readouterr().err
    assert re.fullmatch(rf"error: {out}/[a-z.]+: {os.strerror(code)}(; go on with: .*)?\n", err)
    assert ("go on with" in err) == kept and not list(out.glob(".*"))
    tiny.resume(out) if kept else tiny.train(out, epochs=2)
    assert history(out) == history(tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")


def test_an_output_folder_that_vanishes(recipes, tmp_path):
    out = tmp_path / "run"
    process = recipes.train(out, at="checkpoint 2 REMOVE", place=out)
    assert process.code == 1 and one_line(process) == f"error: {out / 'checkpoint.pth'}: No such file or directory"
    assert not out.exists(), "it is not made again behind the user's back"


def test_output_that_cannot_be_printed(recipes, tmp_path):
    process = recipes.train(tmp_path / "run", stdout="/dev/full")
    assert process.code == 1 and one_line(process) == "error: No space left on device"


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams_do_no_harm(recipes, tmp_path, closed):
    """`>&-`: a file that the run opens must not get the number of stdout, nor a print fail."""
    process = recipes.train(tmp_path / "run", closed=closed)
    assert (process.code, process.err, process.out) == (0, "", "")
    assert_same_folders(recipes.whole(), tmp_path / "run")


def test_a_reader_that_has_gone(tiny, tmp_path, monkeypatch, capsys):
    """`| head -3`: the run ends and says how to go on; so it does where stderr goes the same way, in silence."""

    def broken():
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", buffering=1)

    for streams in (["stdout"], ["stdout", "stderr"]):
        out = tmp_path / f"run{len(streams)}"
        tiny.train(out, stop=("history", 1))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name in streams:
                patch.setattr(sys, name, broken())
            assert cli._run(lambda: tiny.resume(out), False) == 141  # noqa: B023
        err = capsys.readouterr().err
        assert (
            err.endswith(f"--resume {out}\n") and err.startswith("stopped; go on with:")
            if len(streams) < 2
            else not err
        )
        tiny.resume(out)


def test_a_cache_that_is_deleted_during_the_run(recipes, tmp_path):
    cache = tmp_path / "cache"
    process = recipes.train(tmp_path / "run", at="step 8 REMOVE", place=cache, cache=cache)
    assert (process.code, process.err) == (0, "") and not cache.exists()
    assert history(tmp_path / "run") == history(recipes.whole())


@pytest.mark.parametrize("name", ["file", "file/run", ""])
def test_an_output_folder_that_cannot_be(recipes, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    process = recipes.start(recipes.arguments("--out", name), tmp_path).wait()
    assert process.code == 2 and one_line(process).startswith("error: --out ")
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


# The loss and the memory ----------------------------------------------------------------------------------------------


def replace_output(monkeypatch, act, training=True, first=1):
    """Let the tiny network return `act(logits)` from its `first` pass in training (or evaluation) on."""
    forward, passes = TinyNet.forward, [0]

    def replaced(self, x):
        out = forward(self, x)
        passes[0] += self.training == training
        return act(out) if self.training == training and passes[0] >= first else out

    monkeypatch.setattr(TinyNet, "forward", replaced)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step, text", [(1, "step 1 of epoch 1"), (9, "step 3 of epoch 2"), (12, "step 6 of epoch 2")])
def test_a_loss_that_is_no_number(tiny, tmp_path, monkeypatch, capsys, step, text, value):
    replace_output(monkeypatch, lambda out: out * value, first=step)
    assert cli._run(lambda: tiny.train(tmp_path / "run", sched="none", lr=0.125), False) == 1
    hint = "try a lower --lr, --clip 1 or --precision fp32"
    assert capsys.readouterr().err == f"error: the loss is not a number since {text} (lr 0.125); {hint}\n"
    if step == 1:
        assert os.listdir(tmp_path / "run") == ["config.json"]
    else:
        assert last_epoch(tmp_path / "run") == 1


def test_an_evaluation_that_is_no_number(tiny, tmp_path, monkeypatch):
    replace_output(monkeypatch, lambda out: out * float("nan"), training=False, first=2)
    with pytest.raises(RunError, match=r"the loss on the evaluated images is not a number after epoch 2 \(lr 0.1"):
        tiny.train(tmp_path / "run", sched="none")
    assert last_epoch(tmp_path / "run") == 1


def test_a_run_that_diverges(recipes, tmp_path):
    """Not simulated: a weight decay and a learning rate that blow the weights up."""
    process = recipes.train(tmp_path / "run", "--lr", 100, "--wd", 1, "--bs", 4, "--sched", "none")
    line = r"error: the loss is not a number since step \d of epoch \d+ \(lr 100\); try a lower --lr, .*"
    assert process.code == 1 and re.fullmatch(line, one_line(process))


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried")
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)")


@pytest.mark.parametrize("error", [CUDA, CPU, MPS, MemoryError("Unable to allocate 2.00 GiB")])
@pytest.mark.parametrize("limit, hint", [(2, "try --bs 2, which fits"), (0, "not even one image fits, try .*")])
def test_out_of_memory_says_what_fits(tiny, tmp_path, monkeypatch, capsys, error, limit, hint):
    def act(out):
        if len(out) > limit:
            raise error
        return out

    replace_output(monkeypatch, act)
    assert cli._run(lambda: tiny.train(tmp_path / "run"), False) == 1
    assert re.fullmatch(rf"error: --bs 8: too large for the memory of .*; {hint}\n", capsys.readouterr().err)


def test_other_errors_are_named(tiny, tmp_path, monkeypatch, capsys):
    """An error of the network is not taken for a lack of memory, and one in a callback is shown without fastai's."""
    monkeypatch.setattr(checkpoint, "random_states", lambda dls: 1 / 0)
    assert cli._run(lambda: tiny.train(tmp_path / "run"), False) == 1
    replace_output(monkeypatch, Mock(side_effect=RuntimeError("size mismatch\nand more of it")))
    assert cli._run(lambda: tiny.train(tmp_path / "run"), False) == 1
    errors = "ZeroDivisionError: division by zero", "RuntimeError: size mismatch"
    assert capsys.readouterr().err == "".join(f"error: {error} (the traceback: --debug)\n" for error in errors)
    with pytest.raises(RuntimeError):
        cli._run(lambda: tiny.train(tmp_path / "run"), True)


# Side by side ---------------------------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second(recipes, tmp_path):
    processes = [recipes.start(recipes.arguments(), tmp_path, second="20260102-030405") for _ in range(3)]
    assert [process.wait().code for process in processes] == [0, 0, 0]
    names = [f"resnet18-20260102-030405{n}" for n in ("", "-2", "-3")]
    assert sorted(os.listdir(tmp_path / "runs")) == names
    assert all(history(tmp_path / "runs" / name) == history(recipes.whole()) for name in names)


def test_runs_that_share_a_cache_which_is_rebuilt(recipes, tmp_path):
    """Four runs start at once without a cache, which is deleted again and again meanwhile."""
    cache, done = tmp_path / "cache", threading.Event()

    def delete():
        while not done.wait(0.01):
            shutil.rmtree(cache, ignore_errors=True)

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        args = [recipes.arguments("--out", tmp_path / str(n)) for n in range(4)]
        processes = [process.wait() for process in [recipes.start(a, tmp_path, cache=cache) for a in args]]
    finally:
        done.set()
        deleting.join()
    assert [(process.code, process.err) for process in processes] == [(0, "")] * 4
    assert all(history(tmp_path / str(n)) == history(recipes.whole()) for n in range(4))


# In a notebook: the range test, interrupted, and a thread -------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("no")])
def test_a_range_test_leaves_no_trace(tiny_images, monkeypatch, error):
    class Interrupt(Callback):
        order = 200

        def after_pred(self):
            if error and self.training and self.train_iter == 7:
                raise error

    torch.manual_seed(0)
    dls = cifar_dls(tiny_images, bs=8, device="cpu")
    learn = cifar_learner(dls, TinyNet(), precision="bf16", cbs=[MixUp(0.4), WeightAverage(0.9)])
    learn.remove_cb(learn.progress)

    def state():
        plain = [learn.loss_func, learn.model_dir, learn.model.training, set(learn.cbs)]
        tensors = [dict(learn.model.state_dict()), copy.deepcopy(learn.opt.opt.state_dict()), random_states(dls)]
        return plain, tensors

    with learn.no_logging():
        learn.fit_one_cycle(1, 0.1)
        monkeypatch.setattr(dls, "path", Path("nowhere"), raising=False)
        before, tensors = state()
        tensors = [{name: value.clone() for name, value in tensors[0].items()}, *tensors[1:]]
        with learn.added_cbs(Interrupt()):
            if error:
                with pytest.raises(type(error)):
                    range_test(learn, num_it=40)
            else:
                range_test(learn, num_it=40)
        after, tensors_after = state()
        assert before == after and all(map(same, tensors, tensors_after))
        assert not torch.is_autocast_enabled("cpu") and not Path("nowhere").exists()
        assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
        learn.fit_one_cycle(1, 0.1)


def test_train_in_a_thread_leaves_signals_alone(tiny, tmp_path):
    """Only the main thread may set handlers: elsewhere, as under a server, a run goes without."""
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: tiny.train(tmp_path / "run", epochs=1))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "metrics.json").exists() and signal.getsignal(signal.SIGINT) is before
