"""`cifar_learner`: a fastai Learner around one of the networks, ready for `lr_find` and `fit_one_cycle`."""

from functools import partialmethod

import numpy as np
import torch
from fastai.callback import hook, schedule  # noqa: F401  (they give Learner summary, lr_find and fit_one_cycle)
from fastai.callback.core import CancelEpochException, TrainEvalCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import CastToTensor, Learner, defaults
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import trainable_params
from fastai.vision import learner as vision_learner  # noqa: F401  (it teaches plot_top_losses to draw images)
from fastcore.foundation import L
from fastcore.meta import use_kwargs_dict
from torch import nn

from cifar_fastai.data.augment import TellEpoch
from cifar_fastai.hardware import choose_precision
from cifar_fastai.models import CustomResNet, ResNet, create_model
from cifar_fastai.recipes import RECIPES
from cifar_fastai.settings import Settings, check_values
from cifar_fastai.training.checkpoint import Checkpoint
from cifar_fastai.training.optimizers import body_and_head, optimizer_factory
from cifar_fastai.training.precision import Precision, ScaledStep
from cifar_fastai.training.recorder import DeviceMean, DeviceProgress, DeviceRecorder, History, accuracy_per_image
from cifar_fastai.training.schedule import one_cycle

_RESNET = RECIPES["resnet18"]
_NAMES = "width", "opt", "lr", "momentum", "mom_min", "nesterov", "wd", "wd_bn_bias", "label_smoothing"
_DEFAULTS = {name: getattr(_RESNET, name) for name in _NAMES}


class CifarLearner(Learner):
    """fastai's `Learner`; its `fit_one_cycle` also has straight lines and gives the optimizer plain floats.

    `settings` holds the parameters of the learner and its last fit, by the names of `Settings`; `history` records all
    fits (see `History`).
    """

    settings = {}

    def fit_one_cycle(
        self,
        n_epoch,
        lr_max=None,
        div=25.0,
        div_final=1e5,
        pct_start=0.25,
        wd=None,
        moms=None,
        cbs=None,
        reset_opt=False,
        start_epoch=0,
        anneal="cos",
    ):
        """Fit for `n_epoch` with one cycle: from lr_max / div up to lr_max at `pct_start`, down to lr_max / div_final.

        The same numbers as fastai's. `anneal` is "cos" or "linear"; `moms` are the momenta at start, peak and end.
        """
        cycle = check_values(div=div, div_final=div_final, pct_start=pct_start, anneal=anneal)
        if self.opt is None:
            self.create_opt()
        self.opt.set_hyper("lr", self.lr if lr_max is None else lr_max)
        peaks = [float(hyper["lr"]) for hyper in self.opt.hypers]
        peak = peaks[0] if len(set(peaks)) == 1 else np.array(peaks)
        moms = self.moms if moms is None else moms
        self.settings = self.settings | cycle | dict(sched="one-cycle", epochs=n_epoch, lr=max(peaks))
        self.settings |= dict(momentum=moms[0], mom_min=None if moms[1] == moms[0] else moms[1])
        self.settings |= {} if wd is None else {"wd": wd}
        lrs = one_cycle(pct_start, peak / div, peak, peak / div_final, anneal)
        scheduler = ParamScheduler({"lr": lrs, "mom": one_cycle(pct_start, *moms, anneal)})
        self.fit(n_epoch, wd=wd, cbs=[scheduler, *L(cbs)], reset_opt=reset_opt, start_epoch=start_epoch)

    def _do_fit(self):  # as fastai's, but for the epochs that a checkpoint restores: no event tells of them
        for epoch in range(sum(cb.first_epoch for cb in self._grab_cbs(Checkpoint) if cb.run), self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)

    def one_batch(self, i, b):
        try:
            super().one_batch(i, b)
        except BaseException:  # also Ctrl-C, which would leave the rest of a notebook in half precision
            for cb in self._grab_cbs(Precision):
                cb.after_cancel_batch()
            raise

    def _step(self):
        scaled = self._grab_cbs(ScaledStep)
        (scaled[0] if scaled else self.opt).step()

    def add_cb(self, cb):
        if MixedPrecision in (cb, type(cb)):
            self.remove_cbs([Precision, ScaledStep])
        return super().add_cb(cb)

    def set_precision(self, precision, **kwargs):
        """Compute in "fp32", "bf16" or "fp16" from now on, as `to_fp32`, `to_bf16` and `to_fp16` do.

        `kwargs` go to torch's `GradScaler`, which fp16 needs. InputError where the device has no such precision.
        """
        precision, _ = choose_precision(precision, next(self.model.parameters()).device)
        self.remove_cbs([Precision, ScaledStep, MixedPrecision])
        self.settings = self.settings | dict(precision=precision)
        return self.add_cbs(_precision_cbs(precision, **kwargs))

    to_fp32 = partialmethod(set_precision, "fp32")
    to_bf16 = partialmethod(set_precision, "bf16")
    to_fp16 = partialmethod(set_precision, "fp16")

    def no_bar(self):
        """A context without progress bars; fastai's own would put another one in their place."""
        return self.removed_cbs(self._grab_cbs(ProgressCallback))


def _precision_cbs(precision, **kwargs):
    cbs = [] if precision == "fp32" else [Precision(precision)]
    return [*cbs, ScaledStep(**kwargs)] if precision == "fp16" else cbs


def default_values(model, **options):
    """`options`, and for other parameters of the learner the values of the recipe of `model`, a name or a network.

    A network that has no recipe gets the neutral values of `Settings`, plain SGD. The default rate belongs to the
    optimizer: that of `Settings` to sgd, that of the ResNets to muon, fastai's own to the rest. Also to the custom
    ResNet's adam, whose recipe takes the rate from a range test.
    """
    name = model if isinstance(model, str) else {ResNet: "resnet18", CustomResNet: "custom_resnet"}.get(type(model))
    neutral = Settings()
    values = {key: getattr(RECIPES.get(name, neutral), key) for key in _DEFAULTS} | options
    rates = {neutral.opt: neutral.lr, _RESNET.opt: _RESNET.lr}
    return values | {"lr": options.get("lr", rates.get(values["opt"], defaults.lr))}


@use_kwargs_dict(keep=True, **_DEFAULTS)  # the signature shows the values of ResNet18's recipe
def cifar_learner(dls, model="resnet18", *, precision="auto", channels_last=True, cbs=None, **kwargs):
    """A fastai `Learner` for `dls` (from `cifar_dls`) around `model`, a name or an nn.Module giving logits (B, C).

    `learn.lr_find()`, `learn.fit_one_cycle(20)`, `learn.show_results()`, `ClassificationInterpretation` and the rest of
    fastai work on it. `width`: channels of a named network's first convolution. `lr`, `momentum` (falling to `mom_min`
    at the peak of a cycle, unless None) and `wd` are the defaults of its fits. Optimizer and loss are by default those
    of the network's recipe (`default_values`). The last linear layer is a parameter group of its own, which `freeze`
    leaves; a network of your own without a `splitter` is one group. Precision: `choose_precision`. Other `kwargs` go to
    `Learner` and replace what is set here (`loss_func`, `metrics`, `opt_func`, `splitter`, `moms`). With
    `default_cbs=True` fastai's recorder and progress bar replace those here. InputError for wrong names and values.
    """
    device = torch.device(dls.device)  # a DataBlock takes its name as well
    precision, _ = choose_precision(precision, device)
    values = default_values(model, **{name: kwargs.pop(name) for name in _DEFAULTS if name in kwargs})
    values |= check_values(**{name: value for name, value in values.items() if not isinstance(value, slice)})
    size = getattr(dls, "settings", {}).get("size") or 32
    net = model if isinstance(model, nn.Module) else create_model(model, len(dls.vocab), values["width"], size)
    net = net.to(device, memory_format=torch.channels_last) if channels_last else net.to(device)
    high, low = values["momentum"], values["mom_min"]
    options = {name: values[name] for name in ("opt", "momentum", "nesterov", "wd_bn_bias")}
    arguments = dict(opt_func=optimizer_factory(**options), lr=values["lr"], wd=values["wd"], default_cbs=False)
    arguments |= dict(wd_bn_bias=values["wd_bn_bias"] == "yes", moms=(high, high if low is None else low, high))
    arguments["splitter"] = body_and_head if isinstance(model, (str, ResNet, CustomResNet)) else trainable_params
    arguments["loss_func"] = CrossEntropyLossFlat(label_smoothing=values["label_smoothing"])
    arguments["metrics"] = [DeviceMean(accuracy_per_image, "accuracy")]
    arguments |= kwargs
    ours = [TellEpoch(), History(), *_precision_cbs(precision)]
    if not arguments["default_cbs"]:
        ours += [TrainEvalCallback(), DeviceRecorder(), CastToTensor(), DeviceProgress()]
    learn = CifarLearner(dls, net, cbs=[*ours, *L(cbs)], **arguments)
    name = model if isinstance(model, str) else type(model).__name__
    learn.settings = getattr(dls, "settings", {}) | values | dict(model=name, precision=precision, sched="none")
    learn.settings["lr"] = getattr(values["lr"], "stop", values["lr"])  # the highest of a slice
    return learn
