"""The optimizers of a run: torch's, `Muon`, and fastai's where torch has none; which parameters decay."""

from functools import partial

from fastai import optimizer as fastai_optimizers
from fastai.optimizer import OptimWrapper
from fastai.torch_core import trainable_params
from torch import optim

from cifar_fastai.settings import NESTEROV_OPTIMIZERS, check_values
from cifar_fastai.training.muon import Muon

_TORCH = dict(sgd=optim.SGD, adam=optim.Adam, adamw=optim.AdamW, radam=optim.RAdam)
_TORCH |= dict(nadam=optim.NAdam, rmsprop=optim.RMSprop, muon=Muon)
_FASTAI = dict(qhadam="QHAdam", larc="Larc", lamb="Lamb", ranger="ranger")


class NoDecayOptim(OptimWrapper):
    """An `OptimWrapper` whose last parameter group never decays, whatever weight decay `fit` sets for all groups."""

    def _set_hyper(self, k, v):
        super()._set_hyper(k, [*v[:-1], 0.0] if k == "wd" else v)


def decay_groups(model):
    """The parameters as two groups: weights of convolutions and linear layers; batch norm and biases."""
    params = trainable_params(model)
    return [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]


def optimizer_factory(opt="sgd", momentum=0.9, nesterov=True, wd_bn_bias=False):
    """(opt_func, splitter) for a Learner. InputError for unknown names and values out of range.

    `nesterov` matters for sgd and muon alone. Without `wd_bn_bias` weight decay leaves out batch norm and biases.
    """
    values = check_values(opt=opt, momentum=momentum, nesterov=nesterov, wd_bn_bias=wd_bn_bias)
    if opt in _FASTAI:
        return partial(getattr(fastai_optimizers, _FASTAI[opt]), mom=momentum), trainable_params
    options = {"fused" if opt in ("sgd", "adam", "adamw") else "foreach": True}
    options |= dict(momentum=momentum) if opt in ("rmsprop", *NESTEROV_OPTIMIZERS) else dict(betas=(momentum, 0.999))
    options |= dict(nesterov=values["nesterov"] == "yes") if opt in NESTEROV_OPTIMIZERS else {}
    decays_all = values["wd_bn_bias"] == "yes"
    wrapper, splitter = (OptimWrapper, trainable_params) if decays_all else (NoDecayOptim, decay_groups)
    return partial(wrapper, opt=partial(_TORCH[opt], **options)), splitter
