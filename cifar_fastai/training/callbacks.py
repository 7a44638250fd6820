"""What fastai lacks: an L1 penalty, clipping by value, an average of the weights, a stop at the first bad loss."""

import math

import torch
from fastai.callback.core import Callback
from torch.optim.swa_utils import AveragedModel

from cifar_fastai.errors import RunError
from cifar_fastai.training.recorder import Bounded

__all__ = ["ClipValue", "L1Penalty", "StopOnBadLoss", "WeightAverage"]


class L1Penalty(Callback):
    """Add `weight` times the sum of |w| over convolution and linear weights to what is differentiated.

    The loss that is reported stays the learner's loss function.
    """

    def __init__(self, weight):
        self.weight = weight

    def after_loss(self):
        if self.training:
            total = sum(p.abs().sum() for p in self.model.parameters() if p.ndim > 1)
            self.learn.loss_grad = self.loss_grad + self.weight * total


class ClipValue(Callback):
    """Clip each component of the gradient to -limit..limit."""

    order = 11

    def __init__(self, limit):
        self.limit = limit

    def before_step(self):
        torch.nn.utils.clip_grad_value_(self.model.parameters(), self.limit)


class WeightAverage(Callback):
    """An exponential moving average of weights and batch-norm statistics, which is evaluated in place of the model.

    average <- d * average + (1 - d) * weights after every step, d = min(decay, (1 + n) / (10 + n)) at update n, so
    that the first weights are soon forgotten. In training the model holds the raw weights, in validation and after
    the fit the averaged ones. Polyak & Juditsky: Acceleration of stochastic approximation by averaging, 1992.
    """

    order = 80

    def __init__(self, decay):
        self.decay, self.average, self.raw, self.n_updates = decay, None, None, 0

    def decay_at(self, n):
        """The decay of update `n`, counted from 0."""
        return min(self.decay, (1 + n) / (10 + n))

    def before_train(self):
        if hasattr(self.learn, "lr_finder"):
            return
        if self.average is None:
            self.average = AveragedModel(self.model, multi_avg_fn=self._lerp, use_buffers=True)
            self.average.n_averaged.fill_(1)  # the copy it starts from counts as the first
        if self.raw is not None:
            self.model.load_state_dict(self.raw)
            self.raw = None

    def _lerp(self, averaged, current, n_averaged):
        weight = 1 - self.decay_at(self.n_updates)
        for old, new in zip(averaged, current, strict=True):
            old.lerp_(new, weight) if old.is_floating_point() else old.copy_(new)

    def after_batch(self):
        if self.training and not hasattr(self.learn, "lr_finder"):
            self.average.update_parameters(self.model)
            self.n_updates += 1

    def before_validate(self):
        if self.average is not None and self.raw is None and not hasattr(self.learn, "lr_finder"):
            self.raw = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.module.state_dict())

    def __getstate__(self):
        return {**self.__dict__, "average": None, "raw": None}


class StopOnBadLoss(Callback):
    """Stop with a RunError when the loss is NaN or infinite, naming the first such step and its learning rate.

    Also when it is so on the split that is evaluated, where the last step of an epoch shows.
    The first bad step is kept on the device and read now and then, so that no step waits for it.
    """

    order, run_valid = 55, False

    def before_fit(self):
        self.bad_step, self.reads = None, Bounded()

    def after_batch(self):
        if hasattr(self.learn, "lr_finder"):
            return  # a range test ends by diverging
        bad = ~torch.isfinite(self.loss.detach()).all()
        if self.bad_step is None:
            self.bad_step = torch.full((), -1, dtype=torch.long, device=bad.device)
        step = len(self.recorder.lrs) - 1
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        if self.reads.due(step):
            self._check()

    def after_train(self):
        if not hasattr(self.learn, "lr_finder"):
            self._check()

    def _check(self):
        step = -1 if self.bad_step is None else self.bad_step.item()
        if step >= 0:
            lr = float(self.recorder.lrs[step])
            n_iter = len(self.dls.train)
            self._stop(f"the loss is not a number since step {step % n_iter + 1} of epoch {self.epoch + 1}", lr)

    def after_validate(self):
        if not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds") and self.recorder.lrs:
            loss = self.recorder.loss.value
            if loss is not None and not math.isfinite(loss):
                self._stop(
                    f"the loss on the evaluated images is not a number after epoch {self.epoch + 1}",
                    float(self.recorder.lrs[-1]),
                )

    def _stop(self, what, lr):
        raise RunError(f"{what} (lr {lr:.3g}); try a lower --lr, --clip 1 or --precision fp32")

    def __getstate__(self):
        return {**self.__dict__, "bad_step": None, "reads": None}
