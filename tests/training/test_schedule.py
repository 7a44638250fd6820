"""Every schedule in a real fit: the learning rate and momentum that the optimizer steps with, worked out by hand."""

import math

import pytest
import torch
from conftest import TinyNet
from fastai.callback.core import Callback

from cifar_fastai.config import Recipe, resolve
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import StepLR, fit_scheduled, one_cycle, peak_fraction

torch.set_num_threads(1)
RECIPE = Recipe("test", dict(epochs=5, lr=0.8))


class Steps(Callback):
    """The learning rate and momentum of every step, out of torch's own optimizer as it is about to step."""

    order = 99

    def __init__(self):
        self.lrs, self.moms = [], []

    def before_step(self):
        groups = self.opt.opt.param_groups
        (lr,), (mom,) = ({group[key] for group in groups} for key in ("lr", "momentum"))  # all groups alike
        self.lrs.append(lr)
        self.moms.append(mom)


def constant(out, y):
    """A loss that nothing changes."""
    return (out * 0).sum() + 1


def steps_of(images, loss=None, bs=12, **given):
    """The `Steps` of a fit on the 48 train images: 4 steps an epoch, so 20 in 5 epochs."""
    cfg = resolve(RECIPE, given)
    dls = cifar_dls(images, bs=bs, valid_pct=cfg.valid_pct, device="cpu", padding=0, cutout=0)
    learn = cifar_learner(dls, TinyNet(), momentum=cfg.momentum, precision="fp32")
    learn.loss_func = loss or learn.loss_func
    steps = Steps()
    with learn.no_bar(), learn.no_logging():
        fit_scheduled(learn, cfg, cfg.lr, [steps])
    return steps


def cos(start, end, part):
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


CYCLE = dict(sched="one-cycle", peak_epoch=1.0, div=8.0, div_final=80.0, mom_min=0.8)


def test_one_cycle_in_cosines(tiny_images):
    steps = steps_of(tiny_images, **CYCLE, anneal="cos")
    assert len(steps.lrs) == 20
    expected = {0: 0.1, 2: 0.45, 4: 0.8, 8: cos(0.8, 0.01, 1 / 4), 12: 0.405, 19: cos(0.8, 0.01, 15 / 16)}
    assert {step: steps.lrs[step] for step in expected} == pytest.approx(expected)
    expected = {0: 0.9, 2: 0.85, 4: 0.8, 8: cos(0.8, 0.9, 1 / 4), 12: 0.85, 19: cos(0.8, 0.9, 15 / 16)}
    assert {step: steps.moms[step] for step in expected} == pytest.approx(expected)


def test_one_cycle_in_straight_lines(tiny_images):
    steps = steps_of(tiny_images, **CYCLE, anneal="linear")
    expected = {0: 0.1, 1: 0.275, 2: 0.45, 3: 0.625, 4: 0.8, 8: 0.6025, 12: 0.405, 19: 0.059375}
    assert {step: steps.lrs[step] for step in expected} == pytest.approx(expected)
    expected = {0: 0.9, 1: 0.875, 2: 0.85, 4: 0.8, 8: 0.825, 12: 0.85, 19: 0.89375}
    assert {step: steps.moms[step] for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_momentum_stays_where_it_is_not_told_to_cycle(tiny_images, anneal):
    assert set(steps_of(tiny_images, sched="one-cycle", anneal=anneal, momentum=0.7).moms) == {0.7}


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_without_annihilation_it_ends_where_it_began(tiny_images, anneal):
    steps = steps_of(tiny_images, sched="one-cycle", peak_epoch=1.0, div=10.0, div_final=10.0, anneal=anneal)
    assert steps.lrs[0] == pytest.approx(0.08) and min(steps.lrs) == steps.lrs[0]
    down = steps.lrs[4:]  # 16 steps to 0.08: the last stands at 15/16 of the way, as the run ends with the step
    last = cos(0.8, 0.08, 15 / 16) if anneal == "cos" else 0.8 - 15 / 16 * 0.72
    assert down[-1] == pytest.approx(last)
    assert one_cycle(0.2, 0.08, 0.8, 0.08, anneal)(1.0) == pytest.approx(0.08)


@pytest.mark.parametrize(
    "given, peak",
    [
        (dict(pct_start=0.5), 10),
        (dict(pct_start=0.01, anneal="linear"), 1),
        (dict(pct_start=0.99), 19),
        (dict(peak_epoch=2.5, anneal="linear"), 10),
        (dict(peak_epoch=4.75), 19),
        ({}, 5),
    ],
)
def test_the_peak_is_where_it_was_asked_for(tiny_images, given, peak):
    lrs = steps_of(tiny_images, sched="one-cycle", **given).lrs
    assert lrs.index(max(lrs)) == peak
    assert lrs[:peak] == sorted(lrs[:peak]) and lrs[peak:] == sorted(lrs[peak:], reverse=True)


def test_an_explicit_place_of_the_peak_goes_before_the_preset_one():
    assert peak_fraction(resolve(Recipe("test", dict(peak_epoch=5.0)), dict(pct_start=0.4))) == 0.4
    assert peak_fraction(resolve(Recipe("test"), dict(preset="amitkml", peak_epoch=6.0))) == 0.25
    assert peak_fraction(resolve(Recipe("test"), dict(preset="amitkml", epochs=48))) == pytest.approx(10 / 48)


def test_flat_then_cosine(tiny_images):
    steps = steps_of(tiny_images, sched="flat-cos", pct_start=0.5, div_final=8.0)
    assert steps.lrs[:11] == pytest.approx([0.8] * 11)
    expected = {12: cos(0.8, 0.1, 0.2), 15: 0.45, 19: cos(0.8, 0.1, 0.9)}
    assert {step: steps.lrs[step] for step in expected} == pytest.approx(expected)
    assert set(steps.moms) == {0.9}


def test_steps_down(tiny_images):
    steps = steps_of(tiny_images, sched="step", step_size=2, gamma=0.5)
    assert steps.lrs == pytest.approx([0.8] * 8 + [0.4] * 8 + [0.2] * 4)
    assert set(steps.moms) == {0.9}


@pytest.mark.parametrize("n_iter", [1, 3, 7, 97, 391])
@pytest.mark.parametrize("n_epoch", [1, 20, 24, 200])
def test_a_step_down_comes_with_its_epoch_whatever_rounding_does(n_iter, n_epoch):
    schedule, pct = StepLR(1.0, n_epoch, 6, 0.1), 0.0
    for epoch in range(n_epoch):
        first, last = pct, 0.0
        for _ in range(n_iter):  # as fastai's TrainEvalCallback counts
            last = pct
            pct += 1.0 / (n_iter * n_epoch)
        assert schedule(first) == schedule(last) == pytest.approx(0.1 ** (epoch // 6))


def test_none_leaves_it_alone(tiny_images):
    steps = steps_of(tiny_images, sched="none")
    assert set(steps.lrs) == {0.8} and set(steps.moms) == {0.9} and len(steps.lrs) == 20


def by_epoch(steps):
    n_iter = len(steps.lrs) // 7
    return [steps.lrs[n_iter * epoch] for epoch in range(7)]


def test_plateau_falls_where_the_loss_stays(tiny_images):
    """With patience 1 the first epoch is the best, one without a better loss is let pass, the second makes it fall."""
    given = dict(sched="plateau", gamma=0.5, plateau_patience=1, valid_pct=0.25, epochs=7)
    steps = steps_of(tiny_images, constant, **given)
    assert by_epoch(steps) == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2])
    assert set(steps.moms) == {0.9}


def test_plateau_stays_where_the_loss_falls(tiny_images):
    losses = iter(range(10**6, 0, -100))
    steps = steps_of(
        tiny_images,
        lambda out, y: (out * 0).sum() + next(losses),
        sched="plateau",
        gamma=0.5,
        plateau_patience=1,
        valid_pct=0.25,
        epochs=7,
    )
    assert set(steps.lrs) == {0.8}
