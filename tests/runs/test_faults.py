"""What a run does when it is stopped, when the disk fails, when the loss or the memory run out, and beside others."""

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

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from tiny_recipe import TinyNet
from tiny_runs import assert_same_state, history, metrics, same, wait_for

from cifar_fastai import cli, files
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import RunError
from cifar_fastai.training import checkpoint
from cifar_fastai.training.callbacks import WeightAverage
from cifar_fastai.training.checkpoint import load_checkpoint, random_states
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test


def arguments(data, out=None, *more):
    out = () if out is None else ("--out", out)
    return ["--data", data, *out, "--epochs", 3, "--bs", 8, "--lr", 0.15, "--cutout", 8, *more]


@pytest.fixture(scope="module")
def whole(recipes, tiny_folder, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    cwd = tmp_path_factory.mktemp("whole")
    process = recipes.run(arguments(tiny_folder, cwd / "run"), cwd, TINY_QUICK=1, TINY_KEEP=cwd / "last.pth")
    assert process.code == 0, process.err
    return cwd / "run"


def one_line(process):
    """The only line on stderr."""
    lines = process.err.strip().splitlines()
    assert len(lines) == 1, process.err
    return lines[0]


def resumed(recipes, out, whole):
    """Resume the run in `out`, which then equals the `whole` one."""
    process = recipes.run(["--resume", out], out.parent, TINY_QUICK=1, TINY_KEEP=out.parent / "last.pth")
    assert process.code == 0 and not process.err, process.err
    assert history(out) == history(whole) and metrics(out) == metrics(whole)
    assert_same_state(*(load_checkpoint(folder.parent / "last.pth") for folder in (out, whole)))


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, epoch, name, code",
    [
        ("step 8", 1, "INT", 130),
        ("step 8", 1, "TERM", 143),
        ("validate 2", 1, "TERM", 143),
        ("history 2", 2, "INT", 130),
        ("checkpoint 2", 2, "TERM", 143),
        ("writing 2", 2, "INT", 130),
        ("writing 3", 3, "TERM", 143),
        ("results 1", 3, "TERM", 143),
        ("export 1", 3, "INT", 130),
        ("metrics 1", 3, "TERM", 143),
    ],
)
def test_a_signal_ends_the_step_and_tells_how_to_go_on(recipes, whole, tiny_folder, tmp_path, where, epoch, name, code):
    out = tmp_path / "run"
    process = recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT=f"{where} {name}", TINY_QUICK=1)
    assert process.code == code
    assert process.err.splitlines()[-1] == f"stopped; go on with: {going_on(out)}"
    assert "Traceback" not in process.err and not list(out.glob(".*"))
    assert load_checkpoint(out / "checkpoint.pth")["epoch"] == epoch
    resumed(recipes, out, whole)


def going_on(out):
    recipe = Path(__file__).parents[2] / "recipes" / "resnet18.py"
    return f"python {recipe} --resume {out}"


@pytest.mark.parametrize("name, code", [("INT", 130), ("TERM", 143)])
@pytest.mark.parametrize("where, left", [("data 1", None), ("folder 1", None), ("step 2", ["config.json"])])
def test_a_signal_before_the_first_epoch_is_over(recipes, tiny_folder, tmp_path, where, left, name, code):
    out = tmp_path / "run"
    process = recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT=f"{where} {name}", TINY_QUICK=1)
    assert process.code == code and process.err.splitlines()[-1] == "stopped"
    assert (sorted(os.listdir(out)) if out.exists() else None) == left


def test_a_signal_in_the_range_test(recipes, tiny_folder, tmp_path):
    args = [*arguments(tiny_folder, tmp_path / "run"), "--lr", "find"]
    process = recipes.run(args, tmp_path, TINY_AT="step 30 INT", TINY_QUICK=1)
    assert (process.code, process.err.split()) == (130, ["stopped"])
    assert os.listdir(tmp_path / "run") == ["config.json"] and os.listdir(tmp_path) == ["run"]


def test_a_signal_while_a_resumed_run_reads_its_data(recipes, whole, tiny_folder, tmp_path):
    out = tmp_path / "run"
    recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT="step 8 TERM", TINY_QUICK=1)
    process = recipes.run(["--resume", out], tmp_path, TINY_AT="data 1 INT")
    assert (process.code, one_line(process)) == (130, f"stopped; go on with: {going_on(out)}")
    resumed(recipes, out, whole)


@pytest.mark.parametrize("where", ["step 8", "writing 2", "export 1"])
def test_a_second_signal_ends_at_once(recipes, whole, tiny_folder, tmp_path, where):
    """Within the step, within the writing of a checkpoint, whose old one stays, and among the results."""
    out = tmp_path / "run"
    process = recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT=f"{where} TWICE", TINY_QUICK=1)
    assert process.code == 130 and "Traceback" not in process.err
    assert load_checkpoint(out / "checkpoint.pth")["epoch"] == (3 if where == "export 1" else 1)
    resumed(recipes, out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("INT", 130), ("TERM", 143)])
@pytest.mark.parametrize("seed", range(4))
def test_signals_at_random_moments(recipes, whole, tiny_folder, tmp_path, name, code, seed):
    """From outside, at any time after the start, with pictures and page."""
    out, moments = tmp_path / "run", random.Random(seed)
    process = recipes.start(arguments(tiny_folder, out), tmp_path)
    for _ in range(4):
        wait_for(lambda process=process: "files:" in process.out)  # it has begun
        time.sleep(moments.uniform(0, 1.5))
        process.kill(name)
        if process.wait() == 0:
            break
        assert process.code == code and "Traceback" not in process.err, process.err
        if not (out / "checkpoint.pth").exists():
            assert process.err.splitlines()[-1] == "stopped"
            shutil.rmtree(out)
            process = recipes.start(arguments(tiny_folder, out), tmp_path)
        else:
            assert process.err.splitlines()[-1] == f"stopped; go on with: {going_on(out)}"
            process = recipes.start(["--resume", out], tmp_path)
    if process.code != 0:
        assert process.wait() == 0, process.err
    assert history(out) == history(whole) and metrics(out) == metrics(whole) and (out / "report.html").exists()


@pytest.mark.slow
def test_a_recipe_as_a_user_starts_it(tiny_folder, tmp_path):
    """`python recipes/resnet18.py`, ended by Ctrl-C before its first epoch is over."""
    recipe = Path(__file__).parents[2] / "recipes" / "resnet18.py"
    process = subprocess.Popen(
        [sys.executable, recipe, "--data", "digits", "--epochs", "50"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped" and "Traceback" not in err


# The disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB of its own; skipped where it cannot be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("only root can mount a disk; test_a_full_disk_... stands for it")
    yield path
    subprocess.run(["umount", path], check=True)


WRITES = {
    "history 2": "history.csv",
    "checkpoint 2": "checkpoint.pth",
    "results 1": "predictions.csv",
    "export 1": "learner.pkl",
    "metrics 1": "metrics.json",
    "tensorboard 2": "",
}


@pytest.mark.parametrize("where", WRITES)
def test_a_full_disk_ends_in_one_line(recipes, whole, tiny_folder, disk, where):
    out, more = disk / "run", ("--tensorboard",) if where.startswith("tensorboard") else ()
    env = dict(TINY_AT=f"{where} FILL", TINY_DISK=disk, TINY_QUICK=1)
    process = recipes.run(arguments(tiny_folder, out, *more), disk, **env)
    line = one_line(process)
    assert process.code == 1 and line.startswith(f"error: {out / WRITES[where]}")
    assert re.search("No space left on device|is the disk full", line) and line.endswith(f"go on with: {going_on(out)}")
    assert load_checkpoint(out / "checkpoint.pth")["epoch"] in (1, 3) and not list(out.glob(".*"))
    (disk / "filler").unlink()
    resumed(recipes, out, whole)


@pytest.mark.parametrize("where", ["checkpoint 2", "metrics 1", "tensorboard 2"])
def test_a_disk_that_becomes_read_only(recipes, whole, tiny_folder, disk, where):
    out, more = disk / "run", ("--tensorboard",) if where.startswith("tensorboard") else ()
    env = dict(TINY_AT=f"{where} READONLY", TINY_DISK=disk, TINY_QUICK=1)
    process = recipes.run(arguments(tiny_folder, out, *more), disk, **env)
    assert process.code == 1 and one_line(process).startswith(f"error: {out}/")
    assert one_line(process).endswith(f"Read-only file system; go on with: {going_on(out)}")
    for new, why in (
        (disk / "new", "cannot be made (Read-only file system)"),
        (disk, "cannot be written to; give another folder"),
    ):
        refused = recipes.run(arguments(tiny_folder, new), disk)
        assert refused.code == 2 and one_line(refused) == f"error: --out {new}: {why}"
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    resumed(recipes, out, whole)


def test_a_file_that_may_not_grow(recipes, tiny_folder, tmp_path):
    """A limit by the system instead of a full disk, for those who cannot mount one."""
    process = recipes.run(arguments(tiny_folder, tmp_path / "run"), tmp_path, TINY_LIMIT=5000, TINY_QUICK=1)
    assert process.code == 1 and one_line(process) == f"error: {tmp_path / 'run' / 'checkpoint.pth'}: File too large"
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "history.csv"]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_any_write_may_fail(tiny, tmp_path, monkeypatch, capsys, number):
    """The n-th file that a run writes cannot be: one line, no half file, and what is there goes on to the same end."""
    tiny.train(tmp_path / "whole", epochs=2)
    count, fsync = [0], os.fsync

    def failing(handle):
        count[0] += 1
        if count[0] == number:
            raise OSError(28, "No space left on device")
        fsync(handle)

    out = tmp_path / "run"
    monkeypatch.setattr(files.os, "fsync", failing)
    capsys.readouterr()
    assert cli._run(lambda: tiny.train(out, epochs=2), {}) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: {out}/[a-z.]+: No space left on device(; go on with: .*)?\n", err)
    assert not list(out.glob(".*"))
    if (out / "checkpoint.pth").exists():
        assert "go on with" in err
        tiny.resume(out)
    else:
        assert "go on with" not in err
        tiny.train(out, epochs=2)
    assert history(out) == history(tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")


def test_an_output_folder_that_vanishes(recipes, tiny_folder, tmp_path):
    out = tmp_path / "run"
    process = recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT="checkpoint 2 VANISH", TINY_DISK=out)
    assert process.code == 1 and one_line(process) == f"error: {out / 'checkpoint.pth'}: No such file or directory"
    assert not out.exists(), "it is not made again behind the user's back"


def test_output_that_cannot_be_printed(recipes, tiny_folder, tmp_path):
    process = recipes.start(arguments(tiny_folder, tmp_path / "run"), tmp_path, TINY_QUICK=1, stdout="/dev/full")
    process.wait()
    assert process.code == 1 and one_line(process) == "error: No space left on device"


def test_a_cache_that_is_deleted_during_the_run(recipes, whole, tiny_folder, tmp_path):
    env = dict(CIFAR_FASTAI_CACHE=tmp_path / "cache", TINY_QUICK=1)
    process = recipes.run(arguments(tiny_folder, tmp_path / "run"), tmp_path, TINY_AT="step 8 UNCACHE", **env)
    assert process.code == 0 and not process.err
    assert not (tmp_path / "cache").exists() and history(tmp_path / "run") == history(whole)


@pytest.mark.parametrize("kind", ["file", "below a file", "empty"])
def test_an_output_folder_that_cannot_be(recipes, tiny_folder, tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "empty": ""}[kind]
    process = recipes.run(arguments(tiny_folder, out), tmp_path)
    assert process.code == 2 and one_line(process).startswith("error: --out ")
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


# The loss and the memory ----------------------------------------------------------------------------------------------


def failing_net(monkeypatch, act, training=True, first=1):
    """Let the tiny network call `act(logits)` from its `first` pass in training (evaluation) on."""
    forward, passes = TinyNet.forward, [0]

    def failing(self, x):
        out = forward(self, x)
        passes[0] += self.training == training
        return act(out) if self.training == training and passes[0] >= first else out

    monkeypatch.setattr(TinyNet, "forward", failing)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step, said", [(1, "step 1 of epoch 1"), (9, "step 3 of epoch 2"), (12, "step 6 of epoch 2")])
def test_a_loss_that_is_no_number(tiny, tmp_path, monkeypatch, capsys, step, said, value):
    failing_net(monkeypatch, lambda out: out * value, first=step)
    assert cli._run(lambda: tiny.train(tmp_path / "run", sched="none", lr=0.125), {}) == 1
    hint = "try a lower --lr, --clip 1 or --precision fp32"
    assert capsys.readouterr().err == f"error: the loss is not a number since {said} (lr 0.125); {hint}\n"
    kept = [path.name for path in (tmp_path / "run").iterdir()]
    assert sorted(kept) == (["config.json"] if step == 1 else ["checkpoint.pth", "config.json", "history.csv"])
    if step > 1:
        assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 1


def test_an_evaluation_that_is_no_number(tiny, tmp_path, monkeypatch):
    failing_net(monkeypatch, lambda out: out * float("nan"), training=False, first=2)
    with pytest.raises(RunError, match=r"the loss on the evaluated images is not a number after epoch 2 \(lr 0.1"):
        tiny.train(tmp_path / "run", sched="none")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 1


def test_a_run_that_diverges(recipes, tiny_folder, tmp_path):
    """Not simulated: a weight decay and a learning rate that blow the weights up."""
    more = ("--lr", 100, "--wd", 1, "--sched", "none", "--epochs", 20)
    process = recipes.run(arguments(tiny_folder, tmp_path / "run", *more), tmp_path, TINY_QUICK=1)
    assert process.code == 1
    line = r"error: the loss is not a number since step \d of epoch \d+ \(lr 100\); try a lower --lr, .*"
    assert re.fullmatch(line, one_line(process))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
        MemoryError("Unable to allocate 2.00 GiB"),
    ],
)
@pytest.mark.parametrize(
    "limit, hint", [(2, "try --bs 2, which fits"), (0, "not even one image fits, try --device cpu")]
)
def test_out_of_memory_says_what_fits(tiny, tmp_path, monkeypatch, capsys, error, limit, hint):
    def act(out):
        if len(out) > limit:
            raise error
        return out

    failing_net(monkeypatch, act)
    assert cli._run(lambda: tiny.train(tmp_path / "run"), {}) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: --bs 8: too large for the memory of .*; (.*)\n", err)[1] == hint


def test_other_errors_are_not_taken_for_it(tiny, tmp_path, monkeypatch, capsys):
    def act(out):
        raise RuntimeError("size mismatch\nand more of it")

    failing_net(monkeypatch, act)
    assert cli._run(lambda: tiny.train(tmp_path / "run"), {}) == 1
    assert capsys.readouterr().err == "error: RuntimeError: size mismatch (the traceback: --debug)\n"
    with pytest.raises(RuntimeError):
        cli._run(lambda **given: tiny.train(tmp_path / "run"), {"debug": True})


def test_an_error_in_a_callback_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "digest", lambda value: 1 / 0)
    assert cli._run(lambda: tiny.train(tmp_path / "run"), {}) == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: division by zero (the traceback: --debug)\n"


# Side by side ---------------------------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second(recipes, whole, tiny_folder, tmp_path):
    env = dict(TINY_SECOND="20260102-030405", TINY_QUICK=1)
    started = [recipes.start(arguments(tiny_folder), tmp_path, **env) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    names = [f"resnet18-20260102-030405{n}" for n in ("", "-2", "-3")]
    assert sorted(os.listdir(tmp_path / "runs")) == names
    assert all(history(tmp_path / "runs" / name) == history(whole) for name in names)


def test_two_runs_into_the_same_folder(recipes, whole, tiny_folder, tmp_path):
    out, ready = tmp_path / "run", tmp_path / "ready"
    env = dict(TINY_AT="step 1 WAIT", TINY_READY=ready, TINY_QUICK=1)
    first = recipes.start(arguments(tiny_folder, out), tmp_path, **env)
    wait_for(ready.exists)
    second = recipes.run(arguments(tiny_folder, out), tmp_path)
    assert second.code == 2
    assert one_line(second) == f"error: --out {out}: another run is going on there; give another folder"
    ready.unlink()
    assert first.wait() == 0 and history(out) == history(whole)


def test_a_run_is_not_resumed_twice(recipes, whole, tiny_folder, tmp_path):
    out, ready = tmp_path / "run", tmp_path / "ready"
    recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT="step 8 KILL", TINY_QUICK=1)
    first = recipes.start(["--resume", out], tmp_path, TINY_AT="step 1 WAIT", TINY_READY=ready, TINY_QUICK=1)
    wait_for(ready.exists)
    second = recipes.run(["--resume", out], tmp_path)
    assert second.code == 2 and one_line(second) == f"error: --resume {out}: this run is going on, in another process"
    first.kill()
    assert first.wait() == -signal.SIGKILL
    resumed(recipes, out, whole)


def test_runs_that_share_a_cache_which_is_rebuilt(recipes, whole, tiny_folder, tmp_path):
    """Four runs start at once without a cache, which is deleted again and again meanwhile."""
    cache, done = tmp_path / "cache", threading.Event()

    def delete():
        while not done.wait(0.01):
            shutil.rmtree(cache, ignore_errors=True)

    deleting = threading.Thread(target=delete)
    deleting.start()
    try:
        env = dict(CIFAR_FASTAI_CACHE=cache, TINY_QUICK=1)
        started = [recipes.start(arguments(tiny_folder, tmp_path / f"{n}"), tmp_path, **env) for n in range(4)]
        codes = [process.wait() for process in started]
    finally:
        done.set()
        deleting.join()
    assert codes == [0] * 4, "".join(process.err for process in started)
    assert all(history(tmp_path / f"{n}") == history(whole) for n in range(4))


# The range test, interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["to its end", "interrupted", "failing"])
def test_a_range_test_leaves_no_trace(tiny_images, monkeypatch, how):
    from fastai.callback.mixup import MixUp

    class Interrupt(Callback):
        order = 200

        def after_pred(self):
            if how != "to its end" and self.training and self.train_iter == 7:
                raise KeyboardInterrupt if how == "interrupted" else ValueError("no")

    torch.manual_seed(0)
    dls = cifar_dls(tiny_images, bs=8, device="cpu")
    learn = cifar_learner(dls, TinyNet(3), precision="bf16", cbs=[MixUp(0.4), WeightAverage(0.9)])
    learn.remove_cb(learn.progress)
    with learn.no_logging():
        learn.fit_one_cycle(1, 0.1)
    monkeypatch.setattr(dls, "path", Path("nowhere"), raising=False)
    weights = {name: value.clone() for name, value in learn.model.state_dict().items()}
    before = [learn.opt.opt.state_dict(), random_states(dls), learn.loss_func, learn.model_dir, learn.model.training]
    before = [checkpoint.plain(part) if isinstance(part, dict) else part for part in before]
    callbacks = list(learn.cbs)
    learn.add_cb(interrupt := Interrupt())
    try:
        range_test(learn, num_it=40)
        assert how == "to its end"
    except (KeyboardInterrupt, ValueError):
        assert how != "to its end"
    learn.remove_cb(interrupt)
    assert same(weights, dict(learn.model.state_dict()))
    after = [learn.opt.opt.state_dict(), random_states(dls), learn.loss_func, learn.model_dir, learn.model.training]
    assert same(before[0], after[0]) and same(before[1], after[1]) and before[2:] == after[2:]
    assert set(learn.cbs) == set(callbacks) and not torch.is_autocast_enabled("cpu")
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert not Path("nowhere").exists()
    with learn.no_logging():
        learn.fit_one_cycle(1, 0.1)
    assert np.isfinite(learn.recorder.losses[-1])


def test_train_in_a_thread_leaves_signals_alone(tiny, tmp_path):
    """Only the main thread may set handlers: elsewhere, as under a server, a run goes without."""
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: tiny.train(tmp_path / "run", epochs=1))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "metrics.json").exists() and signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back(tiny, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    tiny.train(tmp_path / "one", epochs=1)
    tiny.train(tmp_path / "two", stop=("step", 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
