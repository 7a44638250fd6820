"""A run that was interrupted and resumed is the run that was not: the same history, weights, momenta and metrics."""

import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import assert_same_folders, assert_same_state, history, metrics, same, wait_for

from cifar_fastai.errors import InputError
from cifar_fastai.files import lock_folder, read_json
from cifar_fastai.runs import run as run_module
from cifar_fastai.runs import train as train_module
from cifar_fastai.runs.folder import make_folder
from cifar_fastai.runs.run import MACHINE, load_run
from cifar_fastai.runs.train import train
from cifar_fastai.training.checkpoint import load_checkpoint
from cifar_fastai.training.precision import ScaledStep
from cifar_fastai.training.recorder import read_history

STEPS = 6  # an epoch, of 48 images


def assert_same_run(one, other):
    """Two finished runs in this process, with the momenta and the weights in memory."""
    assert history(one.folder) == history(other.folder)
    assert metrics(one.folder) == metrics(other.folder)
    assert_same_state(one.last, other.last)
    assert same(*(dict(run.learn.model.state_dict()) for run in (one, other)))
    assert (one.folder / "best.pth").exists() == (other.folder / "best.pth").exists()
    for path in (one.folder / name for name in ("model.pth", "best.pth")):
        if path.exists():
            files = path, other.folder / path.name
            assert same(*(dict(torch.load(file, weights_only=True)) for file in files))
    assert (one.folder / "predictions.csv").read_bytes() == (other.folder / "predictions.csv").read_bytes()


VARIANTS = {
    "one cycle": {},
    "cycled momentum": dict(mom_min=0.85),
    "flat-cos": dict(sched="flat-cos", pct_start=0.5),
    "step": dict(sched="step", step_size=1, gamma=0.5),
    "plateau": dict(sched="plateau", plateau_patience=0, gamma=0.5, valid_pct=0.25, epochs=5),
    "lr find": dict(lr="find", lr_suggest="steep"),
    "mixup": dict(mixup=0.4),
    "cutmix": dict(cutmix=1.0),
    "ema, mixup": dict(ema=0.9, mixup=0.2),
    "save best": dict(valid_pct=0.25, save_best=True, epochs=4),
    "patience": dict(valid_pct=0.25, save_best=True, patience=1, epochs=8, sched="none"),
    "all augmentations": dict(max_holes=3, cutout_p=0.5, rotate=15.0, vflip=0.5, pad_mode="reflect"),
    "alternating flip": dict(flip_by="epoch"),
    "bf16": dict(precision="bf16"),
    "tensorboard": dict(tensorboard=True),
    "linear, penalties, subset": dict(anneal="linear", peak_epoch=1.5, l1=1e-4, clip=0.5, subset=40, wd_bn_bias="yes"),
    "constant, clip value": dict(sched="none", clip_value=0.01, label_smoothing=0.1),
}
OPTIMIZERS = "muon adam lamb ranger adamw rmsprop radam qhadam larc".split()
VARIANTS |= {opt: dict(opt=opt, lr=0.01) for opt in OPTIMIZERS}
SLOW = {"constant, clip value", *OPTIMIZERS[4:]}


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(VARIANTS[name], id=name, marks=pytest.mark.slow if name in SLOW else ()) for name in VARIANTS],
)
def test_stopped_within_an_epoch_and_before_the_results(tiny, tmp_path, overrides):
    whole, out = tiny.train(tmp_path / "whole", **overrides), tmp_path / "parts"
    point, epoch = ("history", 2) if overrides.get("lr") == "find" else ("validate", 1)  # a range test validates, too
    assert tiny.train(out, stop=(point, 2), **overrides) is None
    assert len(history(out)) == load_checkpoint(out / "checkpoint.pth")["epoch"] == epoch
    assert tiny.resume(out, stop=("results", 1)) is None
    assert (out / "checkpoint.pth").exists() and not (out / "metrics.json").exists()
    parts = tiny.resume(out)
    assert_same_run(whole, parts)
    assert len(parts.history.lrs) == len(history(out)) * len(whole.learn.dls.train)
    assert not (out / "checkpoint.pth").exists()


def test_the_gradient_scaler_goes_on_too(tiny, tmp_path, monkeypatch):
    """float16's, which only a GPU needs, works on a CPU as well."""
    callbacks = run_module._callbacks
    monkeypatch.setattr(run_module, "_callbacks", lambda cfg: [*callbacks(cfg), ScaledStep()])
    whole = tiny.train(tmp_path / "whole")
    tiny.train(tmp_path / "parts", stop=("validate", 2))
    parts = tiny.resume(tmp_path / "parts")
    assert_same_run(whole, parts)
    assert parts.last["callbacks"]["scaled_step"]["scaler"]["_growth_tracker"] == 3 * STEPS


# What --resume takes and refuses --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny, tmp_path):
    """The folder of a run that was stopped in its second epoch."""
    tiny.train(tmp_path / "run", stop=("validate", 2), lr="0.15", seed=0, precision="fp32")
    return tmp_path / "run"


def refusal(tiny, folder, **overrides):
    """The message with which `folder` is not resumed; nothing in it changes."""
    before = {path.name: path.read_bytes() for path in folder.glob("*")}
    with pytest.raises(InputError) as error:
        tiny.resume(folder, **overrides)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    return str(error.value)


@pytest.mark.parametrize(
    "overrides, difference",
    [
        (dict(lr=0.2), "lr=0.2: this run has 0.15"),
        (dict(lr="find"), "lr='find': this run has 0.15"),
        (dict(cutout=0), "cutout=0: this run has 8"),
        (dict(seed=1), "seed=1: this run has 0"),
        (dict(valid_pct=0.1), "valid_pct=0.1: this run has None"),
        (dict(no_test=True), "no_test=True: this run has False"),
        (dict(out="elsewhere"), "out='elsewhere': this run has"),
        (dict(preset="amitkml"), "preset='amitkml': this run has None"),
    ],
)
def test_a_parameter_that_differs_is_refused(tiny, stopped, overrides, difference):
    message = refusal(tiny, stopped, **overrides)
    assert message.startswith(difference) and message.endswith("with `resume` only `device` and `data` may be set")


def test_the_same_parameters_and_a_device_are_taken(tiny, stopped, tiny_folder):
    overrides = dict(lr="0.150", bs=8, seed=0, data=f"{tiny_folder}/.", out=str(stopped), device="auto")
    assert tiny.resume(stopped, **overrides).folder == stopped


def test_the_learning_rate_of_a_range_test_is_kept(tiny, tmp_path):
    tiny.train(tmp_path / "run", stop=("history", 1), lr="find")
    lr = read_json(tmp_path / "run" / "config.json")["parameters"]["lr"]
    run = tiny.resume(tmp_path / "run", lr="find")
    config = read_json(tmp_path / "run" / "config.json")
    assert run.lr == config["parameters"]["lr"] == config["lr_find"]["valley"] == lr


def test_images_that_changed_are_refused(tiny, tiny_folder, tmp_path):
    tiny.data = shutil.copytree(tiny_folder, tmp_path / "data")
    tiny.train(tmp_path / "run", stop=("validate", 2))
    picture = next((tiny.data / "train" / "red").iterdir())
    pixels = np.array(Image.open(picture))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(picture)
    problem, hint = "not the images this run was trained with (data)", "say where the run's images are with `data`"
    assert refusal(tiny, tmp_path / "run") == f"{tiny.data}: {problem}; {hint}"
    assert refusal(tiny, tmp_path / "run", data="digits") == f"scikit-learn load_digits: {problem}; {hint}"


def test_images_that_have_moved(tiny, tiny_folder, tmp_path, monkeypatch):
    """A relative path is found from another folder; where they are elsewhere, `data` names the place once."""
    whole = tiny.train(tmp_path / "whole")
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, here / "colours")
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    tiny.train(tmp_path / "run", stop=("history", 1), data="colours")
    monkeypatch.chdir(elsewhere)
    assert tiny.resume(tmp_path / "run", stop=("history", 1)) is None
    shutil.move(here / "colours", elsewhere / "colours")
    monkeypatch.chdir(tmp_path)
    assert "here/colours: cannot be read (No such file" in refusal(tiny, tmp_path / "run")
    assert tiny.resume(tmp_path / "run", data="elsewhere/colours", stop=("history", 2)) is None
    monkeypatch.chdir(here)
    run = tiny.resume(tmp_path / "run")
    assert_same_run(whole, run)
    assert run.config["data_path"] == str(elsewhere / "colours")
    load_run(tmp_path / "run")


def test_the_path_in_the_environment_is_remembered(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_PATH", str(tiny_folder))
    tiny.train(tmp_path / "run", stop=("history", 1), data="auto", epochs=2)
    monkeypatch.setenv("CIFAR10_PATH", "/nowhere")
    assert tiny.resume(tmp_path / "run", stop=("history", 1)) is None


def test_another_machine_is_named_and_both_are_kept(tiny, tmp_path, monkeypatch, capsys):
    first = tiny.train(tmp_path / "whole", stop=("history", 1), epochs=3)
    tiny.train(tmp_path / "run", stop=("history", 1), epochs=3)
    tiny.resume(tmp_path / "run", stop=("history", 1))
    config = read_json(tmp_path / "run" / "config.json")
    assert first is None and "earlier_parts" not in config and "last digits" not in capsys.readouterr().out
    versions = config["versions"] | {"torch": "9.9"}
    monkeypatch.setattr(run_module, "hardware_name", lambda device: "a processor, 64 threads")
    monkeypatch.setattr(run_module, "versions", lambda: versions)
    tiny.resume(tmp_path / "run", stop=("results", 1))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "last digits" in line]
    hardware, torch_version = config["hardware"], config["versions"]["torch"]
    changes = f"hardware {hardware} then, a processor, 64 threads now; torch {torch_version} then, 9.9 now"
    assert line == f"the last digits may differ from those of a run in one piece: {changes}"
    config |= dict(hardware="a processor, 64 threads", versions=versions) | {
        "earlier_parts": [dict(epochs=1) | {name: config[name] for name in MACHINE}]
    }
    assert read_json(tmp_path / "run" / "config.json") == config
    tiny.resume(tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json") == config, "nothing has changed since"


def test_a_run_among_its_images_is_refused(tiny, tiny_folder, tmp_path, monkeypatch):
    tiny.data = shutil.copytree(tiny_folder, tmp_path / "outer" / "colours")
    (tmp_path / "link").symlink_to(tiny.data / "test")
    before = sorted(tmp_path.rglob("*"))
    for data in tiny.data, tiny.data.parent:
        for out in tiny.data / "train" / "run", tiny.data / "train", tmp_path / "link" / "a" / "b":
            with pytest.raises(InputError, match="lies among the images, where it would become a class"):
                tiny.train(out, data=str(data))
        monkeypatch.chdir(tiny.data / "train")
        with pytest.raises(InputError, match="runs.*lies among the images"):
            make_folder("resnet18", None, str(data))
    assert sorted(tmp_path.rglob("*")) == before
    tiny.train(tiny.data / "run", epochs=1)


def test_what_cannot_go_on_says_why(tiny, tmp_path, monkeypatch, stopped):
    monkeypatch.chdir(tmp_path)
    assert refusal(tiny, tmp_path / "nowhere").endswith("no such folder")
    with pytest.raises(InputError, match="a run of the recipe resnet18, not of resnet34"):
        train("resnet34", resume=str(stopped))
    with lock_folder(stopped):
        assert refusal(tiny, stopped) == f"resume='{stopped}': another process is training there"
    (fresh := tmp_path / "fresh").mkdir()
    with lock_folder(fresh), pytest.raises(InputError, match="training there; choose another folder"):
        tiny.train(fresh)
    tiny.resume(stopped)
    assert refusal(tiny, stopped) == f"resume='{stopped}': this run is finished"
    (stopped / "metrics.json").unlink()
    assert refusal(tiny, stopped).endswith("no checkpoint.pth in it: no epoch was finished, start again")


def test_a_default_batch_that_does_not_divide_is_not_lowered_again(tiny, tmp_path, monkeypatch):
    """48 images make batches of 2, which three processes cannot share."""
    tiny.train(tmp_path / "run", stop=("validate", 2), bs=None)
    for module in run_module, train_module:
        monkeypatch.setattr(module, "n_processes", lambda: 3)
    monkeypatch.setattr(train_module, "gathered", lambda value: [value])
    assert refusal(tiny, tmp_path / "run").endswith("its batches of 2 do not divide by 3 processes")


def test_latest_is_the_newest_interrupted_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("oldest", "newer", "newest")):
        tiny.train(tmp_path / "runs" / name, stop=("history", 1), epochs=2)
        os.utime(tmp_path / "runs" / name / "checkpoint.pth", (1e9 + k, 1e9 + k))
    tiny.train(tmp_path / "runs" / "finished", epochs=1)
    (tmp_path / "runs" / "empty").mkdir()
    with lock_folder(tmp_path / "runs" / "newest"):
        assert tiny.resume("latest").folder.name == "newer", "the newest is going on just now"
    assert [tiny.resume("latest").folder.name for _ in range(2)] == ["newest", "oldest"]
    with pytest.raises(InputError, match="resume='latest': no interrupted run"):
        tiny.resume("latest")


def test_leftovers_of_a_kill_are_put_right(tiny, stopped):
    (stopped / f".{'abcd' * 8}.tmp").write_bytes(b"half of it")
    with open(stopped / "history.csv", "a") as file:  # killed between the row and the checkpoint
        file.write("2,9,9,9,9,9,9,9\r\n")
    (stopped / "config.json").unlink()
    run = tiny.resume(stopped)
    assert not list(stopped.glob(".*"))
    assert [row["epoch"] for row in history(stopped)] == ["1", "2", "3"] and history(stopped)[1]["lr"] != "9"
    assert read_json(stopped / "config.json")["parameters"]["epochs"] == run.settings.epochs


def test_a_folder_without_a_finished_epoch_is_used_again(tiny, tmp_path):
    assert tiny.train(tmp_path / "run", stop=("step", 3)) is None
    assert os.listdir(tmp_path / "run") == ["config.json"]
    tiny.train(tmp_path / "run", epochs=1)
    tiny.train(tmp_path / "two", stop=("history", 1))
    for name, message in (("run", "holds a finished run"), ("two", "holds a run already")):
        with pytest.raises(InputError, match=message):
            tiny.train(tmp_path / name)


def scalars(folder):
    """{tag: [(step, value)]} of TensorBoard's files, without the clock's."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("images_per_second", "seconds"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("epochs, bs, n_steps", [(3, 8, STEPS), (4, 48, 1)])
def test_tensorboard_counts_on(tiny, tmp_path, epochs, bs, n_steps):
    whole, parts, overrides = tmp_path / "whole", tmp_path / "parts", dict(epochs=epochs, bs=bs, tensorboard=True)
    tiny.train(whole, **overrides)
    tiny.train(parts, stop=("history", 2), **overrides)
    saved = (parts / "checkpoint.pth").read_bytes()
    time.sleep(1.1)  # TensorBoard reads its files in the order of their names, which hold the second
    tiny.resume(parts, stop=("history", 2))  # as if killed when TensorBoard had an epoch's numbers, ...
    (parts / "checkpoint.pth").write_bytes(saved)  # ... and the checkpoint did not
    time.sleep(1.1)
    tiny.resume(parts)
    assert scalars(whole) == scalars(parts)
    assert [step for step, _ in scalars(parts)["step/loss"]] == list(range(epochs * n_steps))
    assert len(scalars(parts)["epoch/test_loss"]) == epochs


# Killed: a real process, SIGKILL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [
        "step 7",
        "step 12",
        "validate 2",
        "history 2",
        "checkpoint 2",
        "writing 2",
        "writing 3",
        "results 1",
        "export 1",
        "metrics 1",
    ],
)
def test_killed_and_resumed(recipes, tmp_path, point):
    out = tmp_path / "run"
    assert recipes.train(out, at=f"{point} KILL").code == -signal.SIGKILL
    assert load_checkpoint(out / "checkpoint.pth")["epoch"] in (1, 2, 3), "the last good one is whole"
    process = recipes.resume(out)
    assert (process.code, process.err) == (0, "")
    assert re.search(r"^going on with .* after epoch [123] of 3$", process.out, re.MULTILINE)
    assert_same_folders(recipes.whole(), out)


def test_latest_and_refusals_on_the_command_line(recipes, tmp_path):
    out = tmp_path / "runs" / "one"
    args = recipes.arguments("--out", "runs/one")
    assert recipes.start(args, tmp_path, at="step 8 KILL").wait().code == -signal.SIGKILL
    for arguments, code, line in (
        (
            ["--resume", "latest", "--lr", 0.2],
            2,
            "--lr 0.2: this run has 0.15; with --resume only --device and --data may be set",
        ),
        (args, 2, "--out runs/one: holds a run already; choose another folder, or --resume runs/one"),
        (["--resume", "latest", "--device", "cpu", "--lr", "0.150"], 0, None),
        (["--resume", "latest"], 2, "--resume latest: no interrupted run of resnet18 under runs"),
        (["--resume", out], 2, f"--resume {out}: this run is finished"),
    ):
        process = recipes.start(arguments, tmp_path).wait()
        assert (process.code, process.err) == (code, f"error: {line}\n" if line else "")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["picture 1", "picture 5", "report 1"])
def test_killed_among_the_pictures(recipes, tmp_path, point):
    out = tmp_path / "run"
    assert recipes.train(out, at=f"{point} KILL", pictures=True).code == -signal.SIGKILL
    assert recipes.resume(out, pictures=True).code == 0
    assert_same_folders(recipes.whole(pictures=True), out)
    assert (out / "report.html").exists()


RANDOMLY_KILLED = (
    "--mixup 0.4 --ema 0.9 --sched step --step-size 1",
    "--cutmix 1 --sched flat-cos --tensorboard",
    "--valid-pct 0.25 --sched plateau --plateau-patience 0 --save-best",
    "--lr find --opt adam --anneal linear --bs 4",
    "--valid-pct 0.25 --patience 4 --save-best --ema 0.9",
)


def kill_at_random_moments(recipes, args, out, seconds, seed, **options):
    """Kill a run five times, each at most `seconds` after the first checkpoint or the last start; it ends at last."""
    moments = random.Random(seed)
    process = recipes.start(args, out.parent, **options)
    wait_for(lambda: (out / "checkpoint.pth").exists() or process.code is not None, 600)
    for _ in range(5):
        time.sleep(moments.uniform(0, seconds))
        process.send("KILL")
        if process.wait().code == 0 or not (out / "checkpoint.pth").exists():
            return  # it was done
        process = recipes.start(["--resume", out], out.parent, **options)
    assert process.wait(600).code == 0, process.err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("flags", RANDOMLY_KILLED)
def test_killed_at_random_moments(recipes, tmp_path, flags, seed):
    more, out = (*flags.split(), "--epochs", 10), tmp_path / "run"
    kill_at_random_moments(recipes, recipes.arguments("--out", out, *more), out, 0.8, seed)
    assert_same_folders(recipes.whole(*more), out)


@pytest.mark.slow
def test_the_real_recipe_killed_five_times(recipes, tmp_path):
    """ResNet18 on a part of CIFAR-10, where CIFAR10_PATH says that it is, else of the digits; minutes of work."""
    data, share = (os.environ["CIFAR10_PATH"], 0.004) if "CIFAR10_PATH" in os.environ else ("digits", 0.15)
    args = ["--data", data, "--subset", 200, "--epochs", 3, "--valid-pct", share, "--no-test", "--ema", 0.9, "--out"]
    options, whole, parts = dict(tiny=False, pictures=True), tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    for folder in (whole, parts):
        folder.parent.mkdir()
    assert recipes.start([*args, whole], whole.parent, **options).wait(600).code == 0
    seconds = sum(row["seconds"] for row in read_history(whole / "history.csv"))
    kill_at_random_moments(recipes, [*args, parts], parts, seconds / 3, 0, **options)
    assert_same_folders(whole, parts)
