"""A run's folder: what it is called, what it holds, and a learner made from it again."""

import json
import os
import time
from pathlib import Path

import numpy as np
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientClip

from cifar_fastai.config import BASE, Recipe, resolve
from cifar_fastai.data.images import ImageSet, load_images
from cifar_fastai.data.loaders import cifar_dls, default_bs, split_rows
from cifar_fastai.errors import InputError
from cifar_fastai.hardware import choose_device, hardware_name, versions
from cifar_fastai.training.callbacks import ClipValue, L1Penalty, StopOnBadLoss, WeightAverage
from cifar_fastai.training.checkpoint import load_weights
from cifar_fastai.training.history import in_epochs, read_history
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import one_cycle_steps

__all__ = [
    "describe_run",
    "is_run",
    "learner_for",
    "load_network",
    "load_run",
    "make_folder",
    "read_config",
    "run_config",
    "suit_batches",
]

_NOT_KEPT = ("resume", "debug")  # parameters that say nothing about a run
_OF_THE_MACHINE = ("data", "device", "out", *_NOT_KEPT)
_AUGMENT = ("padding", "pad_mode", "flip_by", "vflip", "rotate", "cutout", "n_holes", "max_holes", "cutout_p")


def make_folder(recipe, out=None):
    """A new folder for a run: `out`, or runs/<recipe>-<date>-<time>. InputError where a run is there already."""
    if out is not None:
        folder = Path(out)
        try:
            if (folder / "metrics.json").exists():
                raise InputError(f"--out {out}: holds a finished run; give another folder")
            if (folder / "checkpoint.pth").exists():
                raise InputError(f"--out {out}: holds a run already; give another folder, or --resume {out}")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made ({error.strerror or error})") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"--out {out}: cannot be written to; give another folder")
        return folder
    stamp, n = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    while True:  # two runs may start in the same second
        folder = Path("runs") / (stamp if n == 1 else f"{stamp}-{n}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            n += 1
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror or error}); give --out DIR") from None


def learner_for(cfg, images, device):
    """The learner that `cfg`, the resolved parameters, describes: see `suit_batches` for a small set.

    InputError for settings that do not fit the data.
    """
    suit_batches(cfg, len(split_rows(images, cfg.valid_pct, cfg.split_seed, cfg.subset)[0]))
    if cfg.flip is None:
        cfg.flip = images.flip
    augment = {name: getattr(cfg, name) for name in _AUGMENT}
    dls = cifar_dls(images, cfg.bs, cfg.valid_pct, cfg.split_seed, cfg.subset, cfg.flip, device, **augment)
    lr = 0.1 if cfg.lr == "find" else cfg.lr
    learn = cifar_learner(
        dls,
        cfg.model,
        opt=cfg.opt,
        lr=lr,
        momentum=cfg.momentum,
        mom_min=cfg.mom_min,
        nesterov=cfg.nesterov == "yes",
        wd=cfg.wd,
        wd_bn_bias=cfg.wd_bn_bias == "yes",
        label_smoothing=cfg.label_smoothing,
        precision=cfg.precision,
        cbs=_callbacks(cfg),
    )
    learn.recorder.train_metrics = not (cfg.mixup or cfg.cutmix)  # of mixed images no class is right
    return learn


def suit_batches(cfg, n_train):
    """Lower a default `cfg.bs` for `n_train` images, to 20 steps an epoch, and a default `cfg.lr` in proportion."""
    if "bs" not in cfg.given:
        bs = default_bs(cfg.bs, n_train)
        if "lr" not in cfg.given and cfg.lr != "find":
            # smaller batches are noisier: for SGD this is Goyal and others' linear rule, arXiv:1706.02677
            cfg.lr *= bs / cfg.bs
        cfg.bs = bs


def _callbacks(cfg):
    cbs = [StopOnBadLoss()]
    if cfg.l1:
        cbs.append(L1Penalty(cfg.l1))
    if cfg.clip:
        cbs.append(GradientClip(cfg.clip))
    if cfg.clip_value:
        cbs.append(ClipValue(cfg.clip_value))
    if cfg.mixup:
        cbs.append(MixUp(cfg.mixup))
    if cfg.cutmix:
        cbs.append(CutMix(cfg.cutmix))
    if cfg.ema:
        cbs.append(WeightAverage(cfg.ema))
    return cbs


def is_run(folder):
    """Whether `folder` holds a run, finished or not; of one that is not `load_run` says how to go on with it."""
    return any((Path(folder) / name).exists() for name in ("metrics.json", "checkpoint.pth"))


def read_config(folder):
    """config.json of a run's folder as a dict; InputError where there is none that can be read."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: not a run's folder (no config.json in it)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict):
        raise InputError(f"{path}: not a run's configuration")
    return config


def load_run(folder, device="auto", data=None, weights="model.pth"):
    """The learner of a finished run, from its config.json, history.csv and weights alone: (learn, config).

    learner.pkl is not touched. `data` says where the images are, if not where they were, or is an ImageSet. InputError
    where the run is not finished, the files are damaged or the images are others than it was trained with.
    """
    config = read_config(folder)
    weights = _weights(folder, weights)
    cfg = resolve(Recipe("run", config["parameters"]), {})
    cfg.given = list(config["parameters"])
    images = data if isinstance(data, ImageSet) else load_images(cfg.data if data is None else data)
    if images.fingerprint != config.get("data_fingerprint"):
        raise InputError(
            f"{images.source}: not the images this run was trained with ({config.get('data_name')}); "
            "say where those are with --data"
        )
    device = _choose(device, cfg, config)
    learn = learner_for(cfg, images, device)
    load_weights(learn.model, weights)
    _recall(learn, Path(folder), cfg, config)
    return learn, config


def load_network(folder, device="auto", data=None):
    """The learner of a finished run for images of one's own, which needs none of the run's: config.json says how they
    were normalised. InputError where the run is not finished or its weights are damaged.

    `data`, as for `load_run`, counts for a run of an earlier version, whose config.json does not say it.
    """
    config = read_config(folder)
    if not config.get("mean"):  # a run of an earlier version
        return load_run(folder, device, data)[0]
    cfg = resolve(Recipe("run", config["parameters"]), {})
    device, classes = _choose(device, cfg, config), tuple(config["classes"])
    n = len(classes)
    black = ImageSet(
        config["data_name"],
        classes,
        np.zeros((2 * n, 3, 32, 32), np.uint8),
        np.tile(np.arange(n), 2),
        n,
        config["mean"],
        config["std"],
        config["data_fingerprint"],
        config["data_source"],
    )
    learn = cifar_learner(cifar_dls(black, bs=1, device=device), cfg.model, precision=cfg.precision)
    load_weights(learn.model, _weights(folder, "model.pth"))
    return learn


def _choose(device, cfg, config):
    """The device; on another kind than the run's its precision is chosen anew, for it may not be had here."""
    device = choose_device(device)
    if not str(config.get("device")).startswith(device.type):
        cfg.precision = "auto"
    return device


def _weights(folder, name):
    path = Path(folder) / name
    if not path.exists():
        raise InputError(f"{folder}: no {name} in it; is the run finished? --resume {folder} goes on with it")
    return path


def _recall(learn, folder, cfg, config):
    """Give `learn` the history and settings of the run in `folder`."""
    history, n_steps = learn.history, len(learn.dls.train)
    learn.settings = {name: value for name, value in vars(cfg).items() if name in BASE and name not in _OF_THE_MACHINE}
    about = "device", "hardware", "precision", "compiled", "versions"
    history.origin = {name: config.get(name) for name in about}
    if (folder / "history.csv").exists():
        history.rows.extend(read_history(folder / "history.csv"))
    if cfg.sched == "one-cycle":
        lrs, moms = one_cycle_steps(cfg, cfg.epochs * n_steps)
        history.lrs.extend(lrs[: len(history.rows) * n_steps])
        history.moms.extend(moms[: len(history.rows) * n_steps])


def describe_run(folder):
    """A finished run in one line: network, data, epochs, time, machine, accuracy. InputError where there is none."""
    config = read_config(folder)
    try:
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        split, seconds = "valid" if metrics["test_accuracy"] is None else "test", metrics["seconds"]
        took = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
        return (
            f"{metrics['model']} on {metrics['dataset']}: {in_epochs(metrics['epochs'])} in {took} "
            f"on {config.get('hardware')}; {split} accuracy {metrics[f'{split}_accuracy']:.2%}"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its metrics.json cannot be read ({error}); is the run finished?") from None


def run_config(recipe, cfg, images, learn):
    """config.json of a run: every parameter of `cfg`, the data, the machine. `recipe` None: it was no recipe's."""
    device = learn.dls.device
    return {
        "recipe": recipe,
        "given": cfg.given,
        "parameters": {k: getattr(cfg, k) for k in BASE if k not in _NOT_KEPT},
        "data_name": images.name,
        "data_source": images.source,
        "data_fingerprint": images.fingerprint,
        "note": images.note,
        "classes": list(images.classes),
        "mean": list(map(float, images.mean)),
        "std": list(map(float, images.std)),
        "train_images": len(learn.dls.train_ds),
        "device": str(device),
        "hardware": hardware_name(device),
        "precision": cfg.precision,
        "compiled": False,
        "eval_split": "test" if cfg.valid_pct is None else "valid",
        "versions": versions(),
    }
