"""The learner's optimizers and its one cycle, beside torch's and fastai's own; what a user may replace."""

from functools import partial
from inspect import signature

import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import Learner, Recorder
from fastai.metrics import error_rate
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.models import create_model
from cifar_fastai.recipes import RECIPES
from cifar_fastai.settings import OPTIONS, TORCH_OPTIMIZERS, Settings, choices
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
    assert learn.recorder.metric_names[2:4] == ["valid_loss", "error_rate"] and learn.history.moms[0] == 0.7
    row = learn.history.rows[0]
    assert "valid_accuracy" not in row and [row["valid_loss"], row["valid_error_rate"]] == learn.recorder.values[0][1:3]


def body_last(model):
    return [list(model.linear.parameters()), [model.conv1.weight, *model.bn1.parameters()]]


@pytest.mark.parametrize("wd_bn_bias, rest", [(False, 0.0), (True, 0.1)])
def test_the_groups_are_those_of_the_splitter_and_norms_and_biases_do_not_decay(dls, tiny_model, wd_bn_bias, rest):
    learn = fit(cifar_learner(dls, tiny_model, splitter=body_last, wd=0.1, wd_bn_bias=wd_bn_bias), lr_max=slice(1, 4))
    groups, opt = learn.opt.opt.param_groups, learn.opt
    assert [[tuple(p.shape) for p in params] for params in opt.param_lists] == [
        [(3, 4), (3,)],
        [(4, 3, 3, 3), (4,), (4,)],
    ]
    assert [hyper["wd"] for hyper in opt.hypers] == [0.1, 0.1]
    assert opt.hypers[1]["lr"] == pytest.approx(4 * opt.hypers[0]["lr"]) and type(groups[3]["lr"]) is float
    assert [(p.ndim > 1, group["weight_decay"]) for group in groups for p in group["params"]] == [
        *[(True, 0.1), (False, rest)],
        *[(True, 0.1), (False, rest), (False, rest)],
    ]
    opt.hypers[1]["lr"] = 7.0  # as ReduceLROnPlateau does
    assert [group["lr"] for group in groups[2:]] == [7.0, 7.0] and None not in opt.hypers[0].values()


def test_a_default_rate_may_be_a_slice(dls, tiny_model):
    learn = cifar_learner(dls, tiny_model, splitter=body_last, lr=slice(0.001, 0.1))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert [hyper["lr"] for hyper in learn.opt.hypers] == pytest.approx([0.001, 0.1]) and learn.settings["lr"] == 0.1


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("opt", ["muon", "adam", "ranger"])
def test_freezing_leaves_the_head_and_what_fastai_leaves(dls, opt):
    """As fastai's own learners do, it goes on training the norms, too."""
    learn = cifar_learner(dls, "custom_resnet", opt=opt)
    norms = {
        f"{n}.{k}" for n, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d) for k in ("weight", "bias")
    }
    learn.freeze()
    assert trainable(learn.model) == norms | {"linear.weight", "linear.bias"} and len(learn.opt.param_lists) == 2
    learn.unfreeze()
    assert trainable(learn.model) == {name for name, _ in learn.model.named_parameters()}
    own = cifar_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 3, bias=False)), opt=opt, lr=1e-4)
    assert len(fit(own).opt.param_lists) == 1, "a network of one's own is one group"


def test_defaults_are_those_of_the_networks_recipe(dls, tiny_model):
    shown = {name: p.default for name, p in signature(cifar_learner).parameters.items() if name in OPTIONS}
    names = {*shown} - {"precision", "model"}
    for name in ("resnet18", "resnet34", "custom_resnet"):
        learn, recipe = cifar_learner(dls, name, width=16), RECIPES[name].to_dict()
        for key in names - {"lr", "width"}:
            assert learn.settings[key] == recipe[key], (name, key)
        assert learn.lr == (1e-3 if name == "custom_resnet" else recipe["lr"]) and learn.loss_func.activation
        same = cifar_learner(dls, create_model(name, 3, 2))
        assert {key: same.settings[key] for key in names} == {key: learn.settings[key] for key in names - {"width"}} | {
            "width": 64
        }
    assert {key: shown[key] for key in names} == {key: RECIPES["resnet18"].to_dict()[key] for key in names}
    own = cifar_learner(dls, tiny_model)
    assert {key: own.settings[key] for key in names} == {key: Settings().to_dict()[key] for key in names}
    assert [cifar_learner(dls, "resnet18", width=16, opt=opt).lr for opt in ("sgd", "adamw")] == [0.1, 1e-3]


@pytest.mark.parametrize("monitor", ["accuracy", "valid_accuracy", "valid_loss", "train_accuracy"])
def test_a_callback_monitors_what_the_history_and_what_fastai_calls_it(dls, tiny_model, monitor, tmp_path):
    learn, saved = cifar_learner(dls, tiny_model, path=tmp_path), SaveModelCallback(monitor=monitor)
    fit(learn, cbs=saved)
    row = learn.history.rows[0]
    assert saved.best == pytest.approx(row.get(monitor, row.get(f"valid_{monitor}")))
    names = "train_loss, valid_loss, accuracy, train_accuracy"
    with pytest.raises(InputError, match=f"monitor='f2': no such name; choose from {names}"):
        fit(learn, cbs=EarlyStoppingCallback(monitor="f2"))


def test_fastais_default_callbacks_replace_ours(dls, tiny_model):
    learn = fit(cifar_learner(dls, tiny_model, default_cbs=True))
    assert type(learn.recorder) is Recorder and len(learn._grab_cbs(Recorder)) == 1
    assert learn.history.rows[0]["valid_accuracy"] == learn.recorder.values[0][-1]
