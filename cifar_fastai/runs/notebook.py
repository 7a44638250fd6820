"""The run's folder of a learner that was trained in a notebook: what a recipe writes, from the same code."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cifar_fastai.config import BASE
from cifar_fastai.data.images import DIGITS, FASTAI_SOURCE
from cifar_fastai.errors import InputError
from cifar_fastai.files import write_json
from cifar_fastai.plots.charts import save_figure
from cifar_fastai.runs.folder import make_folder, run_config
from cifar_fastai.runs.results import write_results
from cifar_fastai.training.history import read_history, write_history
from cifar_fastai.training.schedule import one_cycle_steps

__all__ = ["write_run"]


def write_run(learn, folder=None):
    """Evaluate `learn`, from `cifar_learner` on `cifar_dls`, and write its run's folder: all that a recipe writes.

    `folder`: by default runs/notebook-<date>-<time>. `load_run` and the recipe `explain.py` take it as they take a
    recipe's where `cifar_learner` was given the network's name. config.json says how the learner was made, and its fit
    where that was one `fit_one_cycle`, else the highest learning rate alone; callbacks of your own it does not know.
    Where the folder holds this very run, nothing is done. Returns the path of report.html. Raises InputError for
    another learner, for one that was not trained, and for a folder with another run.
    """
    history, dls = getattr(learn, "history", None), learn.dls
    if history is None or not hasattr(dls, "images"):
        raise InputError("write_run takes a learner made by cifar_learner with DataLoaders made by cifar_dls")
    if not history.rows:
        raise InputError("there is no epoch to write down: train the learner first")
    if folder is not None and _holds(Path(folder), history.rows):
        print(f"{folder} holds this run")
        return Path(folder) / "report.html"
    folder = make_folder("notebook", folder)
    made = {"seed": None} | learn.settings | {"data": _data(dls.images), "epochs": len(history.rows)}
    cfg = SimpleNamespace(**BASE | made, given={})
    if history.lrs and not _is_one_cycle(cfg, history, len(dls.train)):
        cfg.sched, cfg.lr = "none", max(history.lrs)
    config = run_config(None, cfg, dls.images, learn) | history.origin
    run = SimpleNamespace(
        learn=learn,
        cfg=cfg,
        folder=folder,
        log=history,
        images=dls.images,
        config=config,
        tensorboard=None,
        eval_split=config["eval_split"],
        n_parameters=sum(p.numel() for p in learn.model.parameters()),
    )
    found = getattr(learn, "range_test", None)
    if found is not None:
        config["lr_find"] = found.suggestions
        save_figure(found.plot(), folder / "lr_find.png")
    write_json(folder / "config.json", config)
    write_history(folder / "history.csv", history.rows)
    write_results(run)
    return folder / "report.html"


def _is_one_cycle(cfg, history, n_steps):
    """Whether every step of the history was one of a single cycle, the one that `cfg` describes."""
    if cfg.sched != "one-cycle" or len(history.lrs) != cfg.epochs * n_steps:
        return False
    return np.allclose(history.lrs, one_cycle_steps(cfg, len(history.lrs))[0])


def _data(images):
    """What `load_images` takes to get these images again."""
    if images.name == DIGITS:
        return "digits"
    return "cifar10" if images.source == FASTAI_SOURCE else images.source


def _holds(folder, rows):
    """Whether the finished run in `folder` is the one with these epochs; their times tell it from any other."""
    written = (folder / "report.html").exists() and (folder / "history.csv").exists()
    return written and read_history(folder / "history.csv") == rows
