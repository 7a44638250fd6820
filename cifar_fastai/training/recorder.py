"""What training measures: the Recorder and progress bars without a wait at every step, and the history of all fits."""

import sys
import time
from collections import defaultdict
from itertools import zip_longest

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import TrackerCallback
from fastai.learner import AvgSmoothLoss, Metric, Recorder
from fastai.torch_core import find_bs, to_detach
from fastcore.foundation import L
from tqdm import tqdm

from cifar_fastai.errors import InputError, check_choice, reason
from cifar_fastai.files import atomic_write, check_regular
from cifar_fastai.hardware import n_processes

HISTORY_COLUMNS = tuple(
    "epoch train_loss train_accuracy valid_loss valid_accuracy lr images_per_second seconds".split()
)
BAR_SECONDS = 0.25  # between two updates of a bar on a terminal


def history_columns(rows):
    """The columns of a history: HISTORY_COLUMNS, with the learner's own metrics in place of the accuracies."""
    first, last = ("epoch",), ("lr", "images_per_second", "seconds")
    names = dict.fromkeys(name for row in rows for name in row if name not in first + last)
    splits = [tuple(name for name in names if name.startswith(split)) for split in ("train_", "valid_")]
    return (*first, *splits[0], *splits[1], *last) if rows else HISTORY_COLUMNS


def metric_values(learn, split):
    """{column of the history: value} of the metrics that the learner's `Recorder` computed for "train" or "valid"."""
    metrics = getattr(learn.recorder, f"_{split}_mets") if hasattr(learn, "recorder") else ()
    names = ["loss", *learn.metrics.attrgot("name")]  # there are fewer metrics where some are not measured
    return {f"{split}_{name}": _number(getattr(metric, "value", None)) for name, metric in zip_longest(names, metrics)}


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # None, a matrix, a text
        return None


class FitCallback(Callback):
    """A callback that does nothing in the passes named in `rests_in`: range tests and predictions.

    fastai's own callbacks set `run` in `before_fit`, where a pass that was interrupted leaves them off for good.
    """

    rests_in, _only_train_loop = ("lr_finder", "gather_preds"), True  # the latter keeps it out of fastai's summary

    def __call__(self, event_name):
        if event_name == "before_fit":
            self.run = not any(hasattr(self.learn, name) for name in self.rests_in)
        return super().__call__(event_name)


class DeviceMean(Metric):
    """The mean over images of `func(learn)`, itself the mean over a batch, summed on the device, read at the end."""

    name = None  # a property in fastai

    def __init__(self, func, name):
        self.func, self.name = func, name
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def accumulate(self, learn):
        n = find_bs(learn.yb)
        self.total = self.total + self.func(learn).detach().float() * n
        self.count += n

    @property
    def value(self):
        return self.total.item() / self.count if self.count else None


def device_loss(learn):
    """The learner's loss of this batch, averaged over its images."""
    return learn.loss.mean()


def accuracy_per_image(learn):
    """The fraction of this batch that is classified correctly."""
    return (learn.pred.argmax(-1) == learn.yb[0]).float().mean()


class _SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, kept on the loss's device."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean().float()
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class DeviceRecorder(Recorder):
    """fastai's `Recorder`; train_loss is the epoch's mean, as valid_loss is, and no step waits for a number.

    The metrics on train images come after fastai's own columns, as train_accuracy and so on. `losses` holds the
    smoothed loss of every step as 0-d tensors, on the device until the fit ends.
    """

    name, losses = "recorder", ()

    def __init__(self):
        super().__init__(train_metrics=True)
        self.loss, self.train_loss = DeviceMean(device_loss, "loss"), DeviceMean(device_loss, "loss")
        self.smooth_loss = _SmoothLoss()

    def before_fit(self):
        super().before_fit()
        metrics = self.metrics.attrgot("name")
        names = L("train_loss") + (L("valid_loss") + metrics if self.valid_metrics else L())
        names += metrics.map("train_{}") if self.train_metrics else L()
        self.metric_names = L("epoch") + names + L(["time"] if self.add_time else [])
        for cb in self.learn._grab_cbs(TrackerCallback):
            short = cb.monitor.removeprefix("valid_")  # as history.csv calls it
            cb.monitor = check_choice(tuple(names), monitor=short if short in metrics else cb.monitor)

    def before_epoch(self):
        super().before_epoch()
        self.train_values = L()

    def before_train(self):
        self._train_mets.map(lambda metric: metric.reset())

    def after_train(self):
        super().after_train()
        self.log, self.train_values = self.log[:2], self.log[2:]

    def after_validate(self):
        super().after_validate()
        self.log += self.train_values

    def after_batch(self):
        if self.training and len(self.yb):
            self.learn.pred = to_detach(self.pred, cpu=False, gather=False)  # metrics may need no gradient: .numpy()
            self.smooth_loss.accumulate(self.learn)
        super().after_batch()

    def after_fit(self):
        if len(self.losses):  # one read for the whole fit
            self.losses = list(torch.stack(self.losses).cpu())

    @property
    def _train_mets(self):
        metrics = self.metrics if self.train_metrics else L()
        return L() if getattr(self, "cancel_train", False) else L(self.train_loss) + metrics


class Bounded:
    """Limits how often a number is read from the device: at most once a second, and once in 16 steps."""

    def __init__(self):
        self.last_time, self.last_step = time.monotonic(), 0

    def due(self, step):
        """Whether a number may be read at `step`, a count that grows."""
        is_due = step - self.last_step >= 16 and time.monotonic() - self.last_time >= 1
        if is_due:
            self.last_time, self.last_step = time.monotonic(), step
        return is_due


class DeviceProgress(ProgressCallback):
    """fastai's progress bar, which reads the loss now and then instead of at every step."""

    name = "progress"

    def before_fit(self):
        self.reads = Bounded()
        super().before_fit()

    def after_batch(self):
        self.pbar.update(self.iter + 1)
        if hasattr(self, "smooth_loss") and self.reads.due(self.train_iter):
            self.pbar.comment = f"{self.smooth_loss.item():.4f}"


def console_bar(title, iterable=None, total=None, delay=0):
    """A tqdm bar of one line on a terminal, which it leaves empty in the end; a log file gets none of it."""
    text = "{desc}  [{bar:20}] {percentage:3.0f} %, {remaining} left"
    look = dict(bar_format=text, ascii=" =", leave=False, smoothing=0, mininterval=BAR_SECONDS, miniters=1)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(iterable, title, total, file=sys.stderr, disable=not is_terminal, delay=delay, **look)


class ConsoleProgress(Callback):
    """A line on a terminal for a fit, a range test or predictions: what is done, how much of it, and the time left.

    It counts images that pass forward. An image of a training step counts three times, as its backward pass costs
    about twice the forward one.
    """

    order = 64  # after History has printed its header
    bar, _stateattrs = None, ("bar",)

    def before_train(self):
        finder, train = getattr(self.learn, "lr_finder", None), self.dls.train
        title = "range test" if finder else f"{self.epoch + 1:>3}/{self.n_epoch:<3}"
        if self.bar is None:
            epoch = 3 * len(train) * train.bs + len(self.dls.valid.dataset)
            total = 3 * finder.num_it * train.bs if finder else (self.n_epoch - self.epoch) * epoch
            self.bar = console_bar(title, total=total)  # a range test ends within an epoch
        self.bar.set_description_str(title, False)

    def before_validate(self):
        if self.bar is None:
            self.bar = console_bar("evaluating", total=len(self.dl.dataset))

    def after_batch(self):
        self.bar.update(n_processes() * find_bs(self.xb) * (3 if self.training else 1))

    def after_validate(self):
        self.bar.clear()

    def after_fit(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class History(FitCallback):
    """The epochs and steps of all fits: `rows`, a dict of numbers by epoch; `lrs` and `moms`, floats by step.

    The keys of a row are HISTORY_COLUMNS, or with other metrics than the accuracy `history_columns`.

    train_loss and train_accuracy are means over the epoch as it trained, augmented images and changing weights
    included; valid_* belong to the split that is evaluated. Losses are those of the loss function, label smoothing
    included. Epochs count from 1 and go on in the next fit. Numbers that were not measured are None.

    path: history.csv, written after every epoch (None: not written)
    verbose: whether to print a row for every epoch; `eval_split` names the evaluated split in its header
    trained_epoch: the last trained epoch of this fit, from 0; a resumed fit skips epochs without training them
    logs: the loggers of the fits, by their names as callbacks
    origin: for a loaded run, what its config says of the machine that trained it, until training goes on here
    """

    order, path, verbose, eval_split, logs = 59, None, False, "test", {}
    _stateattrs = "path", "verbose", "logs"
    widths = 7, 10, 9, 10, 9, 8, 8, 7  # of the columns that are printed
    __setattr__ = object.__setattr__  # fastai's warns that the learner has a `path` and `moms`, too

    def __init__(self):
        self.rows, self.lrs, self.moms, self.origin = [], [], [], {}
        self.before_fit()

    def before_fit(self):
        self.trained_epoch = self.start_time = None

    def before_train(self):
        if self.verbose and self.trained_epoch is None:
            split = self.eval_split
            self._print("epoch", "train loss", "train acc", f"{split} loss", f"{split} acc", "lr", "images/s", "time")
        self.start_time, self.origin, self.steps, self.n_images = time.perf_counter(), {}, [], 0

    def after_batch(self):
        if self.training and self.start_time is not None:
            hypers, self.n_images = self.opt.hypers[-1], self.n_images + n_processes() * find_bs(self.xb)
            self.steps.append((float(hypers["lr"]), float(hypers["mom"]) if "mom" in hypers else None))

    def after_train(self):
        self.train_seconds = time.perf_counter() - self.start_time
        self.values = metric_values(self.learn, "train")

    def after_epoch(self):
        if self.start_time is None:
            return  # nothing was trained: an epoch that a resumed fit skips, or `validate`
        self.lrs += [lr for lr, _ in self.steps]  # now: an interrupted epoch leaves no steps, as it leaves no row
        self.moms += [mom for _, mom in self.steps]
        row = {"epoch": len(self.rows) + 1} | self.values | metric_values(self.learn, "valid")
        speed, seconds = self.n_images / self.train_seconds, time.perf_counter() - self.start_time
        row |= dict(lr=self.lrs[-1], images_per_second=speed, seconds=seconds)
        self.rows.append(row)
        columns = history_columns(self.rows)  # the metrics may be others than in an earlier fit
        self.rows[:] = [{name: row.get(name) for name in columns} for row in self.rows]
        self.trained_epoch, self.start_time = self.epoch, None
        self.write()
        if self.verbose:
            epoch, *numbers, seconds = (row.get(name) for name in HISTORY_COLUMNS)
            formats = ".4f", ".2%", ".4f", ".2%", ".2g", ",.0f"
            texts = ["-" if n is None else f"{n:{format}}" for n, format in zip(numbers, formats, strict=True)]
            self._print(f"{epoch:>3}/{self.n_epoch:<3}", *texts, "{}:{:02}".format(*divmod(round(seconds), 60)))

    def __str__(self):
        return _table(self.rows).to_string(index=False) if self.rows else "no epoch yet"

    def _repr_html_(self):
        return _table(self.rows).to_html(index=False)

    def write(self):
        """Write all rows to `path`, if there is one."""
        if self.path is not None:
            write_history(self.path, self.rows)

    def _print(self, *texts):
        print("  ".join(f"{text:>{width}}" for text, width in zip(texts, self.widths, strict=True)), flush=True)


def in_epochs(n):
    """A number of epochs in words."""
    return "1 epoch" if n == 1 else f"{n:,} epochs"


def write_history(path, rows):
    """Write the rows of a `History` to `path` (history.csv), None as blank. Atomic."""
    with atomic_write(path) as file:
        _table(rows).to_csv(file, index=False, lineterminator="\r\n")


def _table(rows):
    return pd.DataFrame(rows, columns=history_columns(rows), dtype=object)


def read_history(path):
    """The rows of a history.csv as dicts of numbers, None where blank. InputError for a file that is damaged."""
    try:
        types = defaultdict(lambda: float, epoch=int)
        table = pd.read_csv(check_regular(path), dtype=types, float_precision="round_trip")
        columns = history_columns([dict.fromkeys(table)])
        if tuple(table) != columns or not isinstance(table.index, pd.RangeIndex):
            raise ValueError(f"the columns must be {', '.join(columns)}")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    return table.astype(object).where(table.notna(), None).to_dict("records")
