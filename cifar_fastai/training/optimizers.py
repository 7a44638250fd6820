"""The optimizers of a run: torch's, `Muon`, and fastai's where torch has none; which parameters decay."""

from functools import partial

import numpy as np
from fastai import optimizer as fastai_optimizers
from fastai.optimizer import OptimWrapper, set_item_pg
from fastai.torch_core import trainable_params
from fastcore.foundation import L
from torch import nn, optim

from cifar_fastai.settings import NESTEROV_OPTIMIZERS, check_values
from cifar_fastai.training.muon import Muon

_TORCH = dict(sgd=optim.SGD, adam=optim.Adam, adamw=optim.AdamW, radam=optim.RAdam)
_TORCH |= dict(nadam=optim.NAdam, rmsprop=optim.RMSprop, muon=Muon)
_FASTAI = dict(qhadam="QHAdam", larc="Larc", lamb="Lamb", ranger="ranger")


class _Hypers(dict):
    """The hyper-parameters of one group; setting an item sets it in the optimizer, as with fastai's own optimizers."""

    def __init__(self, values, set_value):
        super().__init__(values)
        self.set_value = set_value

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.set_value(name, value)


class GroupedOptim(OptimWrapper):
    """An `OptimWrapper` that leaves norms and biases out of weight decay, unless `wd_bn_bias`.

    torch's optimizer then has two groups for each group of the splitter: weights with two or more dimensions, and the
    rest. fastai sees those of the splitter: in `hypers`, `param_lists`, `freeze_to` and slices of learning rates.
    """

    def __init__(self, params, opt, wd_bn_bias=False, **kwargs):
        self.wd_bn_bias, groups = wd_bn_bias, L(params)
        groups = groups if isinstance(groups[0], (L, list)) else [groups]
        parts = [[p for p in group if (p.ndim > 1) == is_weight] for group in groups for is_weight in (True, False)]
        lr = kwargs.get("lr")
        super().__init__(parts, opt, **kwargs | ({"lr": lr.stop} if isinstance(lr, slice) else {}))
        if isinstance(lr, slice):  # of a Learner's default rate; torch takes numbers
            self.set_hyper("lr", lr)

    @property
    def param_lists(self):
        """The parameters of each group of the splitter."""
        groups = self.opt.param_groups
        return [weights["params"] + rest["params"] for weights, rest in zip(groups[::2], groups[1::2], strict=True)]

    @property
    def hypers(self):
        """The hyper-parameters of each group of the splitter, without those that torch leaves at None."""
        return [
            _Hypers({k: v for k, v in hyper.items() if v is not None}, partial(self._set_in_group, k))
            for k, hyper in enumerate(super().hypers[::2])
        ]

    def _set_in_group(self, k, name, value):
        value = value.item() if isinstance(value, np.generic) else value  # torch.load refuses numpy's numbers
        for group, decays in zip(self.opt.param_groups[2 * k : 2 * k + 2], (True, self.wd_bn_bias), strict=True):
            set_item_pg(group, self.bwd_map[name], value if decays or name != "wd" else 0.0)

    def _set_hyper(self, k, v):
        for group, value in enumerate(v):
            self._set_in_group(group, k, value)


def body_and_head(model):
    """The trainable parameters as two groups: those of the last linear layer come second, and `freeze` leaves them."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head = set(last.parameters())
    params = trainable_params(model)
    return [[p for p in params if p not in head], [p for p in params if p in head]]


def optimizer_factory(opt="sgd", momentum=0.9, nesterov=True, wd_bn_bias=False):
    """The `opt_func` of a Learner. InputError for unknown names and values out of range.

    `nesterov` matters for sgd and muon alone. Without `wd_bn_bias` weight decay leaves out batch norm and biases.
    """
    values = check_values(opt=opt, momentum=momentum, nesterov=nesterov, wd_bn_bias=wd_bn_bias)
    if opt in _FASTAI:
        return partial(getattr(fastai_optimizers, _FASTAI[opt]), mom=momentum)
    options = {"fused" if opt in ("sgd", "adam", "adamw") else "foreach": True}
    options |= dict(momentum=momentum) if opt in ("rmsprop", *NESTEROV_OPTIMIZERS) else dict(betas=(momentum, 0.999))
    options |= dict(nesterov=values["nesterov"] == "yes") if opt in NESTEROV_OPTIMIZERS else {}
    return partial(GroupedOptim, opt=partial(_TORCH[opt], **options), wd_bn_bias=values["wd_bn_bias"] == "yes")
