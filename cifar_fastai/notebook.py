"""The run's folder of a learner that was trained in a notebook: what a recipe writes, from the same code."""

from pathlib import Path
from types import SimpleNamespace

from cifar_fastai.config import BASE
from cifar_fastai.data import DIGITS, FASTAI_SOURCE
from cifar_fastai.errors import InputError
from cifar_fastai.files import write_json
from cifar_fastai.history import read_history, write_history
from cifar_fastai.loaders import test_dl
from cifar_fastai.outputs import write_results
from cifar_fastai.runs import make_folder, run_config

__all__ = ["write_run"]


def write_run(learn, folder=None):
    """Evaluate `learn`, from `cifar_learner`, and write its run's folder: numbers, weights, pictures, report.html.

    `folder`: by default runs/notebook-<date>-<time>. `load_run` and the recipe `explain.py` take it as they take a
    recipe's. Where the folder holds this very run, nothing is done. Returns the path of report.html. Raises InputError
    for a learner that was not trained, and for a folder with another run.
    """
    history, dls = learn.history, learn.dls
    if not history.rows:
        raise InputError("there is no epoch to write down: train the learner first")
    if folder is not None and _holds(Path(folder), history.rows):
        print(f"{folder} holds this run")
        return Path(folder) / "report.html"
    folder = make_folder("notebook", folder)
    made = {"seed": None} | learn.settings | {"data": _data(dls.images), "epochs": len(history.rows)}
    cfg = SimpleNamespace(**BASE | made, given={})
    config = run_config(None, cfg, dls.images, learn) | history.origin
    run = SimpleNamespace(
        learn=learn, cfg=cfg, folder=folder, log=history, images=dls.images, config=config, tensorboard=None,
        eval_split=config["eval_split"], n_parameters=sum(p.numel() for p in learn.model.parameters()),
        test_dl=None if cfg.no_test else dls.valid if cfg.valid_pct is None else test_dl(dls),
    )  # fmt: skip
    write_json(folder / "config.json", config)
    write_history(folder / "history.csv", history.rows)
    write_results(run)
    return folder / "report.html"


def _data(images):
    """What `load_images` takes to get these images again."""
    if images.name == DIGITS:
        return "digits"
    return "cifar10" if images.source == FASTAI_SOURCE else images.source


def _holds(folder, rows):
    """Whether the finished run in `folder` is the one with these epochs; their times tell it from any other."""
    written = (folder / "report.html").exists() and (folder / "history.csv").exists()
    return written and read_history(folder / "history.csv") == rows
