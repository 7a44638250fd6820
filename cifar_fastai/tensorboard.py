"""TensorBoard logs of a run, through torch's SummaryWriter.

fastai's `TensorBoardCallback` traces the model, which fails under mixed precision, and reads the loss at every step.
"""

import torch
from fastai.callback.core import Callback

from cifar_fastai.errors import RunError

__all__ = ["TensorBoardLog"]


class TensorBoardLog(Callback):
    """Losses, accuracies, learning rate and momentum into `folder`: per step, written when an epoch ends.

    The numbers of an epoch stand at its last step: a run that goes on hides, by their step, those of an epoch that it
    does again.
    """

    order = 75

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RunError("--tensorboard: pip install tensorboard") from None
        self.folder, self._open = str(folder), SummaryWriter
        self.writer = None

    def before_train(self):
        self.losses = []

    def after_batch(self):
        if self.training and hasattr(self.learn, "run_log"):
            self.losses.append(self.loss.detach())

    def after_epoch(self):
        log = getattr(self.learn, "run_log", None)
        if log is None or log.trained_epoch != self.epoch:
            return
        end = len(log.lrs)
        start = end - len(self.losses)
        if self.writer is None:  # what an interrupted epoch wrote after `start` is hidden
            self.writer = self._open(self.folder, purge_step=start if start else None)
        for step, loss in enumerate(torch.stack(self.losses).tolist(), start):
            self.writer.add_scalar("step/loss", loss, step)
            self.writer.add_scalar("step/lr", log.lrs[step], step)
            if log.moms[step] is not None:
                self.writer.add_scalar("step/momentum", log.moms[step], step)
        for name, value in log.rows[-1].items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(f"epoch/{name}", value, end - 1)
        self.writer.flush()
        self.losses = []

    def add_pictures(self, pictures):
        """Add `{name: Figure}` as images and close the log."""
        writer = self.writer or self._open(self.folder)
        for name, figure in pictures.items():
            writer.add_figure(f"pictures/{name}", figure, close=False)
        writer.close()
        self.writer = None

    def __getstate__(self):
        return {"folder": self.folder}
