"""The run's folder of a learner that was trained in a notebook: what a recipe writes, from the same code."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cifar_fastai.data.images import CIFAR100_COARSE, DIGITS, FASTAI_SOURCE, NAMED
from cifar_fastai.errors import InputError, renamed
from cifar_fastai.plots.style import save_figure
from cifar_fastai.runs.folder import make_folder
from cifar_fastai.runs.results import write_results
from cifar_fastai.runs.run import Run
from cifar_fastai.settings import Settings
from cifar_fastai.training.recorder import read_history, write_history
from cifar_fastai.training.schedule import one_cycle_steps

__all__ = ["write_run"]


def write_run(learn, folder=None):
    """Evaluate `learn`, from `cifar_learner` on `cifar_dls`, and write its run's folder: all that a recipe writes.

    `folder`: by default runs/notebook-<date>-<time>; nothing is done where it holds this very run. config.json states
    how the learner was made, and its fit if that was a single `fit_one_cycle`, else its highest learning rate; it does
    not know your own callbacks. Returns the path of report.html. Raises InputError for another learner, for one that
    was not trained, and for a folder with another run.
    """
    history, images = getattr(learn, "history", None), getattr(learn.dls, "images", None)
    if history is None or images is None:
        raise InputError("write_run takes a learner made by cifar_learner with DataLoaders made by cifar_dls")
    if not history.rows:
        raise InputError("there is no epoch to write: train the learner first")
    if folder is not None and _holds(Path(folder), history.rows):
        print(f"{folder} holds this run")
        return Path(folder) / "report.html"
    with renamed(out="folder"):
        folder = make_folder("notebook", folder, images.source)
    names = {name: data for data, name in NAMED.items()} | {DIGITS: "digits"}
    is_remote = "://" in images.source or images.source == FASTAI_SOURCE
    data = names[images.name] if is_remote or images.name in (DIGITS, CIFAR100_COARSE) else images.source
    s = Settings(**{"seed": None, **learn.settings, "data": data, "epochs": len(history.rows)})
    if history.lrs and not _is_one_cycle(s, history, len(learn.dls.train)):
        s = replace(s, sched="none", lr=max(history.lrs))
    run = Run(None, s, {}, images, learn, s.bs, s.lr, s.flip, s.precision, folder=folder)
    test = getattr(learn, "range_test", None)
    if test is not None:
        run.suggestions = test.suggestions
        save_figure(test.plot(), folder / "lr_find.png")
    run.write_config()
    write_history(folder / "history.csv", history.rows)
    write_results(run)
    return folder / "report.html"


def _is_one_cycle(settings, history, n_steps):
    """Whether the steps of the history are those of the one cycle that `settings` describe."""
    if settings.sched != "one-cycle" or len(history.lrs) != settings.epochs * n_steps:
        return False
    return np.allclose(history.lrs, one_cycle_steps(settings, len(history.lrs))[0])


def _holds(folder, rows):
    """Whether the finished run in `folder` has these epochs; their times distinguish it from any other."""
    is_finished = (folder / "report.html").exists() and (folder / "history.csv").exists()
    return is_finished and read_history(folder / "history.csv") == rows
