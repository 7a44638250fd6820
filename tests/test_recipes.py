"""Every recipe and every preset from start to end, on real digits and the real networks, as short as may be."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_report_browser import BROWSER, Chromium

from cifar_fastai.presets import PRESETS
from cifar_fastai.recipe_pages import recipe_page

ROOT = Path(__file__).parent.parent
FILES = {
    "config.json",
    "history.csv",
    "metrics.json",
    "predictions.csv",
    "model.pth",
    "learner.pkl",
    "summary.txt",
    "curves.png",
    "schedule.png",
    "augmentations.png",
    "class_accuracy.png",
    "confusion_matrix.png",
    "top_losses.png",
    "misclassified.png",
    "gradcam.png",
    "report.html",
}
METRICS = {
    "dataset",
    "model",
    "parameters",
    "epochs",
    "seed",
    "device",
    "precision",
    "eval_split",
    "train_accuracy",
    "valid_accuracy",
    "valid_loss",
    "test_accuracy",
    "tta_accuracy",
    "tta_shift_accuracy",
    "class_accuracy",
    "images_per_second",
    "seconds",
}
SHORT = dict(data="digits", epochs=1, subset=40, bs=20, device="cpu")

PREDICT = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from fastai.learner import load_learner
from PIL import Image
learn = load_learner(sys.argv[1])
with learn.no_bar():
    name, index, probs = learn.predict(Image.fromarray(np.zeros((32, 32, 3), np.uint8)))
assert name in list("0123456789") and abs(float(probs.sum()) - 1) < 1e-4
print("predicted", name)
"""


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of resnet18.py, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, str(ROOT / "recipes/resnet18.py"), "--out", str(out)]
    for name, value in SHORT.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=out.parent)  # from anywhere
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_every_file(finished):
    out, done = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "learner.pkl").stat().st_size < 60e6
    assert done.stderr == ""


def test_its_numbers_agree_with_each_other(finished):
    out, done = finished
    metrics = metrics_of(out)
    assert METRICS <= set(metrics)
    assert metrics["dataset"] == "digits" and metrics["parameters"] == 11_173_962
    with open(out / "history.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["valid_accuracy"]) == pytest.approx(metrics["valid_accuracy"])
    with open(out / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["target"] == row["predicted"] for row in rows) / len(rows)
    assert len(rows) == 360 and right == pytest.approx(metrics["test_accuracy"])
    assert f"test accuracy {right:.2%}" in done.stdout and "flip TTA" in done.stdout


def test_weights_load_safely_and_learner_pkl_in_a_fresh_process(finished):
    out, _ = finished
    state = torch.load(out / "model.pth", weights_only=True)
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    done = subprocess.run([sys.executable, "-c", PREDICT, str(out / "learner.pkl")], capture_output=True, text=True)
    assert done.returncode == 0 and "predicted" in done.stdout, done.stderr


def test_explain_reads_the_run(finished, tmp_path, capsys):
    out, _ = finished
    recipe_page("explain")["main"](run=str(out), n=2, out=str(tmp_path / "why.png"), data="digits")
    assert (tmp_path / "why.png").stat().st_size > 10_000
    assert "true" in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium")
def test_its_page_opens_in_a_browser(finished, tmp_path):
    """All errors of a real run with the heatmaps of both classes, and no complaint of the browser."""
    out, _ = finished
    with open(out / "predictions.csv") as file:
        wrong = sum(row["target"] != row["predicted"] for row in csv.DictReader(file))
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(out / "report.html", width=390)
        assert browser.run("document.querySelectorAll('#tiles > li .p + .t').length") == wrong > 0
        browser.click("[data-show=t]")
        assert browser.run("document.querySelectorAll('#tiles > li[data-view=t]').length") == wrong
        assert browser.run("document.documentElement.scrollWidth") == 390 and browser.problems == []
    finally:
        browser.close()


def test_help_answers_at_once_and_shows_the_recipes_own_defaults():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "recipes/custom_resnet.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "(default: 24)" in done.stdout and "(default: find)" in done.stdout
    assert "torch" not in done.stderr.replace("fasttransform", ""), "--help imports torch, which takes seconds"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", "custom_resnet"])
def test_the_other_networks(name, tmp_path):
    given = SHORT | (dict(lr="0.01") if name == "custom_resnet" else {})
    recipe_page(name)["main"](**given, out=str(tmp_path / "run"))
    assert FILES <= {path.name for path in (tmp_path / "run").iterdir()}
    metrics = metrics_of(tmp_path / "run")
    assert metrics["model"] == name
    assert metrics["parameters"] == {"resnet34": 21_282_122, "custom_resnet": 6_573_130}[name]


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_runs(preset, tmp_path):
    recipe = "custom_resnet" if preset == "vivek-a81" else "resnet18"
    recipe_page(recipe)["main"](**SHORT, preset=preset, out=str(tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["parameters"]["preset"] == preset
    assert config["parameters"]["lr"] > 0 and metrics_of(tmp_path / "run")["epochs"] == 1


@pytest.mark.slow
def test_a_found_learning_rate_and_a_validation_split(tmp_path):
    given = dict(
        SHORT,
        subset=60,
        bs=4,
        lr="find",
        valid_pct=0.1,
        no_test=True,
        save_best=True,
        patience=3,
        ema=0.9,
        mixup=0.2,
        tensorboard=True,
        out=str(tmp_path / "run"),
    )
    recipe_page("custom_resnet")["main"](**given)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert FILES | {"lr_find.png", "best.pth", "tensorboard"} == names
    metrics = metrics_of(tmp_path / "run")
    assert metrics["test_accuracy"] is None and metrics["eval_split"] == "valid"
    assert metrics["train_accuracy"] is None, "of mixed images no class is right"


@pytest.mark.slow
def test_find_lr_draws_and_prints(tmp_path, capsys):
    found = recipe_page("find_lr")["main"](**dict(SHORT, bs=4), num_it=24, out=str(tmp_path / "lr.png"))
    assert (tmp_path / "lr.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("valley", "slide", "steep", "minimum"))
    assert len(found.lrs) <= 24
