"""The learner's optimizers and its one cycle, beside torch's and fastai's own; what a user may replace."""

from functools import partial

import pytest
import torch
from fastai.learner import Learner, Recorder
from fastai.metrics import error_rate
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.settings import TORCH_OPTIMIZERS, choices
from cifar_fastai.training.learner import cifar_learner


@pytest.fixture
def dls(tiny_images):
    return cifar_dls(tiny_images, bs=8, device="cpu")


def fit(learn, fit_one_cycle=None, n_epoch=1, **arguments):
    with learn.no_bar(), learn.no_logging():
        (fit_one_cycle or type(learn).fit_one_cycle)(learn, n_epoch, **arguments)
    return learn


@pytest.mark.parametrize("opt", choices("opt"))
def test_every_optimizer_trains_under_a_cycle(dls, tiny_model, opt):
    learn = cifar_learner(dls, tiny_model, opt=opt, lr=1e-3, momentum=0.8)
    before = torch.cat([p.detach().flatten().clone() for p in tiny_model.parameters()])
    fit(learn, lr_max=1e-3)
    after = torch.cat([p.detach().flatten() for p in tiny_model.parameters()])
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert isinstance(learn.opt, OptimWrapper) == (opt in TORCH_OPTIMIZERS)
    assert float(learn.opt.hypers[-1]["mom"]) == pytest.approx(0.8)


CYCLE = dict(div=7.0, div_final=70.0, pct_start=0.4, moms=(0.95, 0.85, 0.9))


@pytest.mark.parametrize("arguments", [dict(), CYCLE, dict(lr_max=slice(0.01, 0.1))])
def test_the_one_cycle_is_fastais_to_the_number(dls, tiny_model, arguments):
    seen = []
    for fit_one_cycle in (Learner.fit_one_cycle, None):
        learn = fit(cifar_learner(dls, tiny_model, lr=0.1), fit_one_cycle, 2, **arguments)
        seen.append((learn.recorder.hps["lr"], learn.recorder.hps["mom"], [h["lr"] for h in learn.opt.hypers]))
    for theirs, ours in zip(*seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(opt="adamz"), "opt='adamz': no such name; did you mean adam"),
        (dict(momentum=1.0), "momentum=1.0: must be at least 0 and below 1"),
        (dict(wd="much"), "wd='much': must be a number"),
        (dict(label_smoothing=1.0), "label_smoothing=1.0: must be at least 0 and below 1"),
        (dict(precision="bf61"), "precision='bf61': no such name; did you mean bf16"),
        (dict(nesterov="maybe"), "nesterov='maybe': no such name"),
    ],
)
def test_wrong_arguments_are_named(dls, tiny_model, arguments, message):
    with pytest.raises(InputError) as error:
        cifar_learner(dls, tiny_model, **arguments)
    assert str(error.value).startswith(message)
    with pytest.raises(InputError, match="div=0.5: must be at least 1"):
        cifar_learner(dls, tiny_model).fit_one_cycle(1, div=0.5)


def test_what_a_user_gives_replaces_ours(dls, tiny_model):
    loss, opt_func, moms = nn.CrossEntropyLoss(), partial(Adam, eps=1e-3), (0.7, 0.6, 0.7)
    learn = cifar_learner(dls, tiny_model, metrics=error_rate, loss_func=loss, opt_func=opt_func, moms=moms)
    fit(learn)
    assert learn.loss_func is loss and learn.opt.hypers[0]["eps"] == 1e-3
    assert learn.recorder.metric_names[3:5] == ["valid_loss", "valid_error_rate"] and learn.history.moms[0] == 0.7
    assert learn.history.rows[0]["valid_accuracy"] is None, "an error rate is no accuracy"


def test_all_groups_of_a_users_splitter_decay(dls, tiny_model):
    def head_last(model):
        return [[model.conv1.weight], list(model.linear.parameters())]

    learn = fit(cifar_learner(dls, tiny_model, splitter=head_last, wd=0.1))
    assert [group["weight_decay"] for group in learn.opt.opt.param_groups] == [0.1, 0.1]


def test_fastais_default_callbacks_replace_ours(dls, tiny_model):
    learn = fit(cifar_learner(dls, tiny_model, default_cbs=True))
    assert type(learn.recorder) is Recorder and len(learn._grab_cbs(Recorder)) == 1
    assert learn.history.rows[0]["valid_accuracy"] == learn.recorder.values[0][-1]
