"""Runs of two processes: one of them prints and writes, what ends one ends both, and either number can go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch.distributed as dist
from accelerate import debug_launcher
from test_faults import one_line
from tiny_recipe import RECIPE
from tiny_runs import FILES, assert_same_folders, history, metrics, wait_for

from cifar_fastai.files import read_json
from cifar_fastai.runs.run import load_run
from cifar_fastai.runs.train import train
from cifar_fastai.training.checkpoint import load_checkpoint


def start_two(recipes, args, cwd, at=(None, None)):
    """The processes of a run as torchrun starts them, which keeps their store; each acts at its own point."""
    recipes.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=recipes.store.port, TORCHELASTIC_USE_AGENT_STORE=True)
    shared = agent | dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS=1)
    ranks = [dict(RANK=k, LOCAL_RANK=k) for k in range(2)]
    return [recipes.start(args, cwd, at=at[k], environment=shared | ranks[k]) for k in range(2)]


def train_two(recipes, out, *more, **options):
    (out.parent).mkdir(exist_ok=True)
    return [p.wait(60) for p in start_two(recipes, recipes.arguments("--out", out, *more), out.parent, **options)]


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """A run of two processes that nothing happened to: its folder and the processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, train_two(recipes, out)


def test_the_first_prints_and_writes(whole):
    out, (first, second) = whole
    assert (first.code, first.err, second.code, second.err, second.out) == (0, "", 0, "", "")
    assert "steps of 8, 2 processes x 4, batch norm over all;" in first.out
    assert {path.name for path in out.iterdir()} >= {"metrics.json", "model.pth", "predictions.csv", "history.csv"}
    assert read_json(out / "config.json")["hardware"].endswith(", 2 processes")
    assert float(history(out)[-1]["valid_accuracy"]) == pytest.approx(metrics(out)["test_accuracy"])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_is_killed_and_two_go_on(recipes, whole, tmp_path, victim):
    out, at = tmp_path / "run", [None, None]
    at[victim] = "step 8 KILL"
    start = time.monotonic()
    processes = train_two(recipes, out, at=at)
    assert processes[victim].code == -signal.SIGKILL and processes[1 - victim].code == 1
    assert time.monotonic() - start < 30  # seconds, of which a run of one epoch takes most
    line = one_line(processes[1 - victim])
    assert line.startswith("error: RuntimeError: another process has ended (the traceback")
    assert line.endswith(f"; go on with: torchrun --nproc_per_node 2 {RECIPE} --resume {out}")
    first, second = (p.wait(60) for p in start_two(recipes, ["--resume", out], tmp_path))
    assert (first.code, first.err, second.out, second.err) == (0, "", "", "") and "may differ" not in first.out
    assert_same_folders(whole[0], out)


def test_a_signal_to_one_ends_both_and_one_goes_on(recipes, tmp_path):
    out = tmp_path / "run"
    first, second = train_two(recipes, out, at=[None, "step 8 TERM"])
    assert (first.code, second.code) == (1, 143) and first.err == ""
    assert one_line(second).startswith("stopped; go on with: torchrun")
    process = recipes.resume(out)
    assert (process.code, process.err) == (0, "") and len(history(out)) == 3
    assert ", 2 processes then, " in process.out and "the last digits may differ" in process.out


def test_a_batch_that_does_not_divide_is_refused_once(recipes, tmp_path):
    processes = train_two(recipes, tmp_path / "run", "--bs", 9)
    (text,) = [process.err for process in processes if process.err]
    assert text == "error: --bs 9: must be a multiple of 2, the number of processes\n"
    assert not (tmp_path / "run").exists()


def test_a_notebook_starts_them(tiny, tmp_path):
    out = str(tmp_path / "run")
    debug_launcher(partial(train, "resnet18", data=str(tiny.data), bs=8, out=out))
    learn, config = load_run(out)
    assert config["hardware"].endswith("2 processes") and len(learn.history.rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sync-bn", "no", "--ema", 0.9, "--opt", "muon"]], ids=str)
def test_variants_go_on_to_the_digit(recipes, tmp_path, more):
    out, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert [p.code for p in train_two(recipes, out, *more)] == [0, 0]
    train_two(recipes, other, *more, at=[None, "step 14 KILL"])
    assert load_checkpoint(other / "checkpoint.pth")["epoch"] == 2
    assert [p.wait(60).code for p in start_two(recipes, ["--resume", other], other.parent)] == [0, 0]
    assert_same_folders(out, other)


def torchrun(cwd, *words, start=("--nproc_per_node", 2)):
    command = [sys.executable, "-m", "torch.distributed.run", *start, RECIPE, *words]
    environment = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    return subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_torchrun_trains_the_real_recipe(tmp_path):
    flags = f"--data digits --width 16 --subset 200 --bs 20 --device cpu --epochs 3 --out {tmp_path / 'run'}".split()
    out, err = torchrun(tmp_path, *flags).communicate(timeout=600)
    assert "error" not in err and out.count("2 processes x 10, batch norm over all") == 1
    assert len(history(tmp_path / "run")) == 3 and {path.name for path in (tmp_path / "run").iterdir()} == FILES


@pytest.mark.slow
def test_two_machines_meet(tmp_path):
    """Two agents of torchrun, here on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    start = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    flags = f"--data digits --width 16 --subset 100 --bs 20 --device cpu --epochs 1 --out {tmp_path / 'run'}".split()
    processes = [torchrun(tmp_path, *flags, "--no-explain", start=start) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(text.count("2 processes x 10") for text in texts) == [0, 1] and len(history(tmp_path / "run")) == 1


@pytest.mark.slow
def test_ctrl_c_in_torchrun_ends_all(tmp_path):
    out = tmp_path / "run"
    process = torchrun(tmp_path, *f"--data digits --width 16 --bs 20 --device cpu --epochs 9 --out {out}".split())
    wait_for((out / "checkpoint.pth").exists, 300)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert err.count(f"stopped; go on with: torchrun --nproc_per_node 2 {RECIPE} --resume {out}") == 1
