"""What a run writes down as it trains: history.csv, a tidy line an epoch, the best weights on a validation split."""

from fastai.callback.core import Callback, CancelFitException

from cifar_fastai.training.checkpoint import save_torch
from cifar_fastai.training.history import History, write_history

__all__ = ["KeepBest", "RunLog", "StopWaiting"]


class RunLog(History):
    """A History that writes itself to `path` (history.csv) whenever a row is added, and prints the row.

    `trained_epoch` tells other callbacks after an epoch whether it was trained: those that a resumed run skips are not.
    """

    def __init__(self, path, eval_split="test", rows=()):
        super().__init__(rows)
        self.path, self.eval_split, self.trained_epoch = path, eval_split, None

    def print_header(self):
        """Print the names of the columns."""
        loss, acc = f"{self.eval_split} loss", f"{self.eval_split} acc"
        print(
            f"{'epoch':>7}  {'train loss':>10}  {'train acc':>9}  {loss:>10}  {acc:>9}  {'lr':>8}  {'images/s':>8}"
            f"  {'time':>7}",
            flush=True,
        )

    def after_epoch(self):
        known = len(self.rows)
        super().after_epoch()
        if len(self.rows) > known:
            self.trained_epoch = self.epoch
            self.write()
            self._print(self.rows[-1])

    def write(self):
        """Write all rows to history.csv."""
        write_history(self.path, self.rows)

    def _print(self, row):
        def percent(value):
            return "-" if value is None else f"{value:.2%}"

        minutes, seconds = divmod(round(row["seconds"]), 60)
        print(
            f"{row['epoch']:>3}/{self.n_epoch:<3}  {row['train_loss']:>10.4f}  {percent(row['train_accuracy']):>9}  "
            f"{row['valid_loss']:>10.4f}  {percent(row['valid_accuracy']):>9}  {row['lr']:>8.2g}  "
            f"{row['images_per_second']:>8,.0f}  {minutes:>4}:{seconds:02}",
            flush=True,
        )


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
