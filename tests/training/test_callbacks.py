"""Regularisers and guards in real fits: gradients, averages and decay against numbers computed by hand."""

import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Metric
from tiny_net import TinyNet
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import RunError
from cifar_fastai.settings import Settings
from cifar_fastai.training.callbacks import ClipValue, KeepBest, L1Penalty, StopOnBadLoss, WeightAverage
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import fit_scheduled


class Watch(Callback):
    """Gradients as the optimizer takes them, and the weights after every step."""

    order = 75  # after all that changes gradients, before the average is taken

    def before_fit(self):
        self.grads, self.weights, self.evaluated = [], [], []

    def before_step(self):
        self.grads.append({name: p.grad.clone() for name, p in self.model.named_parameters()})

    def after_batch(self):
        if self.training:
            self.weights.append(copy.deepcopy(self.model.state_dict()))

    def after_pred(self):
        if not self.training:
            self.evaluated.append(copy.deepcopy(self.model.state_dict()))


def nothing(out, y):
    """A loss without a gradient: what is left are penalties and decay."""
    return (out * 0).sum()


@pytest.fixture
def learner(tiny_images):
    """Make a learner on the 48 train images, 4 steps an epoch, in order and without augmentation."""

    def make(cbs=(), model=None, loss=None, **kwargs):
        torch.manual_seed(0)
        dls = cifar_dls(tiny_images, bs=12, val_bs=18, device="cpu", padding=0, cutout=0, flip=0.0)
        dls.train.shuffle = False
        settings = dict(lr=0.1, momentum=0.0, nesterov=False, wd=0.0, precision="fp32") | kwargs
        learn = cifar_learner(dls, model or TinyNet(), cbs=[*cbs, Watch()], **settings)
        learn.loss_func = loss or learn.loss_func
        learn.remove_cb(learn.progress)
        return learn

    return make


def fit(learn, n_epoch=1, lr=0.1, **kwargs):
    with learn.no_logging():
        learn.fit(n_epoch, lr, **kwargs)
    return learn.watch


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda text, name=name: f"{name}: {text}")


# L1 -------------------------------------------------------------------------------------------------------------------


def test_l1_adds_the_sign_of_every_weight_but_not_of_bn_and_biases(learner):
    without, learn = learner(), learner([L1Penalty(0.5)])
    weights = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    bare, grads = fit(without).grads[0], fit(learn).grads[0]
    assert {name for name, p in weights.items() if p.ndim > 1} == {"conv1.weight", "layer1.1.weight", "linear.weight"}
    for name in grads:
        extra = 0.5 * weights[name].sign() if weights[name].ndim > 1 else 0
        torch.testing.assert_close(grads[name], bare[name] + extra)


def test_l1_is_not_in_the_loss_that_is_reported(learner):
    learn = learner([L1Penalty(1000.0)], loss=nothing)
    fit(learn, lr=0.0)
    assert learn.recorder.values[-1][0] == 0


# clipping -------------------------------------------------------------------------------------------------------------


def blown_up(out, y):
    return nn.functional.cross_entropy(out, y) * 1000


def test_clip_value_bounds_every_component(learner):
    bare = fit(learner(loss=blown_up), lr=0.0).grads[0]
    grads = fit(learner([ClipValue(0.5)], loss=blown_up), lr=0.0).grads[0]
    assert max(grad.abs().max() for grad in bare.values()) > 5
    assert_same(grads, {name: grad.clamp(-0.5, 0.5) for name, grad in bare.items()})


# WeightAverage --------------------------------------------------------------------------------------------------------


def averages(start, weights, decay):
    """By hand: the average after every step, from the weights that it starts from and those after each step."""
    average, out = {name: value.double() for name, value in start.items()}, []
    for n, raw in enumerate(weights):
        d = min(decay, (1 + n) / (10 + n))
        shares = {name: d if value.is_floating_point() else 0 for name, value in raw.items()}
        average = {name: d * average[name] + (1 - d) * raw[name].double() for name, d in shares.items()}
        out.append({name: value.to(start[name].dtype) for name, value in average.items()})
    return out


@pytest.mark.parametrize("decay", [0.25, 0.99])
def test_average_is_the_one_by_hand_warm_up_included(learner, decay):
    learn = learner([WeightAverage(decay)])
    start = copy.deepcopy(learn.model.state_dict())
    watch = fit(learn, 3, lr=0.3)
    expected = averages(start, watch.weights, decay)
    assert len(expected) == 12 and len(watch.evaluated) == 3
    for epoch in range(3):  # what is evaluated is the average
        assert_same(watch.evaluated[epoch], expected[4 * epoch + 3])
    assert_same(learn.model.state_dict(), expected[-1])  # and so is what is left
    raw = watch.weights[-1]
    assert not torch.allclose(raw["linear.weight"], expected[-1]["linear.weight"], atol=1e-3)
    assert not torch.allclose(raw["bn1.running_mean"], expected[-1]["bn1.running_mean"], rtol=1e-2)
    assert raw["bn1.num_batches_tracked"] == expected[-1]["bn1.num_batches_tracked"] == 12


def test_training_goes_on_with_the_raw_weights(learner):
    """An average changes nothing about the training: every step's weights are those of a run without it."""
    plain, averaged = fit(learner(), 3), fit(learner([WeightAverage(0.99)]), 3)
    for first, second in zip(plain.weights, averaged.weights, strict=True):
        assert_same(first, second)


# StopOnBadLoss --------------------------------------------------------------------------------------------------------


class BadAt:
    """A loss that is `value` at some steps, counted from 1 over the epochs, and in evaluation always a number."""

    def __init__(self, value, *steps):
        self.value, self.steps, self.n = value, steps, 0

    def __call__(self, out, y):
        if len(y) == 12:
            self.n += 1
        return (out * 0).sum() + (self.value if self.n in self.steps else 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_names_the_first_bad_step_within_its_epoch(learner, value):
    settings = Settings(epochs=3, lr=0.8, sched="step", step_size=1, gamma=0.1)
    learn = learner([StopOnBadLoss()], loss=BadAt(value, 6, 7))
    with learn.no_logging(), pytest.raises(RunError, match=r"since step 2 of epoch 2 \(lr 0\.08\); try a lower `lr`"):
        fit_scheduled(learn, settings, 0.8)
    assert len(learn.watch.weights) == 8 and len(learn.watch.evaluated) == 1, "the second epoch is not evaluated"


def test_stops_at_the_bad_step_where_it_looks_at_every_one(learner, monkeypatch):
    monkeypatch.setattr("cifar_fastai.training.callbacks.Bounded.due", lambda self, *args: True)
    learn = learner([StopOnBadLoss()], loss=BadAt(float("nan"), 3))
    with pytest.raises(RunError, match=r"since step 3 of epoch 1 \(lr 0\.1\)") as caught:
        fit(learn, 2)
    assert len(learn.watch.grads) == 3 and "\n" not in str(caught.value) and caught.value.status == 1


def test_a_bad_last_step_is_seen(learner):
    with pytest.raises(RunError, match="step 4 of epoch 1"):
        fit(learner([StopOnBadLoss()], loss=BadAt(float("nan"), 4)))


def test_callbacks_rest_in_range_tests_and_predictions(learner, tmp_path):
    cbs = [StopOnBadLoss(), WeightAverage(0.99), KeepBest(tmp_path / "best.pth", patience=1)]
    learn = learner(cbs, loss=BadAt(float("nan"), 3), path=tmp_path)
    with learn.no_logging():
        learn.lr_find(num_it=8, show_plot=False)
        assert len(learn.recorder.lrs) == 8, "it went on after the bad loss"
        learn.get_preds()
        learn.summary()
    assert learn.weight_average.average is None and learn.history.rows == learn.history.lrs == []
    assert learn.keep_best.best == -1 and not (tmp_path / "best.pth").exists()


def test_callbacks_work_again_after_an_interrupted_range_test(learner, tmp_path):
    class Interrupt(Callback):
        def after_step(self):
            raise KeyboardInterrupt

    learn = learner(path=tmp_path)
    with learn.no_logging(), pytest.raises(KeyboardInterrupt), learn.added_cbs(Interrupt()):
        learn.lr_find(num_it=8, show_plot=False)
    fit(learn)
    assert len(learn.history.rows) == 1


# KeepBest -------------------------------------------------------------------------------------------------------------


class ByEpoch(Metric):
    """A metric with given values."""

    name = "accuracy"

    def __init__(self, *values):
        self.values = values

    def reset(self):
        pass

    def accumulate(self, learn):
        self.learn = learn

    @property
    def value(self):
        return self.values[self.learn.epoch]


def test_keep_best_keeps_the_best_weights_and_stops_after_its_patience(learner, tmp_path, capsys):
    accuracy = ByEpoch(0.5, 0.7, 0.6, 0.7, 0.9)
    learn = learner([KeepBest(tmp_path / "best.pth", patience=2)], metrics=accuracy)
    watch = fit(learn, 5)
    assert [row["valid_accuracy"] for row in learn.history.rows] == [0.5, 0.7, 0.6, 0.7]
    assert capsys.readouterr().out == "stopped: 2 epochs without a better validation accuracy than 70.00%\n"
    assert_same(torch.load(tmp_path / "best.pth", weights_only=True), watch.weights[7])


# weight decay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("of_fit", [False, True], ids=["of the learner", "of the fit"])
@pytest.mark.parametrize("wd_bn_bias", [False, True])
def test_decay_leaves_batch_norm_and_biases_out(learner, opt, of_fit, wd_bn_bias):
    """Nothing else moves the parameters, all 1 before, in the 4 steps of an epoch."""
    learn = learner(loss=nothing, opt=opt, wd=0.0 if of_fit else 0.5, momentum=0.0, wd_bn_bias=wd_bn_bias)
    for p in learn.model.parameters():
        p.data.fill_(1.0)
    learn.remove_cb(learn.watch)
    with learn.no_logging():
        learn.fit(1, 0.1, wd=0.5 if of_fit else None)
    for name, p in learn.model.named_parameters():
        decays = wd_bn_bias or name in ("conv1.weight", "layer1.1.weight", "linear.weight")
        if opt == "lamb":  # whose step is scaled by the length of the weights
            assert (p.mean().item() < 1.0) == decays, name
        else:
            assert p.mean().item() == pytest.approx((1 - 0.1 * 0.5) ** 4 if decays else 1.0), name
