"""Regularisers, guards and early stopping that fastai lacks or does with a wait at every step."""

import math

import torch
from fastai.callback.core import Callback, CancelFitException

from cifar_fastai.errors import RunError
from cifar_fastai.training.checkpoint import save_torch
from cifar_fastai.training.recorder import Bounded, FitCallback


class L1Penalty(Callback):
    """Add `weight` times the sum of |w| over convolution and linear weights to the loss that is differentiated.

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


class WeightAverage(FitCallback):
    """An exponential moving average of weights and batch-norm statistics, which is evaluated in place of the model.

    average <- d * average + (1 - d) * weights after every step, d = min(decay, (1 + n) / (10 + n)) at update n, so
    that the first weights are soon forgotten. In training the model holds the raw weights, in validation and after
    the fit the averaged ones. Polyak & Juditsky: Acceleration of stochastic approximation by averaging, 1992.
    """

    order, rests_in, saved = 80, ("lr_finder",), ("average", "n_updates")
    average, raw, _stateattrs = None, None, ("average", "raw")  # both {name: tensor}, as a state dict

    def __init__(self, decay):
        self.decay, self.n_updates = decay, 0

    def _copy(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def before_train(self):
        if self.average is None:
            self.average = self._copy()
        if self.raw is not None:
            self.model.load_state_dict(self.raw)
            self.raw = None

    def after_batch(self):
        if self.training:
            share = 1 - min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
            for name, weight in self.model.state_dict().items():
                average = self.average[name]
                average.lerp_(weight, share) if average.is_floating_point() else average.copy_(weight)
            self.n_updates += 1

    def before_validate(self):
        if self.average is not None and self.raw is None:
            self.raw = self._copy()
            self.model.load_state_dict(self.average)


class StopOnBadLoss(FitCallback):
    """Stop with a RunError when the loss is NaN or infinite, naming the first such step and its learning rate.

    Also when it is so on the split that is evaluated, where the last step of an epoch shows.
    The first bad step is kept on the device and read now and then, so that no step waits for it.
    """

    order, run_valid, _stateattrs = 55, False, ("bad_step", "reads")

    def before_fit(self):
        self.bad_step, self.reads = torch.tensor(-1, device=self.dls.device), Bounded()

    def after_batch(self):
        step = len(self.recorder.lrs) - 1
        is_bad = ~torch.isfinite(self.loss.detach()).all()
        self.bad_step = torch.where(is_bad & (self.bad_step < 0), step, self.bad_step)
        if self.reads.due(step):
            self.after_train()

    def after_train(self):
        step = self.bad_step.item()
        if step >= 0:
            place = f"since step {step % len(self.dls.train) + 1} of epoch {self.epoch + 1}"
            self._stop(f"the loss is not a number {place}", self.recorder.lrs[step])

    def after_validate(self):
        loss = self.recorder.loss.value
        if self.recorder.lrs and loss is not None and not math.isfinite(loss):
            place = f"after epoch {self.epoch + 1}"
            self._stop(f"the loss on the evaluated images is not a number {place}", self.recorder.lrs[-1])

    def _stop(self, message, lr):
        raise RunError(f"{message} (lr {lr:.3g}); try a lower `lr`, `clip` 1 or `precision` fp32")


class KeepBest(FitCallback):
    """Write the weights of the best validation accuracy to `path`; end the fit after `patience` epochs without one.

    `path` None writes none, `patience` None never ends. For the validation split only: nothing is chosen on test.
    """

    order, saved = 95, ("best", "waited")  # `Checkpoint` then writes that the fit has ended

    def __init__(self, path=None, patience=None):
        self.path, self.patience = path, patience
        self.best, self.waited = -1.0, 0

    @property
    def done(self):
        """Whether the patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def after_validate(self):
        accuracy = float(self.recorder.metrics[0].value)
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            if self.path is not None:
                save_torch(self.path, self.model.state_dict())
        else:
            self.waited += 1

    def after_epoch(self):
        if self.done:
            print(f"stopped: {self.waited} epochs without a better validation accuracy than {self.best:.2%}")
            raise CancelFitException
