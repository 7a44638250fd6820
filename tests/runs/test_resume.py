"""A run that was interrupted and resumed is the run that was not: the same history, weights, momenta and metrics."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Planted, assert_same_state, history, metrics, same, wait_for

from cifar_fastai.config import Recipe
from cifar_fastai.errors import InputError
from cifar_fastai.files import lock_folder
from cifar_fastai.runs import folder as runs
from cifar_fastai.runs.train import train
from cifar_fastai.training.checkpoint import load_checkpoint
from cifar_fastai.training.history import read_history
from cifar_fastai.training.precision import ScaledStep

RECIPE = Path(__file__).parents[2] / "recipes" / "resnet18.py"
STEPS = 6  # an epoch, of 48 images


def assert_same_run(one, other):
    assert history(one.folder) == history(other.folder)
    assert metrics(one.folder) == metrics(other.folder)
    assert_same_state(one.last, other.last)
    assert same(dict(one.learn.model.state_dict()), dict(other.learn.model.state_dict()))
    for name in ("model.pth", "best.pth"):
        files = [run.folder / name for run in (one, other) if (run.folder / name).exists()]
        assert len(files) != 1
        if files:
            assert same(*(dict(torch.load(path, weights_only=True)) for path in files))
    assert (one.folder / "predictions.csv").read_bytes() == (other.folder / "predictions.csv").read_bytes()


VARIANTS = {
    "one cycle": {},
    "linear": dict(anneal="linear", peak_epoch=1.5),
    "cycled momentum": dict(mom_min=0.85),
    "flat-cos": dict(sched="flat-cos", pct_start=0.5),
    "step": dict(sched="step", step_size=1, gamma=0.5),
    "plateau": dict(sched="plateau", plateau_patience=0, gamma=0.5, valid_pct=0.25, epochs=5),
    "constant": dict(sched="none"),
    "lr find": dict(lr="find", lr_suggest="steep"),
    "mixup": dict(mixup=0.4),
    "cutmix": dict(cutmix=1.0),
    "ema": dict(ema=0.9),
    "ema, mixup": dict(ema=0.9, mixup=0.2),
    "save best": dict(valid_pct=0.25, save_best=True, epochs=4),
    "patience": dict(valid_pct=0.25, save_best=True, patience=1, epochs=8, sched="none"),
    "penalties": dict(l1=1e-4, clip=0.5, label_smoothing=0.1),
    "clip value": dict(clip_value=0.01),
    "all augmentations": dict(max_holes=3, cutout_p=0.5, rotate=15.0, vflip=0.5, pad_mode="reflect"),
    "alternating flip": dict(flip_by="epoch"),
    "subset": dict(subset=40, wd_bn_bias="yes"),
    "bf16": dict(precision="bf16"),
    "tensorboard": dict(tensorboard=True),
}
VARIANTS |= {
    opt: dict(opt=opt, lr=0.01)
    for opt in ("muon", "adam", "adamw", "rmsprop", "radam", "qhadam", "larc", "lamb", "ranger")
}
SLOW = {"linear", "constant", "penalties", "clip value", "subset", "adamw", "rmsprop", "radam", "qhadam", "larc"}


@pytest.mark.parametrize(
    "given",
    [pytest.param(given, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, given in VARIANTS.items()],
)
def test_stopped_within_an_epoch_and_before_the_results(tiny, tmp_path, given):
    whole = tiny.train(tmp_path / "whole", **given)
    out = tmp_path / "parts"
    point = "history" if given.get("lr") == "find" else "validate"  # a range test validates, too
    assert tiny.train(out, stop=(point, 2), **given) is None
    assert len(history(out)) == load_checkpoint(out / "checkpoint.pth")["epoch"] == (2 if point == "history" else 1)
    assert tiny.resume(out, stop=("results", 1)) is None
    assert (out / "checkpoint.pth").exists() and not (out / "metrics.json").exists()
    parts = tiny.resume(out)
    assert_same_run(whole, parts)
    assert len(parts.log.lrs) == len(history(out)) * len(whole.learn.dls.train)
    assert not (out / "checkpoint.pth").exists()


def test_the_gradient_scaler_goes_on_too(tiny, tmp_path, monkeypatch):
    """float16's, which only a GPU needs, works on a CPU as well."""
    callbacks = runs._callbacks
    monkeypatch.setattr(runs, "_callbacks", lambda cfg: [*callbacks(cfg), ScaledStep()])
    whole = tiny.train(tmp_path / "whole")
    tiny.train(tmp_path / "parts", stop=("validate", 2))
    parts = tiny.resume(tmp_path / "parts")
    assert_same_run(whole, parts)
    assert parts.last["callbacks"]["scaler"]["_growth_tracker"] == 3 * STEPS


# What --resume takes and refuses -------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny, tmp_path):
    """The folder of a run that was stopped in its second epoch."""
    tiny.train(tmp_path / "run", stop=("validate", 2), lr="0.15", seed=0, precision="fp32")
    return tmp_path / "run"


def refusal(tiny, folder, **given):
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    with pytest.raises(InputError) as caught:
        tiny.resume(folder, **given)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before, "nothing is written"
    return str(caught.value)


@pytest.mark.parametrize(
    "given, difference",
    [
        (dict(lr="0.2"), "--lr 0.2: this run has lr 0.15"),
        (dict(lr="find"), "--lr find: this run has lr 0.15"),
        (dict(epochs=30), "--epochs 30: this run has epochs 3"),
        (dict(cutout=0), "--cutout 0: this run has cutout 8"),
        (dict(seed=1), "--seed 1: this run has seed 0"),
        (dict(valid_pct=0.1), "--valid-pct 0.1: this run has valid-pct "),
        (dict(no_test=True), "--no-test True: this run has no-test False"),
        (dict(out="elsewhere"), "--out elsewhere: "),
        (dict(data="digits"), "--data digits: this run has data /"),
        (dict(precision="bf16"), "--precision bf16: this"),
        (dict(preset="amitkml"), "--preset amitkml: this run has preset None"),
    ],
)
def test_a_parameter_that_differs_is_refused(tiny, stopped, given, difference):
    message = refusal(tiny, stopped, **given)
    assert message.startswith(difference) and message.endswith("beside --resume only --device may be given")
    assert "\n" not in message


def test_the_same_parameters_and_a_device_may_be_given(tiny, stopped, tiny_folder):
    given = dict(lr="0.150", bs=8, seed=0, data=str(tiny_folder) + "/.", out=str(stopped), device="auto", debug=False)
    assert tiny.resume(stopped, **given).folder == stopped


def test_a_found_learning_rate_is_kept(tiny, tmp_path):
    tiny.train(tmp_path / "run", stop=("history", 1), lr="find")
    lr = json.loads((tmp_path / "run" / "config.json").read_text())["parameters"]["lr"]
    run = tiny.resume(tmp_path / "run", lr="find")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run.cfg.lr == config["parameters"]["lr"] == lr and config["lr_find"]["valley"] == lr
    assert config["given"]["lr"] == "find"


def test_images_that_changed_are_refused(tiny, tiny_folder, tmp_path):
    data = shutil.copytree(tiny_folder, tmp_path / "data")
    tiny.data = data
    tiny.train(tmp_path / "run", stop=("validate", 2))
    picture = next((data / "train" / "red").iterdir())
    pixels = np.array(Image.open(picture))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(picture)
    message = refusal(tiny, tmp_path / "run")
    assert message == f"{data}: the images have changed since the run began; it needs the same ones"


def test_what_cannot_go_on_says_why(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named, message in (("nowhere", "--resume nowhere: no such folder"), ("latest", "--resume latest: no ")):
        with pytest.raises(InputError, match=f"^{message}"):
            tiny.resume(named)
    tiny.train(tmp_path / "run", epochs=1)
    assert refusal(tiny, tmp_path / "run") == f"--resume {tmp_path / 'run'}: this run is finished"
    (tmp_path / "run" / "metrics.json").unlink()
    assert refusal(tiny, tmp_path / "run").endswith("holds no checkpoint.pth; no epoch was finished, start it anew")


def test_another_recipes_run_is_refused(stopped):
    with pytest.raises(InputError, match="a run of resnet18, not of resnet34; go on with it by recipes/resnet18.py"):
        train(Recipe("resnet34"), dict(resume=str(stopped)))


def test_latest_is_the_newest_interrupted_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "runs" / name for name in ("oldest", "newer", "newest", "finished", "without")]
    for k, folder in enumerate(folders[:4]):
        tiny.train(folder, stop=None if folder.name == "finished" else ("history", 1), epochs=2)
        if folder.name != "finished":
            os.utime(folder / "checkpoint.pth", (1e9 + k, 1e9 + k))
    folders[4].mkdir()
    with lock_folder(folders[2]) as free:
        assert free
        assert tiny.resume("latest").folder.name == "newer", "the newest is going on just now"
    assert tiny.resume("latest").folder.name == "newest"
    assert tiny.resume("latest").folder.name == "oldest"
    with pytest.raises(InputError, match="no interrupted run"):
        tiny.resume("latest")


def test_a_run_that_goes_on_elsewhere_is_refused(tiny, stopped):
    with lock_folder(stopped):
        assert refusal(tiny, stopped) == f"--resume {stopped}: this run is going on, in another process"
    fresh = stopped.parent / "fresh"
    fresh.mkdir()
    with lock_folder(fresh), pytest.raises(InputError, match="another run is going on there"):
        tiny.train(fresh)
    assert not list(fresh.iterdir())


def test_leftovers_of_a_kill_are_put_right(tiny, stopped):
    (stopped / ".checkpoint.pth.abc.tmp").write_bytes(b"half of it")
    with open(stopped / "history.csv", "a") as file:  # killed between the row and the checkpoint
        file.write("2,9,9,9,9,9,9,9\r\n")
    (stopped / "config.json").unlink()
    run = tiny.resume(stopped)
    assert not list(stopped.glob(".*"))
    assert [row["epoch"] for row in history(stopped)] == ["1", "2", "3"] and history(stopped)[1]["lr"] != "9"
    assert json.loads((stopped / "config.json").read_text())["parameters"]["epochs"] == run.cfg.epochs


def test_a_folder_without_a_finished_epoch_is_used_again(tiny, tmp_path):
    assert tiny.train(tmp_path / "run", stop=("step", 3)) is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]
    run = tiny.train(tmp_path / "run", epochs=1)
    for folder in (run.folder, tiny.train(tmp_path / "two", stop=("history", 1)) or tmp_path / "two"):
        with pytest.raises(InputError, match="holds a (finished )?run"):
            tiny.train(folder)


def test_tensorboard_counts_on(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(folder):
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.endswith(("images_per_second", "seconds"))
        }

    for n, given in enumerate((dict(epochs=3), dict(epochs=4, bs=48))):  # 6 steps an epoch, and a single one
        whole, parts = tmp_path / f"whole{n}", tmp_path / f"parts{n}"
        tiny.train(whole, tensorboard=True, **given)
        tiny.train(parts, stop=("history", 2), tensorboard=True, **given)
        saved = (parts / "checkpoint.pth").read_bytes()
        time.sleep(1.1)  # TensorBoard reads its files in the order of their names, which hold the second
        tiny.resume(parts, stop=("history", 2))  # as if killed when TensorBoard had an epoch's numbers, ...
        (parts / "checkpoint.pth").write_bytes(saved)  # ... and the checkpoint did not
        time.sleep(1.1)
        tiny.resume(parts)
        assert scalars(whole) == scalars(parts)
        steps = given["epochs"] * (1 if n else STEPS)
        assert [step for step, _ in scalars(parts)["step/loss"]] == list(range(steps))
        assert len(scalars(parts)["epoch/valid_loss"]) == given["epochs"]


# Killed: a real process, SIGKILL --------------------------------------------------------------------------------------


def arguments(data, out, *more):
    return ["--data", data, "--out", out, "--epochs", 3, "--bs", 8, "--lr", 0.15, "--cutout", 8, *more]


@pytest.fixture(scope="module")
def whole(recipes, tiny_folder, tmp_path_factory):
    """`whole(*more)`: the folder of a run that nothing happened to, with these flags, and its last checkpoint."""
    made = {}

    def run(*more, quick=True):
        if (more, quick) not in made:
            cwd = tmp_path_factory.mktemp("whole")
            env = dict(TINY_QUICK=1) if quick else {}
            process = recipes.run(arguments(tiny_folder, cwd / "run", *more), cwd, TINY_KEEP=cwd / "last.pth", **env)
            assert process.code == 0, process.err
            made[more, quick] = cwd / "run"
        return made[more, quick]

    return run


def assert_same_folders(one, other):
    """Two finished runs: what test_stopped_... compares in memory, from their files."""
    assert history(one) == history(other) and metrics(one) == metrics(other)
    assert_same_state(*(load_checkpoint(folder.parent / "last.pth") for folder in (one, other)))
    names = [{path.name for path in folder.rglob("*") if "tfevents" not in path.name} for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0] - {"config.json", "history.csv", "metrics.json", "learner.pkl", "report.html", "tensorboard"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


KILLED_AT = {
    "the first step of an epoch": "step 7",
    "within an epoch": "step 9",
    "its last step": "step 12",
    "evaluation": "validate 2",
    "before the history": "history 2",
    "between history and checkpoint": "checkpoint 2",
    "while the checkpoint is written": "writing 2",
    "while the last checkpoint is written": "writing 3",
    "between the last epoch and the results": "results 1",
    "while the learner is exported": "export 1",
    "while the numbers are written": "metrics 1",
    "before the page": "report 1",
}


@pytest.mark.parametrize("where", KILLED_AT.values(), ids=KILLED_AT)
def test_killed_and_resumed(recipes, whole, tiny_folder, tmp_path, where):
    env = dict(TINY_QUICK=1, TINY_KEEP=tmp_path / "last.pth")
    out = tmp_path / "run"
    killed = recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT=f"{where} KILL", **env)
    assert killed.code == -signal.SIGKILL
    assert load_checkpoint(out / "checkpoint.pth")["epoch"] in (1, 2, 3), "the last good one is whole"
    resumed = recipes.run(["--resume", out], tmp_path, **env)
    assert resumed.code == 0 and not resumed.err, resumed.err
    assert re.search(r"^going on with .* after epoch [123] of 3$", resumed.out, re.M)
    assert_same_folders(whole(), out)


def test_latest_and_refusals_on_the_command_line(recipes, tiny_folder, tmp_path):
    def run(*args, **env):
        process = recipes.run(args, tmp_path, TINY_QUICK=1, **env)
        assert process.code <= 0 or len(process.err.splitlines()) == 1, process.err
        return process.code, process.err.strip()

    args = arguments(tiny_folder, "runs/one")
    assert run(*args, TINY_AT="step 8 KILL")[0] == -signal.SIGKILL
    assert run("--resume", "latest", "--lr", 0.2) == (
        2,
        "error: --lr 0.2: this run has lr 0.15; beside --resume only --device may be given",
    )
    assert run(*args) == (2, "error: --out runs/one: holds a run already; give another folder, or --resume runs/one")
    assert run("--resume", "latest", "--device", "cpu", "--lr", "0.150") == (0, "")
    assert run("--resume", "latest") == (2, "error: --resume latest: no interrupted run under runs")
    assert run("--resume", "runs/one") == (2, "error: --resume runs/one: this run is finished")
    marker, checkpoint = tmp_path / "marker", tmp_path / "runs" / "one" / "checkpoint.pth"
    torch.save(Planted(os.system, f"touch {marker}"), checkpoint)
    code, line = run("--resume", "runs/one")
    assert code == 2 and line.endswith("as a checkpoint; it holds more than numbers, and might run code")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["picture 1", "picture 5", "report 1"])
def test_killed_among_the_pictures(recipes, whole, tiny_folder, tmp_path, where):
    env, out = dict(TINY_KEEP=tmp_path / "last.pth"), tmp_path / "run"
    assert recipes.run(arguments(tiny_folder, out), tmp_path, TINY_AT=f"{where} KILL", **env).code == -signal.SIGKILL
    assert recipes.run(["--resume", out], tmp_path, **env).code == 0
    assert_same_folders(whole(quick=False), out)
    assert (out / "report.html").exists()


PROPERTY = {
    "as it is": (),
    "mixup, ema, step": ("--mixup", 0.4, "--ema", 0.9, "--sched", "step", "--step-size", 1),
    "cutmix, flat-cos, tensorboard": ("--cutmix", 1, "--sched", "flat-cos", "--tensorboard"),
    "plateau, save best": ("--valid-pct", 0.25, "--sched", "plateau", "--plateau-patience", 0, "--save-best"),
    "lr find, adam, linear": ("--lr", "find", "--opt", "adam", "--anneal", "linear", "--bs", 4),
    "patience, ema": ("--valid-pct", 0.25, "--patience", 4, "--save-best", "--ema", 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("more", PROPERTY.values(), ids=PROPERTY)
def test_killed_at_random_moments(recipes, whole, tiny_folder, tmp_path, more, seed):
    """Five kills, anywhere between the first checkpoint and the end."""
    more = (*more, "--epochs", 10)
    reference, moments = whole(*more), random.Random(seed)
    env, out = dict(TINY_QUICK=1, TINY_KEEP=tmp_path / "last.pth"), tmp_path / "run"
    process = recipes.start(arguments(tiny_folder, out, *more), tmp_path, **env)
    wait_for((out / "checkpoint.pth").exists)
    for _ in range(5):
        time.sleep(moments.uniform(0, 0.8))
        process.kill()
        if process.wait() == 0 or not (out / "checkpoint.pth").exists():
            break  # it was done
        process = recipes.start(["--resume", out], tmp_path, **env)
    else:
        assert process.wait() == 0, process.err
    assert_same_folders(reference, out)


@pytest.mark.slow
def test_the_real_recipe_killed_five_times(tmp_path):
    """ResNet18 on a part of CIFAR-10, where CIFAR10_PATH says that it is, else of the digits; minutes of work."""
    data, share = (os.environ["CIFAR10_PATH"], 0.004) if "CIFAR10_PATH" in os.environ else ("digits", 0.15)
    args = ["--data", data, "--subset", 200, "--epochs", 3, "--valid-pct", share, "--no-test", "--ema", 0.9]
    env, moments = os.environ | {"CIFAR_FASTAI_CACHE": str(tmp_path / "cache")}, random.Random(0)

    def start(*args):
        """The process, once it trains: then config.json is written."""
        out, began = args[-1], time.time()
        command = [sys.executable, RECIPE, *map(str, args)]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(lambda: (out / "config.json").exists() and (out / "config.json").stat().st_mtime > began, 600)
        return process

    def finish(process):
        assert process.communicate() == (None, b"") and process.returncode == 0

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(*args, "--out", whole))
    seconds = sum(row["seconds"] for row in read_history(whole / "history.csv"))
    process = start(*args, "--out", parts)
    wait_for((parts / "checkpoint.pth").exists, 600)
    for _ in range(5):
        time.sleep(moments.uniform(0, seconds / 3))
        process.kill()
        process.communicate()
        process = start("--resume", parts)
    finish(process)
    assert history(whole) == history(parts) and metrics(whole) == metrics(parts)
    weights = [torch.load(folder / "model.pth", weights_only=True) for folder in (whole, parts)]
    assert same(*map(dict, weights))
