"""A run that was interrupted and resumed is the run that was not: the same history, weights, momenta and metrics."""

import os
import signal

import pytest
import torch
from processes import history, metrics, same
from tiny_recipe import draw_nothing, strike, use_tiny_net

from cifar_fastai import train as train_module
from cifar_fastai.checkpoint import load_checkpoint
from cifar_fastai.config import Recipe
from cifar_fastai.outputs import write_results
from cifar_fastai.signals import Stopped
from cifar_fastai.train import train

RECIPE = Recipe("resnet18", dict(epochs=3, bs=8, lr=0.15, cutout=8, device="cpu", compile="no"))
STEPS = 6  # an epoch, of 48 images


class Tiny:
    """Runs in this process, on the tiny network, without pictures."""

    def __init__(self, data, monkeypatch):
        self.data, self.patch = data, monkeypatch
        use_tiny_net(monkeypatch.setattr)
        draw_nothing(monkeypatch.setattr)

    def train(self, out, stop=None, **given):
        """Train into `out`; `stop` = (point, n) sends a SIGTERM there. The run, or None after the signal."""
        return self._run(dict(data=str(self.data), out=str(out), bs=8) | given, stop)

    def resume(self, out, stop=None, **given):
        return self._run(dict(resume=str(out)) | given, stop)

    def _run(self, given, stop):
        done = []

        def write_results_too(run):
            run.last = load_checkpoint(run.folder / "checkpoint.pth")
            write_results(run)
            done.append(run)

        with self.patch.context() as patch:
            patch.setattr(train_module, "write_results", write_results_too)
            if stop:
                strike(*stop, lambda: os.kill(os.getpid(), signal.SIGTERM), patch.setattr)
            try:
                train(RECIPE, given)
            except Stopped as stopped:
                assert stop and stopped.signum == signal.SIGTERM
                return None
        return done[0]


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    torch.set_num_threads(1)
    return Tiny(tiny_folder, monkeypatch)


def assert_same_state(one, other):
    """Two checkpoints: weights, momenta, averages, counters, random states, all but the clock."""
    for key in ("epoch", "model", "opt", "callbacks", "random", "lrs", "moms", "train_iter"):
        assert same(one[key], other[key]), key


def assert_same_run(one, other):
    assert history(one.folder) == history(other.folder)
    assert metrics(one.folder) == metrics(other.folder)
    assert_same_state(one.last, other.last)
    assert same(dict(one.learn.model.state_dict()), dict(other.learn.model.state_dict()))
    for name in ("model.pth", "best.pth"):
        files = [run.folder / name for run in (one, other) if (run.folder / name).exists()]
        assert len(files) != 1
        if files:
            assert same(*(dict(torch.load(path, weights_only=True)) for path in files))
    assert (one.folder / "predictions.csv").read_bytes() == (other.folder / "predictions.csv").read_bytes()


VARIANTS = {
    "one cycle": {}, "linear": dict(anneal="linear", peak_epoch=1.5), "cycled momentum": dict(mom_min=0.85),
    "flat-cos": dict(sched="flat-cos", pct_start=0.5), "step": dict(sched="step", step_size=1, gamma=0.5),
    "plateau": dict(sched="plateau", plateau_patience=0, gamma=0.5, valid_pct=0.25, epochs=5),
    "constant": dict(sched="none"), "lr find": dict(lr="find", lr_suggest="steep"),
    "mixup": dict(mixup=0.4), "cutmix": dict(cutmix=1.0), "ema": dict(ema=0.9), "ema, mixup": dict(ema=0.9, mixup=0.2),
    "save best": dict(valid_pct=0.25, save_best=True, epochs=4),
    "patience": dict(valid_pct=0.25, save_best=True, patience=1, epochs=8, sched="none"),
    "penalties": dict(l1=1e-4, clip=0.5, label_smoothing=0.1), "clip value": dict(clip_value=0.01),
    "all augmentations": dict(max_holes=3, cutout_p=0.5, rotate=15.0, vflip=0.5, pad_mode="reflect"),
    "subset": dict(subset=40, wd_bn_bias="yes"), "bf16": dict(precision="bf16"),
    "tensorboard": dict(tensorboard=True),
}  # fmt: skip
OPTIMIZERS = ("adam", "adamw", "rmsprop", "radam", "qhadam", "larc", "lamb", "ranger")


@pytest.mark.parametrize("given", [*VARIANTS.values(), *(dict(opt=opt, lr=0.01) for opt in OPTIMIZERS)],
                         ids=[*VARIANTS, *OPTIMIZERS])  # fmt: skip
def test_stopped_within_an_epoch_and_before_the_results(tiny, tmp_path, given):
    whole = tiny.train(tmp_path / "whole", **given)
    out = tmp_path / "parts"
    point = "history" if given.get("lr") == "find" else "validate"  # a range test validates, too
    assert tiny.train(out, stop=(point, 2), **given) is None
    assert len(history(out)) == load_checkpoint(out / "checkpoint.pth")["epoch"] == (2 if point == "history" else 1)
    assert tiny.resume(out, stop=("results", 1)) is None
    assert (out / "checkpoint.pth").exists() and not (out / "metrics.json").exists()
    parts = tiny.resume(out)
    assert_same_run(whole, parts)
    assert len(parts.log.lrs) == len(history(out)) * len(whole.learn.dls.train)
    assert not (out / "checkpoint.pth").exists()
