"""A run from start to end: what it leaves, and that the same seed gives the same digits."""

import json
import random

import numpy as np
import pytest
import torch
from tiny_runs import RECIPE, history, metrics, same

from cifar_fastai.config import Recipe
from cifar_fastai.errors import InputError, RunError
from cifar_fastai.runs.folder import load_run
from cifar_fastai.runs.train import find_lr

FILES = {
    "augmentations.png",
    "class_accuracy.png",
    "config.json",
    "confusion_matrix.png",
    "curves.png",
    "gradcam.png",
    "history.csv",
    "learner.pkl",
    "metrics.json",
    "misclassified.png",
    "model.pth",
    "predictions.csv",
    "report.html",
    "schedule.png",
    "summary.txt",
    "top_losses.png",
}


@pytest.mark.slow
def test_a_run_leaves_all_of_it_and_nothing_else(recipes, tiny, tiny_folder, tmp_path):
    args = ["--data", tiny_folder, "--epochs", 2, "--bs", 8, "--lr", "find", "--tensorboard"]
    process = recipes.run(args, tmp_path)
    assert process.code == 0 and not process.err, process.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES | {"lr_find.png", "tensorboard"}
    assert "\r" not in process.out and "█" not in process.out, "a log gets no progress bars"
    config, found = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["given"] == dict(data=str(tiny_folder), epochs=2, bs=8, lr="find", tensorboard=True)
    assert config["parameters"]["lr"] == config["lr_find"]["valley"] and config["parameters"]["seed"] == 42
    assert torch.__version__.startswith(config["versions"]["torch"]) and config["eval_split"] == "test"
    rows = history(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"] and found["epochs"] == 2
    assert float(rows[-1]["valid_accuracy"]) == found["valid_accuracy"] == found["test_accuracy"]
    learn, _ = load_run(folder, device="cpu")
    assert same(dict(learn.model.state_dict()), dict(torch.load(folder / "model.pth", weights_only=True)))


@pytest.mark.parametrize("given", [{}, dict(mixup=0.4, ema=0.9), dict(opt="adam", rotate=15.0)])
def test_the_same_seed_gives_the_same_digits(tiny, tmp_path, given):
    runs = []
    for n in range(2):
        random.seed(n), np.random.seed(n), torch.manual_seed(n)  # what was drawn before has no say
        runs.append(tiny.train(tmp_path / str(n), seed=7, **given))
    assert history(runs[0].folder) == history(runs[1].folder)
    assert metrics(runs[0].folder) == metrics(runs[1].folder)
    assert same(*(dict(run.learn.model.state_dict()) for run in runs))
    other = tiny.train(tmp_path / "other", seed=8, **given)
    assert history(other.folder) != history(runs[0].folder)


def test_zero_is_a_value_and_kept(tiny, tmp_path):
    tiny.train(tmp_path / "run", epochs=1, cutout=0, flip=0.0, seed=0, no_test=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config["given"][name] for name in ("cutout", "flip", "seed")} == dict(cutout=0, flip=0, seed=0)
    assert "no_test" not in config["given"] and config["parameters"]["no_test"] is False


def test_paths_and_numpys_numbers_are_taken(tiny, tiny_folder, tmp_path):
    """A call from a notebook may hold them; what is stored is plain."""
    given = dict(data=tiny_folder, out=tmp_path / "run", lr="0.1", epochs=np.int64(2), ema=np.float32(0.5))
    tiny.train(tmp_path / "run", stop=("history", 1), **given)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["given"] == given | dict(data=str(tiny_folder), out=str(tmp_path / "run"), lr=0.1, bs=8)
    tiny.resume(tmp_path / "run", **given | dict(resume=tmp_path / "run"))


# Loading a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tiny, tmp_path):
    return tiny.train(tmp_path / "run", epochs=1).folder


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_of_a_gpu_is_loaded_on_a_cpu(finished):
    """float16 is what a GPU without bfloat16 trains in, and what no CPU does."""
    parameters = json.loads((finished / "config.json").read_text())["parameters"]
    change(finished, parameters=parameters | dict(precision="fp16", device="cuda"), device="cuda", precision="fp16")
    learn, _ = load_run(finished, device="cpu")
    assert learn.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(parameters=None), "not a run's configuration"),
        (dict(data_fingerprint="0"), "not the images this run was"),
        (dict(parameters=dict(model="resnet")), "--model resnet"),
        (dict(parameters=dict(bs="many")), "--bs 'many'"),
        (dict(parameters=dict(data="/nowhere")), "/nowhere"),
    ],
)
def test_a_configuration_that_is_not_a_runs(finished, changes, message):
    change(finished, **changes)
    with pytest.raises(InputError, match=message):
        load_run(finished, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.pth"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_a_run_whose_files_are_damaged(finished, name, content):
    if content is None:
        (finished / name).unlink()
    else:
        (finished / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_run(finished, device="cpu")


# The range test as a command ------------------------------------------------------------------------------------------


def test_find_lr_draws_and_prints(tiny, tiny_folder, tmp_path, capsys):
    given = dict(data=str(tiny_folder), bs=8, device="cpu", out=str(tmp_path / "curve.png"))
    found = find_lr(Recipe("find_lr", RECIPE.defaults | dict(lr="find")), given, num_it=30)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    out = capsys.readouterr().out
    assert f"valley   {found.suggestions['valley']:.3g}" in out and "█" not in out
    assert len(found.lrs) == len(found.losses) <= 30


@pytest.mark.parametrize(
    "given, numbers, message",
    [
        (dict(resume="latest"), {}, "--resume: "),
        (dict(out="a.jpg"), {}, "--out a.jpg: "),
        (dict(out="nowhere/a.png"), {}, "--out nowhere/a.png: "),
        ({}, dict(start_lr=1.0, end_lr=0.1), "--start-lr 1, "),
        ({}, dict(start_lr=float("nan")), "--start-lr nan"),
        ({}, dict(num_it=19), "--num-it 19: "),
    ],
)
def test_find_lr_refuses(tmp_path, monkeypatch, given, numbers, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{message}"):
        find_lr(Recipe("find_lr", dict(lr="find")), given, **numbers)
    assert not list(tmp_path.iterdir())


def test_a_range_test_without_an_answer_says_what_to_try(tiny, tmp_path, monkeypatch):
    from cifar_fastai.runs import train
    from cifar_fastai.training.range_test import RangeTest

    nothing = RangeTest([0.1, 0.2], [1.0, 1.0], dict.fromkeys(("valley", "slide", "steep", "minimum")))
    monkeypatch.setattr(train, "range_test", lambda *args: nothing)
    with pytest.raises(RunError, match="the range test gives no slide; try --lr-suggest valley, or give --lr"):
        tiny.train(tmp_path / "run", lr="find", lr_suggest="slide")
