"""Every schedule in a real fit: the learning rate and momentum that the optimizer steps with, computed by hand."""

import math

import pytest
from fastai.callback.core import Callback
from tiny_net import TinyNet

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.settings import Settings
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import fit_scheduled, one_cycle, step_lr


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


def steps_of(images, loss=None, **values):
    """The rates and momenta of a fit on the 48 train images: 4 steps an epoch, so 20 in 5 epochs."""
    settings = Settings(**dict(epochs=5, lr=0.8) | values)
    dls = cifar_dls(images, bs=12, valid_pct=settings.valid_pct, device="cpu", padding=0, cutout=0)
    learn = cifar_learner(dls, TinyNet(), momentum=settings.momentum, precision="fp32")
    learn.loss_func = loss or learn.loss_func
    steps = Steps()
    with learn.no_bar(), learn.no_logging():
        fit_scheduled(learn, settings, settings.lr, [steps])
    return steps.lrs, steps.moms


def cos(start, end, part):
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


CYCLE = dict(sched="one-cycle", peak_epoch=1.0, div=8.0, div_final=80.0, mom_min=0.8)
LAST = 15 / 16  # of the way down from step 4: the run ends with the step
BY_HAND = [
    (
        CYCLE | dict(anneal="cos"),
        {0: 0.1, 2: 0.45, 4: 0.8, 8: cos(0.8, 0.01, 1 / 4), 12: 0.405, 19: cos(0.8, 0.01, LAST)},
        {0: 0.9, 2: 0.85, 4: 0.8, 8: cos(0.8, 0.9, 1 / 4), 12: 0.85, 19: cos(0.8, 0.9, LAST)},
    ),
    (
        CYCLE | dict(anneal="linear"),
        {0: 0.1, 1: 0.275, 2: 0.45, 3: 0.625, 4: 0.8, 8: 0.6025, 12: 0.405, 19: 0.059375},
        {0: 0.9, 1: 0.875, 2: 0.85, 4: 0.8, 8: 0.825, 12: 0.85, 19: 0.89375},
    ),
    (CYCLE | dict(mom_min=None, div_final=8.0, anneal="linear"), {0: 0.1, 4: 0.8, 19: 0.8 - LAST * 0.7}, 0.9),
    (CYCLE | dict(mom_min=None, div_final=8.0), {0: 0.1, 4: 0.8, 19: cos(0.8, 0.1, LAST)}, 0.9),
    (
        dict(sched="flat-cos", pct_start=0.5, div_final=8.0),
        dict.fromkeys(range(11), 0.8) | {12: cos(0.8, 0.1, 0.2), 15: 0.45, 19: cos(0.8, 0.1, 0.9)},
        0.9,
    ),
    (dict(sched="step", step_size=2, gamma=0.5), dict(enumerate([0.8] * 8 + [0.4] * 8 + [0.2] * 4)), 0.9),
    (dict(sched="none"), dict.fromkeys(range(20), 0.8), 0.9),
]


@pytest.mark.parametrize("values, lrs, moms", BY_HAND)
def test_rates_and_momenta_by_hand(tiny_images, values, lrs, moms):
    all_lrs, all_moms = steps_of(tiny_images, **values)
    moms = moms if isinstance(moms, dict) else dict.fromkeys(range(20), moms)
    assert len(all_lrs) == 20
    assert {step: all_lrs[step] for step in lrs} == pytest.approx(lrs)
    assert {step: all_moms[step] for step in moms} == pytest.approx(moms)


@pytest.mark.parametrize(
    "values, peak", [(dict(pct_start=0.01, anneal="linear"), 1), (dict(pct_start=0.99), 19), (dict(peak_epoch=2.5), 10)]
)
def test_the_peak_is_where_the_settings_put_it(tiny_images, values, peak):
    lrs, _ = steps_of(tiny_images, sched="one-cycle", **values)
    assert lrs.index(max(lrs)) == peak
    assert lrs[:peak] == sorted(lrs[:peak]) and lrs[peak:] == sorted(lrs[peak:], reverse=True)
    assert one_cycle(0.2, 0.08, 0.8, 0.08)(1.0) == pytest.approx(0.08)


@pytest.mark.parametrize("n_iter", [1, 3, 7, 97, 391])
@pytest.mark.parametrize("n_epoch", [1, 20, 24, 200])
def test_a_step_down_comes_with_its_epoch_whatever_rounding_does(n_iter, n_epoch):
    schedule, pct = step_lr(1.0, n_epoch, 6, 0.1), 0.0
    for epoch in range(n_epoch):
        first, last = pct, 0.0
        for _ in range(n_iter):  # as fastai's TrainEvalCallback counts
            last = pct
            pct += 1.0 / (n_iter * n_epoch)
        assert schedule(first) == schedule(last) == pytest.approx(0.1 ** (epoch // 6))


def test_plateau_falls_where_the_loss_stays_and_not_where_it_falls(tiny_images):
    """With patience 1 the first epoch is the best, one without a better loss passes, the second makes it fall."""
    plateau = dict(sched="plateau", gamma=0.5, plateau_patience=1, valid_pct=0.25, epochs=7)
    lrs, moms = steps_of(tiny_images, lambda out, y: (out * 0).sum() + 1, **plateau)
    assert lrs[:: len(lrs) // 7] == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]) and set(moms) == {0.9}
    losses = iter(range(10**6, 0, -100))
    assert set(steps_of(tiny_images, lambda out, y: (out * 0).sum() + next(losses), **plateau)[0]) == {0.8}
