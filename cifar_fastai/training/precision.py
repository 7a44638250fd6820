"""Mixed precision on every device, as callbacks."""

import torch
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper

from cifar_fastai.hardware import autocast


def torch_optimizer(opt):
    """The torch optimizer that a Learner's `opt` wraps, or fastai's own optimizer itself."""
    return opt.opt if isinstance(opt, OptimWrapper) else opt


class Precision(Callback):
    """Autocast around the model, in training and evaluation, on any device; the loss is computed in float32.

    fastai's own `MixedPrecision` enters autocast("cuda") only, which leaves a CPU in float32. float16 also needs
    `ScaledStep`; `cifar_learner` adds both.
    """

    order, autocast = 10, None

    def __init__(self, precision="bf16"):
        self.precision = precision

    def before_batch(self):
        self.after_cancel_batch()
        self.autocast = autocast(next(self.model.parameters()).device, self.precision)
        self.autocast.__enter__()

    def after_pred(self):
        self.after_cancel_batch()
        self.learn.pred = self.pred.float()

    def after_cancel_batch(self):
        """Go back to float32; `CifarLearner` also calls it after an error in the model."""
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None


class ScaledStep(Callback):
    """Loss scaling for float16: the loss is scaled up before backward, the gradients down before the step.

    With a fused optimizer the check for overflow stays on the device. `CifarLearner` calls `step` in place of the
    optimizer's own; `kwargs` are those of torch's `GradScaler`.
    """

    order, scaler, saved, _stateattrs = 10, None, ("scaler",), ("scaler",)  # before callbacks that clip gradients

    def __init__(self, **kwargs):
        self.kwargs = kwargs

    def before_fit(self):
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(self.dls.device.type, **self.kwargs)

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def before_step(self):  # not after each backward, as gradients may accumulate over batches
        self.scaler.unscale_(torch_optimizer(self.opt))

    def step(self):
        """A step of the optimizer, which is skipped after an overflow."""
        self.scaler.step(torch_optimizer(self.opt))
        self.scaler.update()
