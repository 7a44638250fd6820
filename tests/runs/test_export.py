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
from cifar_fastai.data.loaders import reported_dl
from cifar_fastai.errors import InputError, RunError
from cifar_fastai.runs import export
from cifar_fastai.runs.export import ONNX_EXAMPLE, export_run, model_card
from cifar_fastai.runs.folder import describe_run

BARE = "import sys; sys.modules.update(torch=None, fastai=None, cifar_fastai=None); exec({!r})"


@pytest.fixture
def run(tiny, tmp_path):
    """The folder of a finished run on the tiny network."""
    return tiny.train(tmp_path / "run", epochs=1).folder


@pytest.mark.parametrize("no_test, split", [(False, "test"), (True, "valid")])
def test_onnx_agrees_with_the_network_on_every_image_of_the_reported_split(tiny, tmp_path, capsys, no_test, split):
    run = tiny.train(tmp_path / "run", epochs=1, valid_pct=0.25, no_test=no_test, bs=4).folder
    session = onnxruntime.InferenceSession(export_run(run, "onnx", out=tmp_path / "out") / "model.onnx")
    learn, _ = load_run(run, "cpu")
    learn.to_fp32()
    with learn.no_bar():
        dl = reported_dl(learn.dls, 0.25, no_test)[1]
        predictions = predict(learn, dl)
    paths = sorted((tiny.data / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    (inputs,) = session.get_inputs()
    assert (inputs.name, inputs.type, inputs.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    assert isinstance(inputs.shape[0], str), "any number of images"
    if not no_test:
        (probs,) = session.run(None, {"images": pixels})
        np.testing.assert_allclose(probs, predictions.probs, atol=1e-5)
        (one,) = session.run(None, {"images": pixels[:1]})
        np.testing.assert_allclose(one, probs[:1], atol=1e-6)
    about, text = session.get_modelmeta().custom_metadata_map, capsys.readouterr().out
    assert json.loads(about["classes"]) == ["blue", "green", "red"] and about["size"] == "32"
    assert float(about["difference"]) < 1e-5 and about["checked"] in text
    assert about["checked"].startswith(f"On {len(predictions)} {split} images")


def test_the_example_runs_without_torch_and_this_package(run, tiny_folder):
    folder = export_run(run, "onnx")
    assert folder == run / "onnx" and ONNX_EXAMPLE in (folder / "README.md").read_text()
    assert (
        ONNX_EXAMPLE in (Path(__file__).parents[2] / "docs" / "share.md").read_text() and ONNX_EXAMPLE.count("\n") < 12
    )
    image = next((tiny_folder / "test" / "red").iterdir())
    words = [sys.executable, "-c", BARE.format(ONNX_EXAMPLE), str(image)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    learn, _ = load_run(run, "cpu")
    with learn.no_bar():
        (prediction,) = predict_files(learn, [image])
    assert eval(done.stdout) == {name: pytest.approx(value, abs=1e-3) for name, value in prediction.top3}


@pytest.mark.parametrize("shift, error", [(1e-5, None), (-1.0, RunError)])
def test_another_class_is_refused_and_a_tie_is_not(run, monkeypatch, capsys, shift, error):
    """As if ONNX Runtime rounded in another way: first by so little that only a tie could change, then by much."""
    exact = export.predict

    def predict(learn, dl):
        predictions = exact(learn, dl)
        probs = predictions.probs
        best, second = np.argsort(-probs, 1)[:, :2].T
        rows = np.arange(len(probs))
        probs[rows, best] = probs[rows, second] = (probs[rows, best] + probs[rows, second]) / 2
        probs[rows, second] += abs(shift)
        return type(predictions)(probs, predictions.targets, predictions.losses, rows, predictions.classes)

    monkeypatch.setattr(export, "predict", predict)
    if error:
        with pytest.raises(error, match="ONNX Runtime gives other classes than the network on 18 test images"):
            export_run(run, "onnx")
        assert not (run / "onnx").exists()
    else:
        export_run(run, "onnx")
        assert "but for 18 ties" in capsys.readouterr().out


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
        (None, dict(to="safetensors", out="run"), "is the run's own folder"),
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
