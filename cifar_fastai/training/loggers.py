"""TensorBoard logs of a run, through torch's SummaryWriter.

fastai's `TensorBoardCallback` traces the model, which fails under mixed precision, and reads the loss at every step.
"""

import threading
from contextlib import contextmanager

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
        with self._writing(purge_step=start or None) as writer:
            for step, loss in enumerate(torch.stack(self.losses).tolist(), start):
                writer.add_scalar("step/loss", loss, step)
                writer.add_scalar("step/lr", log.lrs[step], step)
                if log.moms[step] is not None:
                    writer.add_scalar("step/momentum", log.moms[step], step)
            for name, value in log.rows[-1].items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(f"epoch/{name}", value, end - 1)
        self.losses = []

    def add_pictures(self, pictures):
        """Add `{name: Figure}` as images and close the log."""
        with self._writing() as writer:
            for name, figure in pictures.items():
                writer.add_figure(f"pictures/{name}", figure, close=False)
        self.writer.close()
        self.writer = None

    @contextmanager
    def _writing(self, purge_step=None):
        """The writer, flushed at the end; a new one hides what an interrupted run wrote at `purge_step` and later."""
        threading.excepthook = _quiet
        try:
            if self.writer is None:
                self.writer = self._open(self.folder, purge_step=purge_step)
            yield self.writer
            self.writer.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.folder) from None

    def __getstate__(self):
        return {"folder": self.folder}


_excepthook = threading.excepthook


def _quiet(args):
    """An error in the thread that writes is raised again where it was told to write; once is enough."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        _excepthook(args)
