"""Exports give what the run's network gives, in programs that have neither torch nor this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image

from cifar_fastai import load_run, predict, predict_files
from cifar_fastai.errors import InputError, RunError
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.runs.export import ONNX_EXAMPLE, describe_agreement, export_run, model_card
from cifar_fastai.runs.folder import describe_run

ROOT = Path(__file__).parents[2]
BARE = "import sys; sys.modules.update(torch=None, fastai=None, cifar_fastai=None); exec({!r})"


@pytest.fixture
def run(tiny, tmp_path):
    """The folder of a finished run on the tiny network."""
    return tiny.train(tmp_path / "run", epochs=1).folder


def test_onnx_agrees_with_the_network_on_every_image(run, tiny_folder, capsys):
    folder = export_run(run, "onnx")
    session, (learn, _) = onnxruntime.InferenceSession(folder / "model.onnx"), load_run(run, "cpu")
    learn.to_fp32()
    with learn.no_bar():
        expected = predict(learn).probs
    files = sorted((tiny_folder / "test").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    for n in (18, 1, 7):
        (probs,) = session.run(None, {"images": images[:n]})
        np.testing.assert_allclose(probs, expected[:n], atol=1e-6)
    (inputs,) = session.get_inputs()
    assert (inputs.name, inputs.type, inputs.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    about, text = session.get_modelmeta().custom_metadata_map, capsys.readouterr().out
    assert json.loads(about["classes"]) == ["blue", "green", "red"] and about["size"] == "32"
    assert about["checked"].startswith("On 18 test images") and float(about["checked"].split()[-1]) < 1e-6
    assert about["checked"] in text and about["checked"] in (folder / "README.md").read_text()
    check_example(folder, files[-1], learn)
    oblong = run / "oblong.png"
    Image.open(files[0]).resize((100, 60)).save(oblong)
    check_example(folder, oblong, learn)


def check_example(folder, image, learn):
    """The example of the card and of the docs runs without torch and this package, and gives what the network gives."""
    assert ONNX_EXAMPLE in (folder / "README.md").read_text() and ONNX_EXAMPLE in (ROOT / "docs/share.md").read_text()
    words = [sys.executable, "-c", BARE.format(ONNX_EXAMPLE), str(image)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    with learn.no_bar():
        (prediction,) = predict_files(learn, [image])
    assert json.loads(done.stdout.replace("'", '"')) == {
        name: pytest.approx(value, abs=1e-4) for name, value in prediction.top3
    }


@pytest.mark.slow
def test_a_run_that_never_read_the_test_split_is_checked_on_its_validation_split(tiny, tmp_path, capsys):
    run = tiny.train(tmp_path / "run", epochs=1, valid_pct=0.25, no_test=True, bs=4).folder
    export_run(run, "onnx")
    assert "On 12 valid images ONNX Runtime gives" in capsys.readouterr().out


@pytest.mark.parametrize("margin, is_tie", [(0.0, True), (5e-5, True), (2e-4, False), (np.nan, False)])
def test_another_class_is_refused_and_a_tie_is_not(margin, is_tie):
    ours = np.array([[0.9, 0.1, 0.0], [0.4, 0.4 - margin, 0.2 + margin]], np.float32)
    theirs = np.array([[0.9, 0.1, 0.0], [0.4 - margin, 0.41, 0.19]], np.float32)
    predictions = Predictions(ours, np.zeros(2, int), np.zeros(2), np.arange(2), ("a", "b", "c"))
    if is_tie:
        text = describe_agreement(theirs, predictions, "test")
        assert "On 2 test images (1 tied between two classes) ONNX" in text and text.endswith("1.0e-02")
    else:
        with pytest.raises(RunError, match="other classes than the network on . test images"):
            describe_agreement(theirs, predictions, "test")


def test_load_run_takes_safetensors_back(run, tiny_folder, tmp_path, capsys):
    folder = export_run(run, "safetensors", out=tmp_path / "sent")
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json")), "no place of this machine"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "metrics.json", "history.csv", "predictions.csv", "model.safetensors")
    }
    with pytest.raises(InputError, match="say where the run's images are"):
        load_run(folder, "cpu")
    (learn, _), (original, _) = load_run(folder, "cpu", str(tiny_folder)), load_run(run, "cpu")
    with learn.no_bar(), original.no_bar():
        np.testing.assert_array_equal(predict(learn).probs, predict(original).probs)
    assert str(learn.history) == str(original.history) and describe_run(folder) == describe_run(run)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="cannot be loaded as weights; it is damaged"):
        load_run(folder, "cpu", str(tiny_folder))


def test_the_card_has_the_runs_numbers_and_its_head_is_yaml(run):
    card = model_card(run, "cifar-fastai train resnet18", title="a: [b", sdk="gradio")
    _, head, text = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["title"], head["sdk"], head["pipeline_tag"]) == ("a: [b", "gradio", "image-classification")
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"| as they are | {metrics['test_accuracy']:.2%} |" in text and "`cifar-fastai train resnet18`" in text
    assert f"| with flip TTA | {metrics['tta_accuracy']:.2%} |" in text and "lr=0.15" in text and "`red`" in text
    assert str(run) not in card


@pytest.mark.parametrize(
    "damage, arguments, message",
    [
        (None, dict(to="onxx"), "to='onxx': no such name; did you mean onnx?"),
        (None, dict(to="safetensors", out="run"), "out='run': holds a run; choose another folder"),
        (None, dict(to="safetensors", out="."), "out='.': exists, and not from an export to safetensors; choose a new"),
        (None, dict(to="safetensors", out="run/config.json"), "exists, and not from an export"),
        ("metrics.json", dict(to="safetensors"), "is the run finished?|cannot be read"),
        ("config.json", dict(to="onnx"), "not a run's folder"),
    ],
)
def test_what_cannot_be_exported_is_refused(run, monkeypatch, damage, arguments, message):
    monkeypatch.chdir(run.parent)
    if damage:
        (run / damage).unlink()
    with pytest.raises(InputError, match=message):
        export_run(run, **arguments)


def test_a_missing_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r'onnxscript is not installed: pip install "cifar_fastai\[onnx\]"'):
        export_run(run, "onnx")
