"""fastai's Recorder and progress bar without their read-backs: numbers stay on the device until an epoch ends."""

import time

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgSmoothLoss, Metric, Recorder
from fastai.torch_core import find_bs
from fastcore.foundation import L

__all__ = ["Bounded", "DeviceMean", "DeviceProgress", "DeviceRecorder", "accuracy_per_image", "device_loss"]


class DeviceMean(Metric):
    """The mean over images of `func(learn)`, itself the mean over a batch, summed on the device, read at the end."""

    def __init__(self, func, name):
        self.func, self._name = func, name
        self.reset()

    def reset(self):
        self.total, self.count = None, 0

    def accumulate(self, learn):
        n = find_bs(learn.yb)
        value = self.func(learn).detach().float() * n
        self.total = value if self.total is None else self.total + value
        self.count += n

    @property
    def value(self):
        return self.total.item() / self.count if self.count else None

    @property
    def name(self):
        return self._name


def device_loss(learn):
    """The learner's loss of this batch, averaged over its images."""
    return learn.loss.mean()


def accuracy_per_image(learn):
    """The fraction of this batch that is classified right."""
    return (learn.pred.argmax(-1) == learn.yb[0]).float().mean()


class _SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, kept where the loss is."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean().float()
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class DeviceRecorder(Recorder):
    """fastai's `Recorder`; train_loss is the epoch's mean, as valid_loss is, and no step waits for a number.

    `losses` holds the smoothed loss of every step as 0-d tensors on the device.
    """

    def __init__(self, add_time=True, train_metrics=True, valid_metrics=True, beta=0.98):
        super().__init__(add_time, train_metrics, valid_metrics, beta)
        self.loss, self.train_loss = DeviceMean(device_loss, "loss"), DeviceMean(device_loss, "loss")
        self.smooth_loss = _SmoothLoss(beta=beta)

    @property
    def name(self):
        return "recorder"

    def before_train(self):
        self._train_mets.map(lambda metric: metric.reset())

    def after_batch(self):
        if self.training and len(self.yb):
            self.smooth_loss.accumulate(self.learn)
        super().after_batch()

    def after_fit(self):
        if self.losses and torch.is_tensor(self.losses[-1]):  # one read for the whole fit
            self.losses = torch.stack([torch.as_tensor(loss) for loss in self.losses]).tolist()

    @property
    def _train_mets(self):
        if getattr(self, "cancel_train", False):
            return L()
        return L(self.train_loss) + (self.metrics if self.train_metrics else L())


class Bounded:
    """Say when a number may be read from the device: at most every `seconds`, and once in `steps` steps."""

    def __init__(self, seconds=1.0, steps=16):
        self.seconds, self.steps = seconds, steps
        self.last_time, self.last_step = time.monotonic(), 0

    def due(self, step):
        """Whether a number may be read at `step`, a count that grows."""
        if step - self.last_step < self.steps or time.monotonic() - self.last_time < self.seconds:
            return False
        self.last_time, self.last_step = time.monotonic(), step
        return True


class DeviceProgress(ProgressCallback):
    """fastai's progress bar, which reads the loss now and then instead of at every step."""

    def __init__(self, seconds=1.0, steps=16):
        self.seconds, self.steps = seconds, steps

    @property
    def name(self):
        return "progress"

    def before_fit(self):
        self.reads = Bounded(self.seconds, self.steps)
        super().before_fit()

    def after_batch(self):
        self.pbar.update(self.iter + 1)
        if hasattr(self, "smooth_loss") and self.reads.due(self.train_iter):
            self.pbar.comment = f"{self.smooth_loss.item():.4f}"
