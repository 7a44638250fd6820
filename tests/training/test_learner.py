"""The learner's optimizers and its one cycle, beside torch's and fastai's own."""

import pytest
import torch
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.names import FASTAI_OPTIMIZERS, TORCH_OPTIMIZERS
from cifar_fastai.training.learner import cifar_learner


@pytest.fixture
def dls(tiny_images):
    return cifar_dls(tiny_images, bs=8, device="cpu")


@pytest.mark.parametrize("opt", TORCH_OPTIMIZERS + FASTAI_OPTIMIZERS)
def test_every_optimizer_trains_under_a_cycle(dls, tiny_model, opt):
    learn = cifar_learner(dls, tiny_model, opt=opt, lr=1e-3, momentum=0.8)
    before = torch.cat([p.detach().flatten().clone() for p in tiny_model.parameters()])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
    after = torch.cat([p.detach().flatten() for p in tiny_model.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert isinstance(learn.opt, OptimWrapper) == (opt in TORCH_OPTIMIZERS)
    assert float(learn.opt.hypers[-1]["mom"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(div=7.0, div_final=70.0, pct_start=0.4, moms=(0.95, 0.85, 0.9)), dict(lr_max=slice(0.01, 0.1))],
)
def test_the_one_cycle_is_fastais_to_the_number(dls, tiny_model, settings):
    seen = []
    for fit in (Learner.fit_one_cycle, None):
        learn = cifar_learner(dls, tiny_model, lr=0.1)
        with learn.no_bar(), learn.no_logging():
            fit(learn, 2, **settings) if fit else learn.fit_one_cycle(2, **settings)
        seen.append((learn.recorder.hps["lr"], learn.recorder.hps["mom"], [h["lr"] for h in learn.opt.hypers]))
    for theirs, ours in zip(*seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_unknown_optimizer_is_answered_with_the_near_one(dls, tiny_model):
    with pytest.raises(InputError, match="--opt adamz: no such name; did you mean adam"):
        cifar_learner(dls, tiny_model, opt="adamz")
