"""What a run writes down as it trains: history.csv, a tidy line an epoch, the best weights on a validation split."""

import csv
import time

from fastai.callback.core import Callback, CancelFitException

from cifar_fastai.checkpoint import save_torch
from cifar_fastai.files import atomic_write

__all__ = ["HISTORY_COLUMNS", "KeepBest", "RunLog", "read_history"]

HISTORY_COLUMNS = ("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "images_per_second",
                   "seconds")  # fmt: skip


class RunLog(Callback):
    """Keep one row per epoch, write them to `path` (history.csv) whenever one is added, and print it.

    train_loss and train_accuracy are means over the epoch as it trained, augmented images and changing weights
    included; valid_* belong to the split that is evaluated. Epochs count from 1. Numbers that were not measured are
    None, blank in the file.
    """

    order = 65

    def __init__(self, path, eval_split="test", rows=()):
        self.path, self.eval_split, self.rows = path, eval_split, list(rows)
        self.lrs, self.moms = [], []  # per step, for the picture of the schedule
        self.started = None

    def print_header(self):
        """Print the names of the columns."""
        loss, acc = f"{self.eval_split} loss", f"{self.eval_split} acc"
        print(f"{'epoch':>7}  {'train loss':>10}  {'train acc':>9}  {loss:>10}  {acc:>9}  {'lr':>8}  {'images/s':>8}"
              f"  {'time':>7}", flush=True)  # fmt: skip

    def before_train(self):
        self.started = time.perf_counter()

    def after_batch(self):
        if self.training:
            hypers = self.opt.hypers[-1]
            self.lrs.append(float(hypers["lr"]))
            self.moms.append(float(hypers["mom"]) if "mom" in hypers else None)

    def after_train(self):
        self.trained = time.perf_counter()

    def after_epoch(self):
        if self.started is None:
            return  # an epoch that a resumed run skips
        rec = self.recorder
        train = dict(zip(("train_loss", "train_accuracy"), (m.value for m in rec._train_mets), strict=False))
        valid = dict(zip(("valid_loss", "valid_accuracy"), (m.value for m in rec._valid_mets), strict=False))
        n_images = len(self.dls.train) * self.dls.train.bs
        row = dict.fromkeys(HISTORY_COLUMNS) | train | valid
        row |= {"epoch": self.epoch + 1, "lr": self.lrs[-1],
                "images_per_second": n_images / (self.trained - self.started),
                "seconds": time.perf_counter() - self.started}  # fmt: skip
        self.started = None
        self.rows.append(row)
        self.write()
        self._print(row)

    def write(self):
        """Write all rows to history.csv."""
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, HISTORY_COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _print(self, row):
        def percent(value):
            return "-" if value is None else f"{value:.2%}"

        minutes, seconds = divmod(round(row["seconds"]), 60)
        print(f"{row['epoch']:>3}/{self.n_epoch:<3}  {row['train_loss']:>10.4f}  {percent(row['train_accuracy']):>9}  "
              f"{row['valid_loss']:>10.4f}  {percent(row['valid_accuracy']):>9}  {row['lr']:>8.2g}  "
              f"{row['images_per_second']:>8,.0f}  {minutes:>4}:{seconds:02}", flush=True)  # fmt: skip


class KeepBest(Callback):
    """Write the weights of the best validation accuracy to `path`, and end the fit after `patience` epochs without.

    `path` None keeps none, `patience` None never ends. On the validation split only: nothing is chosen on test.
    """

    order = 70

    def __init__(self, path=None, patience=None):
        self.path, self.patience = path, patience
        self.best, self.waited = -1.0, 0

    def after_validate(self):
        if hasattr(self.learn, "gather_preds"):
            return
        accuracy = self.recorder.metrics[0].value
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            if self.path is not None:
                save_torch(self.path, self.model.state_dict())
        else:
            self.waited += 1


class StopWaiting(Callback):
    """End the fit when `KeepBest` has waited long enough; after the checkpoint of that epoch is written."""

    order = 110

    def after_epoch(self):
        keep = self.learn.keep_best
        if keep.patience is not None and keep.waited >= keep.patience:
            print(f"stopped: {keep.waited} epochs without a better validation accuracy than {keep.best:.2%}")
            raise CancelFitException


def read_history(path):
    """The rows of a history.csv as dicts of numbers, None where blank."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: None if text == "" else int(text) if name == "epoch" else float(text)
             for name, text in row.items()} for row in rows]  # fmt: skip
