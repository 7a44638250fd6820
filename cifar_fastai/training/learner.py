"""`cifar_learner`: a fastai Learner around one of the networks, ready for `lr_find` and `fit_one_cycle`."""

import numpy as np
import torch
from fastai.callback import hook, schedule  # noqa: F401  (they give Learner summary, lr_find and fit_one_cycle)
from fastai.callback.core import CancelEpochException, TrainEvalCallback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import CastToTensor, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision import learner as vision_learner  # noqa: F401  (it teaches plot_top_losses to draw images)
from fastcore.foundation import L
from torch import nn

from cifar_fastai.data.augment import TellEpoch
from cifar_fastai.hardware import choose_precision
from cifar_fastai.models import create_model
from cifar_fastai.settings import check_values
from cifar_fastai.training.checkpoint import Checkpoint
from cifar_fastai.training.optimizers import optimizer_factory
from cifar_fastai.training.precision import Precision, ScaledStep
from cifar_fastai.training.recorder import DeviceMean, DeviceProgress, DeviceRecorder, History, accuracy_per_image
from cifar_fastai.training.schedule import one_cycle


class CifarLearner(Learner):
    """fastai's `Learner`; its `fit_one_cycle` also has straight lines and gives the optimizer plain floats.

    `settings` holds the parameters of the learner and its last fit, by the names of `Settings`; `history` records all
    fits (see `History`).
    """

    settings = {}

    def fit_one_cycle(
        self, n_epoch, lr_max=None, div=25.0, div_final=1e5, pct_start=0.25, wd=None, moms=None, anneal="cos", **kwargs
    ):
        """Fit for `n_epoch` with one cycle: from lr_max / div up to lr_max at `pct_start`, down to lr_max / div_final.

        The same numbers as fastai's. `anneal` is "cos" or "linear"; `moms` are the momenta at start, peak and end.
        `kwargs` (`cbs`, `reset_opt`, `start_epoch`) go to `fit`.
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
        self.fit(n_epoch, wd=wd, cbs=[scheduler, *L(kwargs.pop("cbs", None))], **kwargs)

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


def cifar_learner(
    dls,
    model="resnet18",
    *,
    width=64,
    opt="sgd",
    lr=0.1,
    momentum=0.9,
    mom_min=None,
    nesterov=True,
    wd=5e-4,
    wd_bn_bias=False,
    label_smoothing=0.0,
    precision="auto",
    channels_last=True,
    cbs=None,
    **kwargs,
):
    """A fastai `Learner` for `dls` (from `cifar_dls`) around `model`, a name or an nn.Module giving logits (B, C).

    `learn.lr_find()`, `learn.fit_one_cycle(20, lr)`, `learn.show_results()`, `ClassificationInterpretation` and the
    rest of fastai work on it. `width`: channels of a named network's first convolution. `lr`, `momentum` (falling to
    `mom_min` at the peak of a cycle, unless None) and `wd` are the defaults of its fits. Precision: `choose_precision`.
    `kwargs` go to `Learner` and replace what is set here (`loss_func`, `metrics`, `opt_func`, `splitter`, `moms`); all
    groups of your own `splitter` decay. With `default_cbs=True` fastai's recorder and progress bar replace those here.
    Raises InputError for wrong names and values.
    """
    options = dict(opt=opt, momentum=momentum, nesterov=nesterov, wd_bn_bias=wd_bn_bias)
    values = options | dict(width=width, mom_min=mom_min, wd=wd, label_smoothing=label_smoothing)
    values = check_values(**values, **({} if isinstance(lr, slice) else {"lr": lr}))
    device = torch.device(dls.device)  # a DataBlock takes its name as well
    precision, _ = choose_precision(precision, device)
    size = getattr(dls, "settings", {}).get("size") or 32
    net = model if isinstance(model, nn.Module) else create_model(model, len(dls.vocab), width, size)
    net = net.to(device, memory_format=torch.channels_last) if channels_last else net.to(device)
    if "splitter" in kwargs:
        options["wd_bn_bias"] = True
    opt_func, splitter = optimizer_factory(**options)
    arguments = dict(opt_func=opt_func, splitter=splitter, lr=lr, wd=wd, wd_bn_bias=values["wd_bn_bias"] == "yes")
    arguments |= dict(moms=(momentum, momentum if mom_min is None else mom_min, momentum), path=".", default_cbs=False)
    arguments["loss_func"] = CrossEntropyLossFlat(label_smoothing=label_smoothing)
    arguments["metrics"] = [DeviceMean(accuracy_per_image, "accuracy")]
    arguments |= kwargs
    ours = [TellEpoch(), History(), *([Precision(precision)] if precision != "fp32" else [])]
    ours += [ScaledStep()] if precision == "fp16" else []
    if not arguments["default_cbs"]:
        ours += [TrainEvalCallback(), DeviceRecorder(), CastToTensor(), DeviceProgress()]
    learn = CifarLearner(dls, net, cbs=[*ours, *L(cbs)], **arguments)
    name = model if isinstance(model, str) else type(model).__name__
    learn.settings = getattr(dls, "settings", {}) | values | dict(model=name, lr=lr, precision=precision, sched="none")
    return learn
