"""`cifar_learner`: a fastai Learner around one of the networks, ready for `lr_find` and `fit_one_cycle`."""

from functools import partial

import numpy as np
import torch
from fastai import optimizer as fastai_optimizers
from fastai.callback import hook, schedule  # noqa: F401  (they give Learner summary, lr_find and fit_one_cycle)
from fastai.callback.core import TrainEvalCallback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import CastToTensor, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.vision import learner as vision_learner  # noqa: F401  (it teaches plot_top_losses to draw images)
from fastcore.foundation import L
from torch import nn, optim

from cifar_fastai.data.augment import TellEpoch
from cifar_fastai.evaluation import learner_methods as interpret  # noqa: F401  (it gives Learner plot_misclassified and plot_gradcam)
from cifar_fastai.hardware import choose_precision
from cifar_fastai.models import create_model
from cifar_fastai.names import FASTAI_OPTIMIZERS, NESTEROV_OPTIMIZERS, TORCH_OPTIMIZERS, check_name
from cifar_fastai.training.history import History
from cifar_fastai.training.muon import Muon
from cifar_fastai.training.precision import Precision, ScaledStep
from cifar_fastai.training.recorder import DeviceMean, DeviceProgress, DeviceRecorder, accuracy_per_image
from cifar_fastai.training.schedule import one_cycle

__all__ = ["CifarLearner", "cifar_learner", "decay_groups", "optimizer_factory"]

_TORCH = dict(
    sgd=optim.SGD,
    adam=optim.Adam,
    adamw=optim.AdamW,
    radam=optim.RAdam,
    nadam=optim.NAdam,
    rmsprop=optim.RMSprop,
    muon=Muon,
)
_FASTAI = dict(qhadam="QHAdam", larc="Larc", lamb="Lamb", ranger="ranger")
_FUSED = ("sgd", "adam", "adamw")  # the others are foreach


class NoDecayOptim(OptimWrapper):
    """An `OptimWrapper` whose last parameter group never decays, whatever weight decay `fit` sets for all groups."""

    def _set_hyper(self, k, v):
        super()._set_hyper(k, [*v[:-1], 0.0] if k == "wd" else v)


class CifarLearner(Learner):
    """fastai's `Learner`; its `fit_one_cycle` knows straight lines too and gives the optimizer plain floats.

    `settings` holds what it and its fit were made with, by the names of a recipe's parameters, and `history` what
    training has done (see `History`).
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

        As fastai's, to the number; `anneal` is "cos" or "linear", and momentum goes the other way, through `moms`.
        """
        if self.opt is None:
            self.create_opt()
        self.opt.set_hyper("lr", self.lr if lr_max is None else lr_max)
        peaks = [float(hyper["lr"]) for hyper in self.opt.hypers]
        peak = peaks[0] if len(set(peaks)) == 1 else np.array(peaks)
        moms = self.moms if moms is None else moms
        self.settings = self.settings | dict(
            sched="one-cycle",
            epochs=n_epoch,
            lr=max(peaks),
            div=div,
            div_final=div_final,
            pct_start=pct_start,
            anneal=anneal,
            momentum=moms[0],
            mom_min=None if moms[1] == moms[0] else moms[1],
            **({} if wd is None else {"wd": wd}),
        )
        scheds = {
            "lr": one_cycle(pct_start, peak / div, peak, peak / div_final, anneal),
            "mom": one_cycle(pct_start, *moms, anneal),
        }
        self.fit(n_epoch, cbs=[ParamScheduler(scheds), *L(cbs)], reset_opt=reset_opt, wd=wd, start_epoch=start_epoch)

    def one_batch(self, i, b):
        try:
            super().one_batch(i, b)
        except BaseException:  # a Ctrl-C in a notebook, too, would leave the rest of it in half precision
            for cb in self.cbs:
                if isinstance(cb, Precision):
                    cb.leave()
            raise


def decay_groups(model):
    """The parameters as two groups: weights of convolutions and linear layers; batch norm and biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]


def all_params(model):
    """The parameters as one group."""
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_factory(opt="sgd", momentum=0.9, nesterov=True, wd_bn_bias=False):
    """(opt_func, splitter) for a Learner: torch's optimizer `opt` or `Muon`, or fastai's where torch has none.

    `nesterov` counts for sgd and muon alone. Without `wd_bn_bias` weight decay leaves batch norm and biases out.
    """
    check_name("--opt", opt, TORCH_OPTIMIZERS + FASTAI_OPTIMIZERS)
    if opt in FASTAI_OPTIMIZERS:
        return partial(getattr(fastai_optimizers, _FASTAI[opt]), mom=momentum), all_params
    if opt in NESTEROV_OPTIMIZERS:
        settings = dict(momentum=momentum, nesterov=nesterov)
    elif opt == "rmsprop":
        settings = dict(momentum=momentum)
    else:
        settings = dict(betas=(momentum, 0.999))
    settings["fused" if opt in _FUSED else "foreach"] = True
    wrapper, splitter = (OptimWrapper, all_params) if wd_bn_bias else (NoDecayOptim, decay_groups)
    return partial(wrapper, opt=partial(_TORCH[opt], **settings)), splitter


def cifar_learner(
    dls,
    model="resnet18",
    *,
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
    path=".",
    **kwargs,
):
    """A fastai `Learner` for `dls` (from `cifar_dls`) around `model`, a name or an nn.Module giving logits (B, C).

    `learn.lr_find()`, `learn.fit_one_cycle(20, lr)`, `learn.show_results()`, `ClassificationInterpretation` and all
    else of fastai's work on it. `lr`, `momentum` (falling to `mom_min` at the peak of a cycle, if given) and `wd` are
    the defaults of its fits. Precision: `choose_precision`; further `kwargs` go to `Learner`. InputError for names
    that are not known.
    """
    device = torch.device(dls.device)  # a DataBlock takes its name as well
    net = model if isinstance(model, nn.Module) else create_model(model, len(dls.vocab))
    net = net.to(device, memory_format=torch.channels_last) if channels_last else net.to(device)
    opt_func, splitter = optimizer_factory(opt, momentum, nesterov, wd_bn_bias)
    chosen, _ = choose_precision(precision, device)
    mixed = [] if chosen == "fp32" else [Precision(chosen)]
    if chosen == "fp16":
        mixed.append(ScaledStep())
    learn = CifarLearner(
        dls,
        net,
        loss_func=CrossEntropyLossFlat(label_smoothing=label_smoothing),
        opt_func=opt_func,
        splitter=splitter,
        lr=lr,
        wd=wd,
        wd_bn_bias=wd_bn_bias,
        moms=(momentum, momentum if mom_min is None else mom_min, momentum),
        metrics=[DeviceMean(accuracy_per_image, "accuracy")],
        path=path,
        default_cbs=False,
        cbs=[
            TrainEvalCallback(),
            DeviceRecorder(),
            CastToTensor(),
            TellEpoch(),
            DeviceProgress(),
            History(),
            *mixed,
            *L(cbs),
        ],
        **kwargs,
    )
    learn.settings = getattr(dls, "settings", {}) | dict(
        model=model if isinstance(model, str) else type(model).__name__,
        opt=opt,
        lr=lr,
        momentum=momentum,
        mom_min=mom_min,
        nesterov="yes" if nesterov else "no",
        wd=wd,
        wd_bn_bias="yes" if wd_bn_bias else "no",
        label_smoothing=label_smoothing,
        precision=chosen,
        sched="none",
    )
    return learn
