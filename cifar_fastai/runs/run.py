"""A run as an object: its settings, the decisions about them, and its learner; also how to load a finished run."""

import os
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path

import numpy as np
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientClip
from fastai.learner import Learner

from cifar_fastai.api import ImageSet, cifar_dls, cifar_learner, load_images
from cifar_fastai.data.images import CIFAR10
from cifar_fastai.data.loaders import augmentations, default_bs, split_rows
from cifar_fastai.errors import InputError, printable
from cifar_fastai.files import write_json
from cifar_fastai.hardware import choose_device, choose_precision, hardware_name, n_processes, versions
from cifar_fastai.runs.folder import read_config
from cifar_fastai.settings import PLACES, Settings, choices
from cifar_fastai.training.callbacks import ClipValue, L1Penalty, StopOnBadLoss, WeightAverage
from cifar_fastai.training.checkpoint import load_weights
from cifar_fastai.training.recorder import read_history
from cifar_fastai.training.schedule import one_cycle_steps

MACHINE = "device", "hardware", "precision", "compiled", "versions"  # of config.json; they decide about the last digits
_AUGMENT = signature(augmentations).parameters.keys() - {"flip", "size"}
_OPTIMIZATION = "opt", "momentum", "mom_min", "nesterov", "wd", "wd_bn_bias", "label_smoothing"
_CALLBACKS = dict(l1=L1Penalty, clip=GradientClip, clip_value=ClipValue, mixup=MixUp, cutmix=CutMix, ema=WeightAverage)


@dataclass
class Run:
    """One run. `settings` and `overrides` never change; later decisions have fields of their own."""

    recipe: str | None  # None: trained in a notebook
    settings: Settings
    overrides: dict  # the parameters that the user set
    images: ImageSet
    learn: Learner
    bs: int  # a default is lowered for a small set
    lr: float | str  # "find" until the range test is done
    flip: float
    precision: str
    precision_reason: str = ""
    compiled: bool = False
    compile_reason: str = ""
    sync_bn: bool = False  # batch norm is over the images of all processes
    suggestions: dict | None = None  # of the range test
    folder: Path | None = None
    checkpoint: dict | None = None  # where a resumed run goes on

    @property
    def device(self):
        return self.learn.dls.device

    @property
    def eval_split(self):
        """The split that is evaluated after every epoch: "test", or "valid" where one was cut from train."""
        return "test" if self.settings.valid_pct is None else "valid"

    @property
    def history(self):
        return self.learn.history

    @cached_property
    def n_parameters(self):
        return sum(p.numel() for p in self.learn.model.parameters())

    @property
    def parameters(self):
        """Every parameter by name, with the values that the run uses."""
        decisions = dict(bs=self.bs, lr=self.lr, flip=self.flip, precision=self.precision)
        return self.settings.to_dict() | decisions

    @property
    def config(self):
        """The content of config.json."""
        images, dls, (hardware, software) = self.images, self.learn.dls, self.machine
        config = dict(recipe=self.recipe, given=self.overrides, parameters=self.parameters)
        config |= dict(data_name=images.name, data_source=images.source, data_fingerprint=images.fingerprint)
        path = os.path.abspath(os.path.expanduser(images.source))
        # found from any folder, and without CIFAR10_PATH
        config |= dict(data_path=path if os.path.exists(path) else None)
        config |= dict(note=images.note, classes=list(images.classes), train_images=len(dls.train_ds))
        config |= dict(mean=list(map(float, images.mean)), std=list(map(float, images.std)))
        config |= dict(device=str(self.device), hardware=hardware, precision=self.precision)
        config |= dict(compiled=self.compiled, eval_split=self.eval_split, versions=software)
        config |= {} if self.suggestions is None else dict(lr_find=self.suggestions)
        if self.checkpoint:
            start = self.checkpoint["config"]
            part = {name: start.get(name) for name in MACHINE}
            has_changed = any(part[name] != config[name] for name in MACHINE)
            parts = start.get("earlier_parts", []) + has_changed * [dict(epochs=self.checkpoint["epoch"]) | part]
            config |= dict(earlier_parts=parts) if parts else {}
        return config | self.history.origin  # the machine of a loaded learner, if no training followed

    @cached_property
    def machine(self):
        """The hardware's name, with the number of processes, and the versions of the software."""
        processes = f", {n_processes()} processes" if n_processes() > 1 else ""
        return hardware_name(self.device) + processes, versions()

    def write_config(self):
        write_json(self.folder / "config.json", self.config)


def suit_data(settings, overrides, n_train):
    """(bs, lr) for `n_train` images: a default batch size is lowered to 20 steps an epoch, a default rate with it."""
    n = n_processes()  # whose shares have one size
    bs = settings.bs if "bs" in overrides else max(1, default_bs(settings.bs, n_train) // n) * n
    if bs % n:
        raise InputError(f"must be a multiple of {n}, the number of processes", bs=bs)
    if bs == settings.bs or "lr" in overrides or settings.lr == "find":
        return bs, settings.lr
    # smaller batches are noisier: for SGD this is Goyal and others' linear rule, arXiv:1706.02677
    return bs, settings.lr * (bs / settings.bs)


def build_run(recipe, settings, overrides, images, device, precision, precision_reason="", model=None):
    """A `Run` with the learner that `settings` describe, on `device` in `precision` ("fp32", "fp16" or "bf16").

    `model`: a network in place of the one that `settings` name. Raises InputError for settings that do not fit the
    data.
    """
    s = settings
    n_train = len(split_rows(images, s.valid_pct, s.split_seed, s.subset)[0])
    bs, lr = suit_data(s, overrides, n_train)
    flip = images.flip if s.flip is None else s.flip
    augment = {name: getattr(s, name) for name in _AUGMENT}
    dls = cifar_dls(images, bs, s.valid_pct, s.split_seed, s.subset, flip, device, **augment)
    options = {name: getattr(s, name) for name in _OPTIMIZATION} | {"lr": 0.1 if lr == "find" else lr}
    learn = cifar_learner(dls, model or s.model, width=s.width, precision=precision, cbs=_callbacks(s), **options)
    learn.recorder.train_metrics = not (s.mixup or s.cutmix)  # a mixed image has two right classes
    return Run(recipe, s, overrides, images, learn, bs, lr, flip, precision, precision_reason)


def _callbacks(settings):
    values = {name: getattr(settings, name) for name in _CALLBACKS}
    return [StopOnBadLoss(), *(_CALLBACKS[name](value) for name, value in values.items() if value)]


def load_run(folder, device="auto", data=None, weights="model.pth", model=None):
    """The learner of a finished run, from its config.json, history.csv and weights alone: (learn, config).

    learner.pkl is not read. `data`: an ImageSet, or the place of the images if they have moved. `model`: the network,
    for a run of one's own. InputError where the run is not finished, a file is damaged, or the images differ from those
    that it was trained with.
    """
    config, settings, device, precision, path = _read_run(folder, device, weights, model)
    if config.get("data_fingerprint") is None:
        raise InputError(f"{folder}: trained on DataLoaders of your own; fastai's load_learner reads its learner.pkl")
    images = load_same_images(config, settings, data)
    learn = build_run(config.get("recipe"), settings, settings.to_dict(), images, device, precision, model=model).learn
    load_weights(learn.model, path)
    learn.settings = {name: value for name, value in settings.to_dict().items() if name not in PLACES}
    learn.settings["model"] = config["parameters"].get("model", settings.model)
    restore_history(learn, Path(folder), settings, config)
    return learn, config


def check_images(images, config, exact=False):
    """InputError unless `images`, an ImageSet, are those of the run with this config.json."""
    is_cifar10 = images.name == config.get("data_name") == CIFAR10  # by earlier runs in the order of its files
    if images.fingerprint != config.get("data_fingerprint") and (exact or not is_cifar10):
        trained = printable(config.get("data_name"))
        raise InputError(f"{images.source}: not the images this run was trained with ({trained})")


def load_same_images(config, settings, data=None, exact=False, offline=False):
    """The images of the run with this config.json. `data`: an ImageSet, or their place, if they have moved.

    By default they are where they were, or where the run's own `data` leads now, `offline` on this machine alone.
    Raises InputError for others.
    """
    places = [place for place in (config.get("data_path"), settings.data) if isinstance(place, str)]
    problem = None
    for place in places if data is None else [data]:
        try:
            images = place if isinstance(place, ImageSet) else load_images(place, size=settings.size, offline=offline)
            check_images(images, config, exact)
            return images
        except InputError as error:
            problem = problem or error
    raise InputError(f"{problem or 'config.json names no data'}; say where the run's images are with `data`")


def load_reported(config, predictions, data=None):
    """The images of a run's `predictions`, uint8 (N, S, S, 3), or None where they are not on this machine.

    Raises InputError where `data`, the place that they have moved to, has others.
    """
    s = Settings.from_dict(config["parameters"] | {"model": Settings.model})
    with suppress(InputError) if data is None else nullcontext():
        images = load_same_images(config, s, data, offline=True)
        rows = range(images.n_train, len(images.labels))
        rows = split_rows(images, s.valid_pct, s.split_seed, s.subset)[1] if s.no_test else list(rows)
        if np.array_equal(images.labels[rows], predictions.targets):  # earlier runs had another order
            return images.images[rows].transpose(0, 2, 3, 1)


def load_network(folder, device="auto"):
    """The learner of a finished run for other images; it does not need the run's. InputError as for `load_run`."""
    config, settings, device, precision, path = _read_run(folder, device)
    are_valid = {name: type(config.get(name)) is str for name in ("data_name", "data_source")}
    are_valid |= dict(classes=_is_list(config.get("classes"), str))
    are_valid |= {name: _is_list(config.get(name), float, 3) for name in ("mean", "std")}
    for name, is_valid in are_valid.items():
        if not is_valid:
            raise InputError(f"{Path(folder) / 'config.json'}: holds no {name}")
    classes, n = tuple(config["classes"]), len(config["classes"])
    size, labels = settings.size or 32, np.tile(np.arange(n), 2)
    pixels = np.zeros((2 * n, 3, size, size), np.uint8)
    about = dict(name=config["data_name"], source=config["data_source"], mean=config["mean"], std=config["std"])
    black = ImageSet(classes=classes, images=pixels, labels=labels, n_train=n, **about)
    dls = cifar_dls(black, bs=1, device=device)
    learn = cifar_learner(dls, settings.model, width=settings.width, precision=precision)
    load_weights(learn.model, path)
    return learn


def _is_list(value, kind, n=None):
    return type(value) is list and {*map(type, value)} == {kind} and len(value) == (n or len(value))


def _read_run(folder, device, weights="model.pth", model=None):
    """(config, settings, device, precision, path of the weights) of a finished run, to load it on `device`."""
    config, path = read_config(folder), Path(folder) / weights
    parameters = config["parameters"]
    if model is not None:
        parameters = parameters | {"model": Settings.model}  # the name of a network of one's own is no setting
    elif parameters.get("model", Settings.model) not in choices("model"):
        raise InputError(f"{folder}: its network {parameters['model']} is not ours; load_run takes it as `model`")
    settings, device = Settings.from_dict(parameters), choose_device(device)
    is_same_kind = str(config.get("device")).startswith(device.type)  # another may not have the run's precision
    precision, _ = choose_precision(settings.precision if is_same_kind else "auto", device)
    if weights == "model.pth" and not path.exists() and path.with_suffix(".safetensors").exists():  # an export
        path = path.with_suffix(".safetensors")
    if not path.exists():
        is_finished = (Path(folder) / "metrics.json").exists()
        advice = "" if is_finished else "; the run is not finished: resume it with its recipe or notebook"
        raise InputError(f"{folder}: no {weights} in it{advice}")
    return config, settings, device, precision, path


def restore_history(learn, folder, settings, config):
    """Give `learn` the history of the finished run in `folder`."""
    history = learn.history
    history.lrs, history.moms = [], []
    history.origin = {name: config.get(name) for name in MACHINE}
    if (folder / "history.csv").exists():
        history.rows = read_history(folder / "history.csv")
    if settings.sched == "one-cycle":
        n_steps = len(learn.dls.train)
        steps = one_cycle_steps(settings, settings.epochs * n_steps)
        history.lrs, history.moms = (list(values[: len(history.rows) * n_steps]) for values in steps)
