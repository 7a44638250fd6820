"""Mixed precision on every device: what was asked for, what the hardware has, and the callback that does it."""

import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.optimizer import OptimWrapper

from cifar_fastai.hardware import autocast

__all__ = ["Precision", "ScaledStep", "torch_optimizer"]


def torch_optimizer(opt):
    """The torch optimizer that a Learner's `opt` wraps, or fastai's own as it is."""
    return opt.opt if isinstance(opt, OptimWrapper) else opt


class Precision(Callback):
    """Autocast around the model, in training and evaluation, on any device; the loss is computed in float32.

    fastai's own `MixedPrecision` enters autocast("cuda") only, which leaves a CPU in float32. float16 needs
    `ScaledStep` beside it, which `cifar_learner` adds.
    """

    order = 10

    def __init__(self, precision="bf16"):
        self.precision, self.autocast = precision, None

    def before_batch(self):
        self.leave()
        self.autocast = autocast(next(self.model.parameters()).device, self.precision)
        self.autocast.__enter__()

    def after_pred(self):
        self.leave()
        self.learn.pred = self.pred.float()

    def after_cancel_batch(self):
        self.leave()

    def leave(self):
        """Go back to float32; `CifarLearner` sees to it after an error in the model too."""
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None

    def __getstate__(self):
        return {**self.__dict__, "autocast": None}


class ScaledStep(Callback):
    """float16's other half: the loss is scaled up before backward, the gradients down before the step.

    With a fused optimizer the check for overflow stays on the device. It runs after what reads gradients (clipping).
    """

    order = 90

    def __init__(self):
        self.scaler = None

    def before_fit(self):
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(self.dls.device.type)

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def after_backward(self):
        self.scaler.unscale_(torch_optimizer(self.opt))

    def before_step(self):
        self.scaler.step(torch_optimizer(self.opt))
        self.scaler.update()
        raise CancelStepException  # the step is done, or was left out for its overflow

    def __getstate__(self):
        return {**self.__dict__, "scaler": None}
