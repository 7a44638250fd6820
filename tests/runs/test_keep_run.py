"""KeepRun: a fit that is interrupted and run again ends as one that was not, and no folder gets two."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_recipe
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import FocalLossFlat
from fastai.metrics import error_rate
from tiny_net import TinyNet
from tiny_runs import CLOCK, assert_same_state, history, same
from torch import nn

from cifar_fastai.data.images import load_images
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.files import lock_folder, read_json
from cifar_fastai.runs.notebook import KeepRun, write_run
from cifar_fastai.runs.train import train
from cifar_fastai.training.callbacks import WeightAverage
from cifar_fastai.training.checkpoint import load_checkpoint
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.recorder import read_history


@pytest.fixture
def make(tiny_images, monkeypatch):
    """Makes a learner as the cells of a notebook do, on a network that goes by the name of ResNet18."""
    tiny_recipe.use_tiny_net(monkeypatch.setattr)
    tiny_recipe.draw_nothing(monkeypatch.setattr)

    def make(
        seed=0, images=tiny_images, model="resnet18", bs=8, precision="fp32", bar=False, flip_by="epoch", **options
    ):
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(seed)
        dls = cifar_dls(images, bs=bs, device="cpu", pad_mode="zeros", cutout=8, flip_by=flip_by)
        learn = cifar_learner(dls, model, precision=precision, **{"opt": "sgd", "label_smoothing": 0.0} | options)
        if not bar:
            learn.remove_cb(learn.progress)
            learn.logger = print
        return learn

    return make


@pytest.fixture
def stop(monkeypatch):
    """Runs a function until Ctrl-C in front of the `n`-th training step."""

    def stop(function, n=9):
        def interrupt():
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            tiny_recipe.strike("step", n, interrupt, patch.setattr)
            function()

    return stop


def one_cycle(learn, *cbs, n=3, lr=0.1, **options):
    learn.fit_one_cycle(n, lr, cbs=list(cbs), **options)


def rows(learn):
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in learn.history.rows]


FITS = {
    "one cycle": one_cycle,
    "slices": lambda learn, *cbs: one_cycle(learn, *cbs, lr=slice(0.01, 0.1)),
    "flat, then cos": lambda learn, *cbs: learn.fit_flat_cos(3, 0.1, pct_start=0.5, cbs=list(cbs)),
    "constant": lambda learn, *cbs: learn.fit(3, 0.05, wd=0.1, cbs=list(cbs)),
    "restarts": lambda learn, *cbs: learn.fit_sgdr(2, 1, 0.1, cbs=list(cbs)),
    "averaged weights, MixUp": lambda learn, *cbs: one_cycle(learn, WeightAverage(0.9), MixUp(0.4), *cbs),
    "early stopping": lambda learn, *cbs: one_cycle(learn, EarlyStoppingCallback(min_delta=9, patience=3), *cbs, n=9),
    "whole batches": lambda learn, *cbs: one_cycle(learn, GradientAccumulation(16), *cbs),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=list(FITS))
def test_an_interrupted_fit_ends_as_one_that_was_not(make, stop, tmp_path, capsys, fit):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    one = make()
    fit(one, KeepRun(straight))
    capsys.readouterr()
    stop(lambda: fit(make(), KeepRun(parts)))
    assert {path.name for path in parts.iterdir()} == {"config.json", "history.csv", "checkpoint.pth"}
    assert len(history(parts)) == load_checkpoint(parts / "checkpoint.pth")["epoch"] == 1
    other = make(seed=1)
    fit(other, KeepRun(parts))
    assert f"going on with {parts} after epoch 1 of" in capsys.readouterr().out
    assert rows(one) == rows(other) and history(straight) == history(parts)
    assert (one.history.lrs, one.history.moms) == (other.history.lrs, other.history.moms)
    assert same(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert_same_state(*(load_checkpoint(folder / "checkpoint.pth") for folder in (straight, parts)))
    configs = [read_json(folder / "config.json") for folder in (straight, parts)]
    assert configs[0] == configs[1] and configs[0]["parameters"]["epochs"] == one.n_epoch
    assert other.history.path is None, "further fits leave the folder alone"


@pytest.mark.parametrize("fit", FITS.values(), ids=list(FITS))
def test_a_finished_fit_is_loaded(make, tmp_path, capsys, fit):
    one = make()
    fit(one, KeepRun(tmp_path / "run"))
    weights = dict(one.model.state_dict())
    for learn in make(seed=1), one:
        if learn is one:
            write_run(one, tmp_path / "run")
        capsys.readouterr()
        again = make(seed=1)
        fit(again, KeepRun(tmp_path / "run"))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Loaded, not trained here: ")
        assert len(lines) == 1 + len(one.history.rows), "its epochs are shown"
        assert rows(again) == rows(one) and same(dict(again.model.state_dict()), weights)
    assert write_run(again, tmp_path / "run") == tmp_path / "run" / "report.html"
    assert "holds this run" in capsys.readouterr().out


def test_an_interrupted_first_epoch_begins_again(make, stop, tmp_path):
    straight = make()
    one_cycle(straight, KeepRun(tmp_path / "straight"))
    stop(lambda: one_cycle(make(), KeepRun(tmp_path / "parts")), 3)
    learn = make()
    one_cycle(learn, KeepRun(tmp_path / "parts"))
    assert rows(learn) == rows(straight)


def test_the_finished_run_of_a_recipe_with_the_same_settings_is_loaded(make, tiny, tiny_folder, tmp_path, capsys):
    run = tiny.train(tmp_path / "run", precision="fp32")
    learn = make(images=load_images(tiny_folder), flip_by="chance", seed=1)
    cycle = dict(lr=0.15, pct_start=0.25, div_final=1e5)
    refused(run.folder, lambda: one_cycle(learn, KeepRun(run.folder), n=2, **cycle), "epochs=2: it is 3 in {}")
    one_cycle(learn, KeepRun(run.folder), **cycle)
    assert "Loaded, not trained here: resnet18 on colours: 3 epochs in" in capsys.readouterr().out
    assert learn.history.rows == run.history.rows and learn.history.lrs == pytest.approx(run.history.lrs)
    assert same(dict(learn.model.state_dict()), dict(run.learn.model.state_dict()))


def test_write_run_completes_the_folder(make, stop, tmp_path):
    learn, run = make(bar=True), tmp_path / "run"
    stop(lambda: one_cycle(learn, KeepRun(run)))
    with pytest.raises(InputError, match="its fit is not finished: run it again to go on"):
        write_run(learn, run)
    one_cycle(learn, KeepRun(run))
    before = read_json(run / "config.json")
    write_run(learn, run)
    assert not (run / "checkpoint.pth").exists() and read_json(run / "metrics.json")["epochs"] == 3
    assert read_history(run / "history.csv") == learn.history.rows
    assert read_json(run / "config.json") == before
    learn.fit(1)
    with pytest.raises(InputError, match="holds a finished run; choose another folder"):
        write_run(learn, run)


def test_earlier_epochs_count_and_stay(make, stop, tmp_path):
    def begin():
        learn = make()
        learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
        learn.fit(2, 0.01)
        return learn

    one = begin()
    one_cycle(one, KeepRun(tmp_path / "one"))
    other = begin()
    stop(lambda: one_cycle(other, KeepRun(tmp_path / "other")))
    one_cycle(other, KeepRun(tmp_path / "other"))  # in the same kernel
    assert [row["epoch"] for row in rows(other)] == [1, 2, 3, 4, 5]
    assert rows(one) == rows(other) and one.history.lrs == other.history.lrs
    later = make(seed=1)
    one_cycle(later, KeepRun(tmp_path / "other"))
    assert rows(later) == rows(one)
    write_run(later, tmp_path / "other")
    parameters = read_json(tmp_path / "other" / "config.json")["parameters"]
    assert (parameters["epochs"], parameters["sched"]) == (5, "none"), "two fits are no single cycle"
    again = make(seed=1)
    one_cycle(again, KeepRun(tmp_path / "other"))
    assert rows(again) == rows(one) and again.history.lrs == []


def test_the_best_epoch_is_remembered(make, stop, tmp_path):
    """fastai's trackers go on with their best value; its CSV file has all epochs."""

    def fit(learn, folder):
        learn.path = tmp_path / f"{folder.name}-files"
        learn.path.mkdir(exist_ok=True)
        trackers = SaveModelCallback("valid_loss", fname="best"), ReduceLROnPlateau(patience=9)
        one_cycle(learn, *trackers, CSVLogger(), KeepRun(folder), n=4, lr=2.0)

    one = make()
    fit(one, tmp_path / "one")
    stop(lambda: fit(make(), tmp_path / "other"), 21)
    late = make(seed=1)
    fit(late, tmp_path / "other")
    losses = [row["valid_loss"] for row in rows(one)]
    assert rows(one) == rows(late) and losses.index(min(losses)) != 3, "the last epoch is not the best"
    assert same(dict(one.model.state_dict()), dict(late.model.state_dict()))
    tables = [(tmp_path / f"{name}-files" / "history.csv").read_text().splitlines() for name in ("one", "other")]
    one, other = ([line.rpartition(",")[0] for line in table] for table in tables)  # without the time
    assert one == other and len(one) == 5


REFUSED = {
    "rate": (dict(lr=0.2), "lr=0.2: it is 0.1 in {}, which holds one fit"),
    "epochs": (dict(n=4), "epochs=4: it is 3 in {}, which holds"),
    "schedule": (dict(div=10), "div=10.0: it is 25.0 in {}, which holds"),
    "momentum": (dict(moms=(0.95, 0.85, 0.95)), "momentum=0.95: it is 0.9 in {}, which holds"),
    "decay": (dict(wd=0.1), "wd=0.1: it is 0.0005 in {}, which holds"),
    "slices": (dict(lr=slice(0.01, 0.1)), "lr by step=.*: it is .* in {}, which holds"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("state", ["interrupted", "finished"])
def test_another_fit_is_refused(make, stop, tmp_path, options, message, state):
    run = tmp_path / "run"
    if state == "interrupted":
        stop(lambda: one_cycle(make(), KeepRun(run)))
    else:
        one_cycle(make(), KeepRun(run))
    refused(run, lambda: one_cycle(make(), KeepRun(run), **options), message)
    one_cycle(make(), KeepRun(run))


def refused(run, fit, message):
    """`fit` raises an InputError of one line, and leaves what is in the folder `run`."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match=message.format(re.escape(str(run)))) as error:
        fit()
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


class WiderNet(TinyNet):
    def __init__(self, n_classes=3):
        super().__init__(n_classes)
        self.linear = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, n_classes))


def test_another_learner_is_refused(make, stop, tmp_path, tiny_images):
    run, cycle = tmp_path / "run", one_cycle
    stop(lambda: cycle(make(model=TinyNet()), KeepRun(run)))
    refused(run, lambda: cycle(make(model=WiderNet()), KeepRun(run)), "model='WiderNet': it is TinyNet in {}")
    wider = WiderNet()
    wider.__class__ = type("TinyNet", (WiderNet,), {})
    refused(run, lambda: cycle(make(model=wider), KeepRun(run)), "does not fit the network .*linear.0.weight")
    for options, message in (
        (dict(bs=12), "bs=12: it is 8 in {}"),
        (dict(opt="adam"), "opt='adam': it is sgd"),
        (dict(precision="bf16"), "precision='bf16': it is fp32 in {}"),
        (dict(loss_func=FocalLossFlat()), "loss_func='FocalLossFlat': it is CrossEntropyLossFlat in {}"),
        (dict(metrics=error_rate), r"metrics=\['error_rate'\]: it is \['accuracy'\] in {}"),
    ):
        refused(run, lambda options=options: cycle(make(model=TinyNet(), **options), KeepRun(run)), message)
    refused(run, lambda: cycle(make(model=TinyNet()), MixUp(0.4), KeepRun(run)), "callbacks=.*'mix_up'.*: it is ")
    others = replace(tiny_images, images=255 - tiny_images.images)
    refused(run, lambda: cycle(make(model=TinyNet(), images=others), KeepRun(run)), "made up: not the images this run")


def test_fine_tune_is_two_fits(make, tmp_path):
    with pytest.raises(InputError, match=r"which holds one fit \(fine_tune makes two\)"):
        make().fine_tune(2, 0.01, cbs=KeepRun(tmp_path / "run"))


def test_gradients_that_wait_are_refused(make, tmp_path):
    with pytest.raises(InputError, match="n_acc=32: leaves gradients at the end of an epoch"):
        one_cycle(make(), GradientAccumulation(32), KeepRun(tmp_path / "run"))


def test_other_folders_and_learners_are_refused(make, tmp_path, tiny, monkeypatch):
    run = tmp_path / "run"
    plain = make()
    plain = Learner(plain.dls, plain.model, nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="KeepRun takes a learner made by cifar_learner"):
        plain.fit(1, cbs=KeepRun(run))
    assert not run.exists()
    run.mkdir()
    with lock_folder(run), pytest.raises(InputError, match="another process is training there"):
        one_cycle(make(), KeepRun(run))
    (run / "file").write_text("")
    with pytest.raises(InputError, match="folder='.*file': cannot be created"):
        one_cycle(make(), KeepRun(run / "file"))
    tiny.train(tmp_path / "recipe", stop=("validate", 2))
    with pytest.raises(InputError, match="a recipe's run; resume it there"):
        one_cycle(make(), KeepRun(tmp_path / "recipe"))


def test_a_recipe_refuses_the_run_of_a_notebook(make, stop, tmp_path):
    stop(lambda: one_cycle(make(), KeepRun(tmp_path)))
    with pytest.raises(InputError, match="a run of a notebook, not of resnet18"):
        train("resnet18", resume=tmp_path)


def test_an_error_frees_the_folder(make, tmp_path):
    class Fail(Callback):
        def after_train(self):
            raise ValueError("no")

    with pytest.raises(ValueError):
        one_cycle(make(), Fail(), KeepRun(tmp_path))
    with lock_folder(tmp_path) as is_free:
        assert is_free
    one_cycle(make(), KeepRun(tmp_path))


def test_range_tests_and_predictions_leave_the_folder_alone(make, tmp_path):
    learn = make(cbs=KeepRun(tmp_path / "run"))
    learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
    assert not (tmp_path / "run").exists()
