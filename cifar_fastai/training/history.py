"""What training has done, kept on the learner: a row for every epoch, learning rate and momentum for every step."""

import csv
import time

from fastai.callback.core import Callback

from cifar_fastai.files import atomic_write

__all__ = ["HISTORY_COLUMNS", "History", "in_epochs", "read_history", "write_history"]

HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_accuracy",
    "lr",
    "images_per_second",
    "seconds",
)


class History(Callback):
    """`rows`, a dict of HISTORY_COLUMNS for every epoch; `lrs` and `moms`, a float for every step.

    train_loss and train_accuracy are means over the epoch as it trained, augmented images and changing weights
    included; valid_* belong to the split that is evaluated. Losses are those of the loss function, label smoothing
    included. Epochs count from 1, and go on in the next fit. Numbers
    that were not measured are None. fastai's Recorder forgets its own at every fit, and at every `get_preds` too.
    `origin`: for a loaded run, what its config says of the machine that trained it, until training goes on here.
    """

    order = 65

    def __init__(self, rows=()):
        self.rows, self.lrs, self.moms, self.origin = list(rows), [], [], {}
        self.started = None

    def before_train(self):
        self.started = None
        if not hasattr(self.learn, "lr_finder"):
            self.started, self.origin, self.pending = time.perf_counter(), {}, []

    def after_batch(self):
        if self.training and self.started is not None:
            hypers = self.opt.hypers[-1]
            self.pending.append((float(hypers["lr"]), float(hypers["mom"]) if "mom" in hypers else None))

    def after_train(self):
        self.trained = time.perf_counter()
        self.train_values = [metric.value for metric in self.recorder._train_mets]  # validation reuses the metrics

    def after_epoch(self):
        if self.started is None:
            return  # a range test, or an epoch that a resumed run skips
        valid_values = [metric.value for metric in self.recorder._valid_mets]
        train = dict(zip(("train_loss", "train_accuracy"), self.train_values, strict=False))
        valid = dict(zip(("valid_loss", "valid_accuracy"), valid_values, strict=False))
        for lr, mom in self.pending:  # now, as an epoch that is broken off leaves none, as it leaves no row
            self.lrs.append(lr)
            self.moms.append(mom)
        n_images = len(self.dls.train) * self.dls.train.bs
        row = dict.fromkeys(HISTORY_COLUMNS) | train | valid
        row |= {
            "epoch": len(self.rows) + 1,
            "lr": self.lrs[-1],
            "images_per_second": n_images / (self.trained - self.started),
            "seconds": time.perf_counter() - self.started,
        }
        self.started = None
        self.rows.append(row)


def in_epochs(n):
    """A number of epochs in words."""
    return "1 epoch" if n == 1 else f"{n:,} epochs"


def write_history(path, rows):
    """Write rows of HISTORY_COLUMNS to `path` (history.csv), what is None as blank. Atomic."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, HISTORY_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_history(path):
    """The rows of a history.csv as dicts of numbers, None where blank."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: None if text == "" else int(text) if name == "epoch" else float(text) for name, text in row.items()}
        for row in rows
    ]
