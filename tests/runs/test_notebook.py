"""What a notebook needs of a learner: its history, its pictures, its run's folder."""

import subprocess
import sys

import pytest
import torch
from fastai.learner import Learner
from fastai.metrics import F1Score, error_rate
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from matplotlib.figure import Figure
from tiny_net import TinyNet
from torch import nn

from cifar_fastai import load_run
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.files import read_json, write_json
from cifar_fastai.models import _FACTORIES
from cifar_fastai.plots import charts, galleries
from cifar_fastai.runs.folder import describe_run, read_config
from cifar_fastai.runs.notebook import write_run
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test
from cifar_fastai.training.recorder import read_history


@pytest.fixture
def learn(tiny_images, tiny_model, monkeypatch):
    """A learner whose network goes by the name of ResNet18, so that its run can be loaded again."""
    monkeypatch.setitem(_FACTORIES, "resnet18", lambda n_classes, width: tiny_model)
    dls = cifar_dls(tiny_images, bs=8, device="cpu", padding=2, cutout=8, pad_mode="reflect", flip_by="chance")
    learn = cifar_learner(dls, "resnet18", label_smoothing=0.1, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        yield learn


def parameters(folder, *names):
    values = read_config(folder)["parameters"]
    return tuple(values[name] for name in names)


def test_the_history_is_what_fastai_recorded(learn):
    learn.fit_one_cycle(2, 0.1)
    recorded = [list(row) for row in learn.recorder.values]
    names = "train_loss", "valid_loss", "valid_accuracy", "train_accuracy"
    assert [[row[name] for name in names] for row in learn.history.rows] == recorded
    assert learn.recorder.metric_names[1:-1] == ["train_loss", "valid_loss", "accuracy", "train_accuracy"]
    right = learn.history.rows[0]["train_accuracy"] * 48  # of the 48 train images, not of the 18 test images
    assert right == pytest.approx(round(right)) and recorded[0][0] != recorded[0][1]
    assert learn.history.lrs == [float(lr) for lr in learn.recorder.lrs] and len(learn.history.moms) == 12


def test_the_history_goes_on_and_leaves_out_what_is_no_training(learn):
    learn.fit_one_cycle(1, 0.1)
    predict(learn)
    learn.validate()
    learn.summary()
    range_test(learn, num_it=20)
    assert len(learn.history.rows) == 1 and len(learn.history.lrs) == 6
    learn.fit_one_cycle(2, 0.1)
    assert [row["epoch"] for row in learn.history.rows] == [1, 2, 3] and len(learn.history.lrs) == 18


def test_pictures(learn, tiny_images, tiny_model, monkeypatch):
    """Each method draws a figure of what it says."""
    drawn = {}

    def record(module, name):
        draw = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: drawn.update({name: args}) or draw(*args))

    for name in ("plot_curves", "plot_schedule", "plot_class_accuracy"):
        record(charts, name)
    record(galleries, "plot_augmentations")
    for plot in learn.plot_curves, learn.plot_schedule:
        with pytest.raises(InputError, match="train the learner"):
            plot()
    learn.fit_one_cycle(2, 0.1)
    preds = predict(learn)
    plots = learn.plot_curves, learn.plot_schedule, learn.plot_class_accuracy, learn.dls.plot_augmentations
    assert all(isinstance(plot(), Figure) and plot.__doc__ for plot in plots)
    assert drawn["plot_curves"] == (learn.history.rows, "test")
    assert drawn["plot_schedule"] == (learn.history.lrs, learn.history.moms, 6)
    assert drawn["plot_class_accuracy"] == (preds.class_accuracy, preds.accuracy)
    assert list(drawn["plot_augmentations"][0]) == ["original", "RandomCrop", "RandomFlip", "CutOut", "all"]
    assert isinstance(range_test(learn, num_it=20).plot(), Figure)
    other = cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu", valid_pct=0.25), tiny_model, precision="fp32")
    with other.no_bar(), other.no_logging():
        other.fit_one_cycle(1, 0.1)
    other.plot_curves()
    assert drawn["plot_curves"] == (other.history.rows, "valid")


def test_a_run_is_written_and_loaded(learn, tiny_images, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="train the learner first"):
        write_run(learn, run)
    test = range_test(learn, num_it=20)
    learn.fit_one_cycle(2, 0.1, div=10, pct_start=0.4)
    page = write_run(learn, run)
    assert page == run / "report.html" and page.stat().st_size > 10_000
    names = "config.json history.csv metrics.json predictions.csv model.pth learner.pkl summary.txt curves.png"
    assert all((run / name).stat().st_size for name in names.split())
    assert read_history(run / "history.csv") == learn.history.rows
    made = dict(padding=2, cutout=8, pad_mode="reflect", label_smoothing=0.1, seed=None, data="made up", bs=8)
    fit = dict(model="resnet18", epochs=2, lr=0.1, div=10, pct_start=0.4, sched="one-cycle")
    assert read_config(run)["parameters"].items() >= (made | fit).items()
    assert read_config(run)["lr_find"] == test.suggestions and (run / "lr_find.png").stat().st_size > 10_000

    loaded, config = load_run(run, data=tiny_images)
    assert loaded.history.rows == learn.history.rows
    assert loaded.history.lrs == pytest.approx(learn.history.lrs)
    assert loaded.history.moms == pytest.approx(learn.history.moms)
    assert predict(loaded).accuracy == predict(learn).accuracy
    assert isinstance(loaded.plot_curves(), Figure) and isinstance(loaded.plot_schedule(), Figure)

    capsys.readouterr()
    before = page.stat().st_mtime_ns
    assert write_run(loaded, run) == write_run(learn, run) == page
    assert page.stat().st_mtime_ns == before and "holds this run" in capsys.readouterr().out
    write_run(loaded, tmp_path / "copy")
    copy = read_config(tmp_path / "copy")
    assert copy["parameters"] == config["parameters"] and copy["hardware"] == config["hardware"]
    learn.fit_one_cycle(1, 0.1)
    with pytest.raises(InputError, match="holds a finished run"):
        write_run(learn, run)


def test_what_was_not_one_cycle_is_not_called_so(learn, tiny_images, tmp_path):
    learn.fit(2, 0.02)
    write_run(learn, tmp_path / "flat")
    assert parameters(tmp_path / "flat", "sched", "lr", "epochs") == ("none", 0.02, 2)
    learn.fit_one_cycle(1, 0.1)
    write_run(learn, tmp_path / "two")
    assert parameters(tmp_path / "two", "sched", "lr", "epochs") == ("none", pytest.approx(0.1, rel=0.1), 3)
    loaded, _ = load_run(tmp_path / "two", data=tiny_images)
    with pytest.raises(InputError, match="keeps no learning rates by step"):
        loaded.plot_schedule()


def test_a_learner_without_a_history_is_refused(learn, tmp_path):
    with pytest.raises(InputError, match="takes a learner made by cifar_learner"):
        write_run(Learner(learn.dls, learn.model, nn.MSELoss()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Tokens(nn.Module):
    """A network without any map."""

    def __init__(self):
        super().__init__()
        self.flat, self.linear = nn.Flatten(), nn.Linear(3 * 40 * 40, 3)

    def forward(self, x):
        return self.linear(self.flat(x))


def test_a_run_with_loaders_a_network_and_metrics_of_ones_own(tiny_folder, tmp_path, capsys):
    size = dict(item_tfms=Resize(40), bs=8, val_bs=5, train="train", valid="test", device=torch.device("cpu"))
    dls = ImageDataLoaders.from_folder(tiny_folder, num_workers=0, **size)
    learn = cifar_learner(dls, Tokens(), lr=1e-3, metrics=[error_rate, F1Score(average="macro")], path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2)
        recorded = learn.recorder.values
        write_run(learn, tmp_path / "run")
    assert "no heatmaps: no layer has a map" in capsys.readouterr().out
    (first, last), names = read_history(tmp_path / "run" / "history.csv"), ("error_rate", "f1_score")
    assert all(0 <= last[f"{split}_{name}"] <= 1 for split in ("train", "valid") for name in names)
    columns = ["train_loss", "valid_loss", *names, *(f"train_{name}" for name in names)]
    for row, values in zip((first, last), recorded, strict=True):
        assert [row.get(name, row.get(f"valid_{name}")) for name in columns] == pytest.approx(list(values))
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["valid_error_rate"] == last["valid_error_rate"] and metrics["test_accuracy"] is None
    assert metrics["valid_accuracy"] == pytest.approx(1 - last["valid_error_rate"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<dt>Validation error rate</dt>" in page and '<th scope="col">Train f1 score</th>' in page
    assert "not evaluated" not in page and "cut from train" not in page
    titles = [ax.get_title() for ax in learn.plot_curves().axes]
    assert titles == ["Loss", "Error rate", "F1 score"]
    labels = [line.get_label() for line in learn.plot_curves().axes[0].lines]
    assert labels[1].startswith("valid: "), "such DataLoaders have no test split"
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "predictions.csv", "learner.pkl", "confusion_matrix.png"} <= written
    assert not {"augmentations.png", "gradcam.png"} & written
    with pytest.raises(InputError, match="its network Tokens is not ours; load_run takes it as `model`"):
        load_run(tmp_path / "run")
    with pytest.raises(InputError, match="DataLoaders of your own; fastai's load_learner reads its learner.pkl"):
        load_run(tmp_path / "run", model=Tokens())


def test_a_run_with_a_network_of_ones_own_is_loaded(tiny_images, tiny_model, tmp_path):
    learn = cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu"), tiny_model, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, slice(0.01, 0.1))
        write_run(learn, tmp_path / "run")
    assert parameters(tmp_path / "run", "model", "sched", "lr") == ("TinyNet", "one-cycle", 0.1)
    loaded, config = load_run(tmp_path / "run", data=tiny_images, model=TinyNet())
    assert predict(loaded).accuracy == predict(learn).accuracy
    assert loaded.settings["model"] == config["parameters"]["model"] == "TinyNet"


def test_dataloaders_alone_draw_their_augmentations():
    code = "from cifar_fastai import cifar_dls; cifar_dls('digits', bs=8, device='cpu').plot_augmentations()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_run_in_one_line(learn, tmp_path):
    learn.fit_one_cycle(1, 0.1)
    write_run(learn, tmp_path)
    line = describe_run(tmp_path)
    assert line.startswith("resnet18 on tiny: 1 epoch in 0 seconds on ") and "; test accuracy " in line
    metrics = read_json(tmp_path / "metrics.json") | dict(epochs=20, seconds=5400, test_accuracy=0.9512)
    write_json(tmp_path / "metrics.json", metrics)
    assert "20 epochs in 90 minutes" in describe_run(tmp_path) and "test accuracy 95.12%" in describe_run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(InputError, match="is the run finished"):
        describe_run(tmp_path)


def test_errors_of_one_class(learn):
    preds = predict(learn)
    red = [k for k in preds.errors if preds.targets[k] == 0]
    assert set(preds.misclassified(true="red")) == set(red)
    assert isinstance(learn.plot_misclassified(3, preds=preds, true="red"), Figure)
    assert isinstance(learn.plot_gradcam(3, preds=preds, true="red", predicted="green"), Figure)
    with pytest.raises(InputError, match="true='cat': no such name; choose from red, green, blue"):
        learn.plot_misclassified(3, preds=preds, true="cat")
