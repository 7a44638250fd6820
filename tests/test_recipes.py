"""Every recipe and every preset from start to end, with the real networks, as short as may be."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import FILES

from cifar_fastai.files import read_json
from cifar_fastai.recipes import PRESETS
from cifar_fastai.runs.explain import explain_run
from cifar_fastai.runs.train import train

ROOT = Path(__file__).parent.parent
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
assert abs(float(probs.sum()) - 1) < 1e-4
print(name)
"""


def python(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """The folder of a run of resnet18.py, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    flags = f"--data {tiny_folder} --epochs 1 --bs 16 --device cpu --out {out}".split()
    done = python(ROOT / "recipes/resnet18.py", *flags, cwd=out.parent)  # from anywhere
    assert (done.returncode, done.stderr) == (0, "")
    return out, done.stdout


def test_its_files_and_numbers_agree_with_each_other(finished):
    out, text = finished
    assert {path.name for path in out.iterdir()} == FILES and (out / "learner.pkl").stat().st_size < 60e6
    metrics, rows = read_json(out / "metrics.json"), pd.read_csv(out / "predictions.csv")
    assert metrics["dataset"] == "colours" and metrics["parameters"] == 11_170_371
    accuracy = (rows["target"] == rows["predicted"]).mean()
    assert len(rows) == 18 and accuracy == pytest.approx(metrics["test_accuracy"])
    (valid_accuracy,) = pd.read_csv(out / "history.csv")["valid_accuracy"]
    assert valid_accuracy == pytest.approx(metrics["valid_accuracy"])
    assert f"test accuracy {accuracy:.2%}" in text and f"with flip TTA {metrics['tta_accuracy']:.2%}" in text


def test_weights_load_safely_and_learner_pkl_in_a_fresh_process(finished):
    out, _ = finished
    assert torch.load(out / "model.pth", weights_only=True)["conv1.weight"].shape == (64, 3, 3, 3)
    done = python("-c", PREDICT, out / "learner.pkl")
    assert done.returncode == 0 and done.stdout.strip() in ("red", "green", "blue"), done.stderr


def test_explain_reads_the_run(finished, tmp_path, capsys):
    out, _ = finished
    explain_run(out, n=2, out=tmp_path / "why.png")
    assert (tmp_path / "why.png").stat().st_size > 10_000 and "true" in capsys.readouterr().out


def test_its_page_opens_in_a_browser(finished, visit):
    """All errors of a real run with the heatmaps of both classes, and no complaint of the browser."""
    out, _ = finished
    wrong = len(pd.read_csv(out / "predictions.csv").query("target != predicted"))
    page = visit(out / "report.html", width=390)
    assert page.locator("#tiles > li .p + .t").count() == wrong > 0
    page.click("[data-show=t]")
    assert page.locator("#tiles > li[data-view=t]").count() == wrong
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_help_answers_without_torch():
    done = python("-X", "importtime", ROOT / "recipes/custom_resnet.py", "--help")
    assert done.returncode == 0 and "(default: 24)" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE), "importing torch takes seconds"


@pytest.mark.slow
@pytest.mark.parametrize("name, n_parameters", [("resnet34", 21_282_122), ("custom_resnet", 6_573_130)])
def test_the_other_networks(name, n_parameters, tmp_path):
    train(name, **SHORT, lr="0.01", out=str(tmp_path / "run"))
    assert FILES <= {path.name for path in (tmp_path / "run").iterdir()}
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["model"] == name and metrics["parameters"] == n_parameters


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(preset, tmp_path):
    recipe = "custom_resnet" if preset == "vivek-a81" else "resnet18"
    train(recipe, **SHORT, preset=preset, out=str(tmp_path / "run"))
    assert read_json(tmp_path / "run" / "config.json")["parameters"]["preset"] == preset
    assert read_json(tmp_path / "run" / "metrics.json")["epochs"] == 1


@pytest.mark.slow
def test_a_found_learning_rate_and_a_validation_split(tmp_path):
    overrides = SHORT | dict(subset=60, bs=4, lr="find", valid_pct=0.1, no_test=True, save_best=True, patience=3)
    overrides |= dict(lr_suggest="minimum")  # on batches of 4 the other rules see an explosion alone
    train("custom_resnet", **overrides, ema=0.9, mixup=0.2, tensorboard=True, out=str(tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert FILES | {"lr_find.png", "best.pth", "tensorboard"} == names
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["test_accuracy"] is None and metrics["eval_split"] == "valid"
    assert metrics["train_accuracy"] is None, "of mixed images no class is right"
