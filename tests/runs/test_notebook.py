"""What a notebook needs of a learner: its history, its pictures, its run's folder."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from matplotlib.figure import Figure
from torch import nn

from cifar_fastai import errors
from cifar_fastai.data.images import load_images
from cifar_fastai.data.loaders import cifar_block, cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation import learner_methods as interpret
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.models import _FACTORIES
from cifar_fastai.runs.folder import describe_run, load_run, read_config
from cifar_fastai.runs.notebook import write_run
from cifar_fastai.training.history import read_history
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test

torch.set_num_threads(1)


@pytest.fixture
def learn(tiny_images, tiny_model, monkeypatch):
    """A learner whose network goes by the name of ResNet18, so that its run can be loaded again."""
    monkeypatch.setitem(_FACTORIES, "resnet18", lambda n_classes: tiny_model)
    dls = cifar_dls(tiny_images, bs=8, device="cpu", padding=2, cutout=8, pad_mode="reflect")
    learn = cifar_learner(dls, "resnet18", label_smoothing=0.1, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        yield learn


@pytest.fixture
def drawn(monkeypatch):
    """The arguments that reach the drawing functions."""
    calls = {}
    for name in ("draw_curves", "draw_schedule", "draw_class_accuracy", "draw_augmentations"):
        draw = getattr(interpret, name)
        monkeypatch.setattr(
            interpret, name, lambda *args, _name=name, _draw=draw: calls.update({_name: args}) or _draw(*args)
        )
    return calls


def test_the_history_is_what_fastai_recorded(learn):
    learn.fit_one_cycle(2, 0.1)
    recorded = [list(row) for row in learn.recorder.values]
    names = "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"
    assert [[row[name] for name in names] for row in learn.history.rows] == recorded
    right = learn.history.rows[0]["train_accuracy"] * 48  # of the 48 train images, not of the 18 test images
    assert right == pytest.approx(round(right))
    assert recorded[0][0] != recorded[0][2]  # nor is train's loss test's
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


def test_pictures(learn, drawn, tiny_images):
    for plot in learn.plot_curves, learn.plot_schedule:
        with pytest.raises(InputError, match="train the learner first"):
            plot()
    learn.fit_one_cycle(2, 0.1)
    preds = predict(learn)
    plots = learn.plot_curves, learn.plot_schedule, learn.plot_class_accuracy, learn.dls.plot_augmentations
    assert all(isinstance(plot(), Figure) and plot.__doc__ for plot in plots)
    assert drawn["draw_curves"] == (learn.history.rows, "test")
    assert drawn["draw_schedule"] == (learn.history.lrs, learn.history.moms, 6)
    assert drawn["draw_class_accuracy"] == (preds.class_accuracy, preds.accuracy)
    (columns,) = drawn["draw_augmentations"]
    assert list(columns) == ["original", "RandomCrop", "RandomFlip", "CutOut", "all"]
    assert isinstance(range_test(learn, num_it=20).plot(), Figure)


def test_curves_name_the_split(tiny_images, tiny_model, drawn):
    learn = cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu", valid_pct=0.25), tiny_model, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.1)
    learn.plot_curves()
    assert drawn["draw_curves"][1] == "valid"


def test_a_run_is_written_and_loaded(learn, tiny_images, tmp_path, capsys):
    with pytest.raises(InputError, match="train the learner first"):
        write_run(learn, tmp_path / "run")
    found = range_test(learn, num_it=20)
    learn.fit_one_cycle(2, 0.1, div=10, pct_start=0.4)
    page = write_run(learn, tmp_path / "run")
    assert page == tmp_path / "run" / "report.html" and page.stat().st_size > 10_000
    names = "config.json history.csv metrics.json predictions.csv model.pth learner.pkl summary.txt curves.png"
    assert all((tmp_path / "run" / name).stat().st_size for name in names.split())
    assert read_history(tmp_path / "run" / "history.csv") == learn.history.rows
    assert (
        read_config(tmp_path / "run")["parameters"].items()
        >= dict(
            model="resnet18",
            epochs=2,
            bs=8,
            lr=0.1,
            div=10,
            pct_start=0.4,
            sched="one-cycle",
            padding=2,
            cutout=8,
            pad_mode="reflect",
            label_smoothing=0.1,
            seed=None,
            data="made up",
        ).items()
    )

    assert read_config(tmp_path / "run")["lr_find"] == found.suggestions
    assert (tmp_path / "run" / "lr_find.png").stat().st_size > 10_000

    loaded, config = load_run(tmp_path / "run", data=tiny_images)
    assert loaded.history.rows == learn.history.rows
    assert loaded.history.lrs == pytest.approx(learn.history.lrs)
    assert loaded.history.moms == pytest.approx(learn.history.moms)
    assert predict(loaded).accuracy == predict(learn).accuracy
    assert isinstance(loaded.plot_curves(), Figure) and isinstance(loaded.plot_schedule(), Figure)

    capsys.readouterr()
    before = page.stat().st_mtime_ns
    assert write_run(loaded, tmp_path / "run") == write_run(learn, tmp_path / "run") == page
    assert page.stat().st_mtime_ns == before and "holds this run" in capsys.readouterr().out
    write_run(loaded, tmp_path / "copy")
    copy = read_config(tmp_path / "copy")
    assert copy["parameters"] == config["parameters"] and copy["hardware"] == config["hardware"]
    learn.fit_one_cycle(1, 0.1)
    with pytest.raises(InputError, match="holds a finished run"):
        write_run(learn, tmp_path / "run")


def test_what_was_not_one_cycle_is_not_called_so(learn, tiny_images, tmp_path):
    learn.fit(2, 0.02)
    write_run(learn, tmp_path / "flat")
    found = read_config(tmp_path / "flat")["parameters"]
    assert (found["sched"], found["lr"], found["epochs"]) == ("none", 0.02, 2)
    learn.fit_one_cycle(1, 0.1)
    write_run(learn, tmp_path / "two")
    found = read_config(tmp_path / "two")["parameters"]
    assert (found["sched"], found["lr"], found["epochs"]) == ("none", pytest.approx(0.1, rel=0.1), 3)
    loaded, _ = load_run(tmp_path / "two", data=tiny_images)
    with pytest.raises(InputError, match="keeps no learning rates by step"):
        loaded.plot_schedule()


class StopAt(Callback):
    """A Ctrl-C in the n-th step of a fit."""

    def __init__(self, n):
        self.n = n

    def before_batch(self):
        if self.training and self.train_iter == self.n:
            raise KeyboardInterrupt


def test_a_broken_epoch_leaves_no_steps(learn, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(3, 0.1, cbs=StopAt(9))
    assert len(learn.history.rows) == 1 and len(learn.history.lrs) == len(learn.history.moms) == 6
    learn.fit(1, 0.03)
    assert len(learn.history.rows) == 2 and learn.history.lrs[6:] == [0.03] * 6
    write_run(learn, tmp_path / "run")
    assert read_config(tmp_path / "run")["parameters"]["sched"] == "none"


def test_other_learners_are_refused(learn, tiny_images, tmp_path):
    own = cifar_block(tiny_images).dataloaders(range(66), bs=8, device="cpu")
    for other in cifar_learner(own, learn.model, precision="fp32"), Learner(learn.dls, learn.model, nn.MSELoss()):
        with pytest.raises(InputError, match="takes a learner made by cifar_learner"):
            write_run(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dataloaders_alone_draw_their_augmentations():
    code = "from cifar_fastai import cifar_dls; cifar_dls('digits', bs=8, device='cpu').plot_augmentations()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_errors_name_arguments_in_a_notebook(tiny_images, monkeypatch):
    asked = dict(valid_pct=0.01, device="cpu")
    with pytest.raises(InputError, match="^--valid-pct 0.01: cuts 0 of 48"):
        cifar_dls(tiny_images, **asked)
    monkeypatch.setattr(errors, "IN_NOTEBOOK", True)
    with pytest.raises(InputError, match="^valid_pct 0.01: cuts 0 of 48"):
        cifar_dls(tiny_images, **asked)
    assert str(InputError("a-b: go on with --resume a--b, or -1")) == "a-b: go on with --resume a--b, or -1"


def test_a_run_in_one_line(learn, tmp_path):
    learn.fit_one_cycle(1, 0.1)
    write_run(learn, tmp_path)
    line = describe_run(tmp_path)
    assert line.startswith("resnet18 on tiny: 1 epoch in 0 seconds on ") and "; test accuracy " in line
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics |= dict(epochs=20, seconds=5400, test_accuracy=0.9512)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert "20 epochs in 90 minutes" in describe_run(tmp_path) and "test accuracy 95.12%" in describe_run(tmp_path)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(InputError, match="is the run finished"):
        describe_run(tmp_path)


def test_errors_of_one_class(learn, tiny_images):
    preds = predict(learn)
    some = preds.misclassified(true="red")
    assert set(some) == {k for k in preds.errors if preds.targets[k] == 0}
    pair = preds.classes[preds.predicted[preds.errors[0]]]
    assert set(preds.misclassified(predicted=pair)) == {
        k for k in preds.errors if preds.classes[preds.predicted[k]] == pair
    }
    assert isinstance(learn.plot_misclassified(3, preds=preds, true="red"), Figure)
    assert isinstance(learn.plot_gradcam(3, preds=preds, true="red", predicted="green"), Figure)
    with pytest.raises(InputError, match="class cat: no such class; choose from red, green, blue"):
        learn.plot_misclassified(3, preds=preds, true="cat")


def test_one_line_each(learn, tiny_images):
    assert repr(replace(tiny_images, source="/home/me/c.tgz")).endswith("of 3 classes, from c.tgz")
    assert repr(tiny_images) == "tiny: 48 train and 18 test images of 3 classes, from made up"
    assert repr(load_images("digits")).startswith("digits: 1,437 train and 360 test images of 10 classes")
    assert repr(predict(learn)).startswith("18 images of 3 classes: accuracy ")
