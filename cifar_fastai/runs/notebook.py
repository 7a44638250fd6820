"""The run's folder of a learner that is trained in a notebook: what a recipe writes, from the same code."""

from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.learner import format_time

from cifar_fastai.data.images import CIFAR100_COARSE, DIGITS, FASTAI_SOURCE, NAMED
from cifar_fastai.errors import InputError, printable, renamed
from cifar_fastai.plots.style import save_figure
from cifar_fastai.runs.folder import describe_run, hold_folder, is_run, make_folder, read_config
from cifar_fastai.runs.results import check_layers, write_results
from cifar_fastai.runs.run import Run, check_images, restore_history
from cifar_fastai.settings import OPTIONS, Settings
from cifar_fastai.training.checkpoint import Checkpoint, load_checkpoint, load_weights, plain
from cifar_fastai.training.recorder import in_epochs, read_history, write_history
from cifar_fastai.training.schedule import one_cycle_steps

__all__ = ["KeepRun", "write_run"]


class KeepRun(Checkpoint):
    """Train into the run's folder `folder`: `learn.fit_one_cycle(20, lr, cbs=KeepRun("runs/x"))`.

    The folder holds what a recipe's holds while it trains: config.json, history.csv, and checkpoint.pth after every
    epoch. The same call after a crash goes on after the last epoch, on a CPU to the digit; once all are done it loads
    the result instead of training. `write_run(learn, folder)` completes the folder.

    For a learner from `cifar_learner` on `cifar_dls`, in every fit but `fine_tune`, which makes two: one folder holds
    one. A callback of your own names in a class attribute `saved` the attributes that a resumed fit needs. InputError
    for a folder with another fit, which names the difference, and for one that another process trains in.
    """

    _stateattrs = ("stack",)

    def __init__(self, folder):
        super().__init__(Path(folder) / "checkpoint.pth", {})
        self.folder, self.stack = Path(folder), ExitStack()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "learn" and value is None:  # the fit has ended, perhaps with an error
            self.stack.close()

    def before_fit(self):
        learn, folder, history = self.learn, self.folder, _history(self.learn, "KeepRun")
        for cb in learn._grab_cbs(GradientAccumulation):
            if len(self.dls.train) % ceil(cb.n_acc / self.dls.train.bs):
                raise InputError("leaves gradients at the end of an epoch, which no checkpoint holds", n_acc=cb.n_acc)
        is_new, self.first_epoch = not is_run(folder), 0
        if is_new:
            with renamed(out="folder"):
                make_folder("notebook", str(folder), learn.dls.images.source)
        hold_folder(folder, self.stack, "folder")
        self.stack.callback(setattr, history, "path", history.path)
        history.path = folder / "history.csv"
        fit, lrs = self._describe()
        if is_new:
            history.origin = {}  # of a loaded learner
            run = _run(learn, folder, len(history.rows) + self.n_epoch, history.lrs + lrs, fit)
            run.write_config()
        config = run.config if is_new else self._go_on(fit)
        self.meta = dict(config=config, given=fit, recipe="", fingerprint=self.dls.images.fingerprint)

    def _describe(self):
        """(what makes the fit, by name; the learning rate of its steps, or one that stays)."""
        n, hypers = self.n_epoch * len(self.dls.train), self.opt.hypers
        steps = {name: [[hyper.get(name) for hyper in hypers]] for name in ("lr", "wd")}  # by step and parameter group
        for cb in self.learn._grab_cbs(ParamScheduler):
            steps |= {name: [np.ravel(value(k / n)).tolist() for k in range(n)] for name, value in cb.scheds.items()}
        lrs = plain([values[-1] for values in steps["lr"]])
        names = {cb.name for cb in self.learn.cbs} - {"progress", "precision", "scaled_step", self.name}
        samples = {f"{name} by step": values[:: 1 + len(values) // 5] for name, values in steps.items()}
        loss, metrics = self.learn.loss_func, list(self.learn.metrics.attrgot("name"))
        parts = dict(callbacks=sorted(names), loss_func=getattr(loss, "__name__", type(loss).__name__), metrics=metrics)
        return plain(_settings(self.learn, self.n_epoch, lrs) | parts | samples), lrs

    def _go_on(self, fit):
        """Restore what the folder holds, if it is of this `fit`, and show its epochs; the content of config.json."""
        learn, folder, saved = self.learn, self.folder, load_checkpoint(self.path) if self.path.exists() else None
        config = saved["config"] if saved else read_config(folder)
        if saved and saved["recipe"]:
            raise InputError("a recipe's run; resume it there, or choose another folder", folder=str(folder))
        values = config["parameters"] | (config["given"] if config["recipe"] is None else {})
        is_kind = saved and str(config["device"]).startswith(self.dls.device.type)  # another may have no such precision
        for name in fit:
            if name in values and fit[name] != values[name] and (is_kind or name != "precision"):
                other = f"in {folder}, which holds one fit (fine_tune makes two); choose another folder"
                raise InputError(f"it is {values[name]} {other}", **{name: fit[name]})
        check_images(self.dls.images, config)
        if saved:
            self.restore = saved
            super().before_fit()
        else:
            load_weights(self.model, folder / "model.pth")
            settings = Settings(**{name: x for name, x in config["parameters"].items() if name in OPTIONS})
            restore_history(learn, folder, settings, config)
            self.first_epoch = self.n_epoch
        n = saved["epoch"] if saved else self.n_epoch
        if self.first_epoch < self.n_epoch:
            print(f"going on with {folder} after epoch {n} of {self.n_epoch}")
        else:
            print(f"Loaded, not trained here: {in_epochs(n) if saved else describe_run(folder)}")
        bar = getattr(getattr(learn, "progress", None), "mbar", None)
        if bar is not None:
            bar.update(0)  # starts its clock, as epoch 0 does
        for epoch, row in enumerate(learn.history.rows[-n:]):
            values = row | dict(epoch=epoch, time=format_time(row["seconds"]))
            self.logger([values.get(name, values.get(f"valid_{name}")) for name in self.recorder.metric_names])
        return config


def write_run(learn, folder=None):
    """Evaluate `learn`, from `cifar_learner`, and write its run's folder: all that a recipe writes.

    On other DataLoaders than `cifar_dls` makes, `dls.valid` is evaluated, and there is no picture of the augmentations;
    without a layer for Grad-CAM nothing is explained.

    `folder`: by default runs/notebook-<date>-<time>, or that of `KeepRun`; nothing is done where it holds this very
    run. config.json states how the learner was made, and its fit if that was a single `fit_one_cycle`, else its highest
    learning rate; it does not know your own callbacks. Returns the path of report.html. Raises InputError for another
    learner, for one that was not trained to its end, and for a folder with another run.
    """
    history, overrides = _history(learn, "write_run", needs_images=False), {}
    if not history.rows:
        raise InputError("there is no epoch to write: train the learner first")
    table = Path("" if folder is None else folder) / "history.csv"
    if folder is not None and is_run(folder) and table.exists() and read_history(table) == history.rows:
        folder = Path(folder)  # of this very run: the times of its epochs distinguish it from any other
        if not (folder / "checkpoint.pth").exists():
            print(f"{folder} holds this run")
            return folder / "report.html"
        if not load_checkpoint(folder / "checkpoint.pth")["finished_epochs"]:
            raise InputError("its fit is not finished: run it again to go on", folder=str(folder))
        overrides = read_config(folder)["given"]
    else:
        with renamed(out="folder"):
            folder = make_folder("notebook", folder, _images(learn.dls).source)
    run = _run(learn, folder, len(history.rows), history.lrs, overrides)
    if run.suggestions is not None:
        save_figure(learn.range_test.plot(), folder / "lr_find.png")
    run.write_config()
    write_history(folder / "history.csv", history.rows)
    write_results(run)
    (folder / "checkpoint.pth").unlink(missing_ok=True)
    return folder / "report.html"


def _history(learn, name, needs_images=True):
    """The history of a learner from `cifar_learner`, if it `needs_images` on `cifar_dls`; InputError for others."""
    if not hasattr(learn, "history") or needs_images and not hasattr(learn.dls, "images"):
        source = " with DataLoaders made by cifar_dls" if needs_images else ""
        raise InputError(f"{name} takes a learner made by cifar_learner{source}")
    return learn.history


def _images(dls):
    """The ImageSet of `dls`; what a run's files say of the images of DataLoaders that are not from `cifar_dls`."""
    if hasattr(dls, "images"):
        return dls.images
    about = dict(name="own DataLoaders", source=printable(dls.path), fingerprint=None, note=None, flip=0.5)
    return SimpleNamespace(**about, classes=tuple(map(str, dls.vocab)), mean=(), std=())


def _run(learn, folder, epochs, lrs, overrides):
    """A `Run` of the learner's fits, of `epochs` epochs with the rates `lrs`."""
    images, test = _images(learn.dls), getattr(learn, "range_test", None)
    names = {name: data for data, name in NAMED.items()} | {DIGITS: "digits"}
    is_remote = "://" in images.source or images.source == FASTAI_SOURCE
    data = names[images.name] if is_remote or images.name in (DIGITS, CIFAR100_COARSE) else images.source
    s = Settings(**{"seed": None, **_settings(learn, epochs, lrs), "data": data})
    if images.fingerprint is None:
        n_train, n_valid = (len(ds) for ds in (learn.dls.train_ds, learn.dls.valid_ds))
        s = replace(s, valid_pct=n_valid / (n_train + n_valid), no_test=True, bs=learn.dls.train.bs)
    try:
        check_layers(learn, s.cam_layer)
    except InputError as error:
        print(f"no heatmaps: {error}")
        s = replace(s, no_explain=True)
    about = dict(suggestions=test and test.suggestions, folder=folder)
    return Run(None, s, overrides, images, learn, s.bs, s.lr, s.flip, s.precision, **about)


def _settings(learn, epochs, lrs):
    """The learner's parameters, with those of its one cycle if `lrs` are its rates, else with the highest of them."""
    values, n = learn.settings | dict(epochs=epochs), epochs * len(learn.dls.train)
    s = Settings(**values)
    if not lrs or s.sched == "one-cycle" and len(lrs) == n and np.allclose(lrs, one_cycle_steps(s, n)[0]):
        return values
    values = {name: x for name, x in values.items() if OPTIONS[name].metadata.get("needs", [""])[0] != "sched"}
    return values | dict(sched="none", lr=max(lrs))
