"""A run from start to end: what it leaves, and that the same seed gives the same digits."""

import random

import numpy as np
import pytest
import torch
from tiny_runs import FILES, history, metrics, same

from cifar_fastai import load_run
from cifar_fastai.errors import InputError, RunError
from cifar_fastai.files import read_json, write_json
from cifar_fastai.runs import results
from cifar_fastai.runs import train as module
from cifar_fastai.runs.run import load_network
from cifar_fastai.runs.train import find_lr
from cifar_fastai.training.range_test import RangeTest


def test_a_run_leaves_all_of_it_and_nothing_else(recipes, tiny, tiny_folder, tmp_path):
    overrides = dict(data=str(tiny_folder), epochs=2, bs=8, lr="find")
    args = [word for name, value in overrides.items() for word in (f"--{name}", value)]
    process = recipes.start([*args, "--tensorboard"], tmp_path, pictures=True).wait()
    assert (process.code, process.err) == (0, "")
    assert "\r" not in process.out and "█" not in process.out, "a log gets no progress bars"
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == FILES | {"lr_find.png", "tensorboard"}
    config, numbers, rows = read_json(folder / "config.json"), metrics(folder), history(folder)
    assert config["given"] == overrides | dict(tensorboard=True)
    assert config["parameters"]["lr"] == config["lr_find"]["valley"] and config["parameters"]["seed"] == 42
    assert torch.__version__.startswith(config["versions"]["torch"]) and config["eval_split"] == "test"
    assert [row["epoch"] for row in rows] == ["1", "2"] and numbers["epochs"] == 2
    assert float(rows[-1]["valid_accuracy"]) == numbers["valid_accuracy"] == numbers["test_accuracy"]
    learn, _ = load_run(folder, device="cpu")
    assert same(dict(learn.model.state_dict()), dict(torch.load(folder / "model.pth", weights_only=True)))


@pytest.mark.parametrize("overrides", [{}, dict(mixup=0.4, ema=0.9), dict(opt="adam", rotate=15.0)])
def test_the_same_seed_gives_the_same_digits(tiny, tmp_path, overrides):
    runs = []
    for n in range(2):
        random.seed(n), np.random.seed(n), torch.manual_seed(n)  # what was drawn before has no effect
        runs.append(tiny.train(tmp_path / str(n), seed=7, **overrides))
    assert history(runs[0].folder) == history(runs[1].folder) and metrics(runs[0].folder) == metrics(runs[1].folder)
    assert same(*(dict(run.learn.model.state_dict()) for run in runs))
    other = tiny.train(tmp_path / "other", seed=8, **overrides)
    assert history(other.folder) != history(runs[0].folder)


def test_zero_paths_and_numpys_numbers_are_taken(tiny, tiny_folder, tmp_path):
    """Zero is a value that was set, and a call from a notebook may hold paths; what is stored is plain."""
    overrides = dict(data=tiny_folder, out=tmp_path / "run", lr="0.1", epochs=np.int64(2), ema=np.float32(0.5))
    overrides |= dict(cutout=0, flip=0.0, seed=0, no_test=False)
    tiny.train(tmp_path / "run", stop=("history", 1), **overrides)
    config = read_json(tmp_path / "run" / "config.json")
    assert config["given"] == overrides | dict(data=str(tiny_folder), out=str(tmp_path / "run"), lr=0.1, bs=8)
    assert config["given"]["no_test"] is False is config["parameters"]["no_test"]
    tiny.resume(tmp_path / "run", **overrides | dict(resume=tmp_path / "run"))


def test_a_narrow_network_is_named_and_loaded(tiny, tmp_path):
    """With 16 channels in its first convolution instead of 64."""
    run = tiny.train(tmp_path / "run", epochs=1, model="resnet34", width=16)
    assert metrics(run.folder)["model"] == "resnet34, width 16" and metrics(run.folder)["parameters"] < 1_400_000
    for learn in load_run(run.folder, device="cpu")[0], load_network(run.folder, device="cpu"):
        assert same(dict(learn.model.state_dict()), dict(run.learn.model.state_dict()))


def test_a_quick_end_and_the_best_epoch(tiny, tmp_path, capsys, monkeypatch):
    """Without test-time augmentation and heatmaps; the best epoch is the one whose weights are in best.pth."""
    monkeypatch.setattr(results, "error_tiles", lambda *_: pytest.fail("heatmaps were computed"))
    options = dict(no_tta=True, no_explain=True, save_best=True, valid_pct=0.25, bs=4)
    folder = tiny.train(tmp_path / "run", **options).folder
    numbers, accuracies = metrics(folder), [float(row["valid_accuracy"]) for row in history(folder)]
    assert numbers["tta_accuracy"] is numbers["tta_shift_accuracy"] is None
    assert numbers["best_epoch"] == 1 + int(np.argmax(accuracies))
    assert numbers["best_valid_accuracy"] == max(accuracies)
    learn, _ = load_run(folder, weights="best.pth")
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[1] == pytest.approx(max(accuracies))
    out = capsys.readouterr().out
    assert f"epoch {numbers['best_epoch']}, valid accuracy {max(accuracies):.2%}" in out
    assert "TTA" not in out and "views" not in out and "explain" not in out


# Loading a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tiny, tmp_path):
    return tiny.train(tmp_path / "run", epochs=1).folder


def change(folder, **changes):
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def test_a_run_of_a_gpu_is_loaded_on_a_cpu(finished):
    """float16 is what a GPU without bfloat16 trains in, and what no CPU does."""
    parameters = read_json(finished / "config.json")["parameters"] | dict(precision="fp16", device="cuda")
    change(finished, parameters=parameters, device="cuda", precision="fp16")
    learn, _ = load_run(finished, device="cpu")
    assert learn.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(parameters=None), "not a run's configuration"),
        (dict(data_fingerprint="0"), "not the images this run was"),
        (dict(parameters=dict(model="resnet")), "its network resnet is not ours; load_run takes it as `model`"),
        (dict(parameters=dict(bs="many")), "bs='many'"),
        (dict(parameters=dict(data="/nowhere"), data_path=None), "/nowhere"),
    ],
)
def test_a_configuration_that_is_not_a_runs(finished, changes, message):
    change(finished, **changes)
    with pytest.raises(InputError, match=message):
        load_run(finished, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.pth"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff\xfe"])
def test_a_run_whose_files_are_damaged(finished, name, content):
    if content is None:
        (finished / name).unlink()
    else:
        (finished / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_run(finished, device="cpu")


# The range test as a command ------------------------------------------------------------------------------------------


def test_find_lr_draws_and_prints(tiny, tiny_folder, tmp_path, capsys):
    test = find_lr("resnet18", num_it=30, data=str(tiny_folder), bs=8, out=str(tmp_path / "curve.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    out = capsys.readouterr().out
    assert f"valley   {test.suggestions['valley']:.3g}" in out and "█" not in out
    assert len(test.lrs) == len(test.losses) <= 30


def test_a_range_test_without_an_answer_says_what_to_try(tiny, tmp_path, monkeypatch):
    nothing = RangeTest([0.1, 0.2], [1.0, 1.0], dict.fromkeys(("valley", "slide", "steep", "minimum")))
    monkeypatch.setattr(module, "range_test", lambda *args: nothing)
    with pytest.raises(RunError, match="the range test gives no slide; try another `lr_suggest`, or set `lr`"):
        tiny.train(tmp_path / "run", lr="find", lr_suggest="slide")
