"""The parameters of a run: their names, their defaults, the values they may take. Light to import, for `--help`."""

import inspect
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Integral, Real
from types import SimpleNamespace

from cifar_fastai.errors import InputError
from cifar_fastai.names import (
    ANNEALS,
    CAM_METHODS,
    FASTAI_OPTIMIZERS,
    FLIP_BY,
    MODEL_NAMES,
    NESTEROV_OPTIMIZERS,
    PAD_MODES,
    PRECISIONS,
    SCHEDULES,
    SUGGESTIONS,
    TORCH_OPTIMIZERS,
    check_name,
)
from cifar_fastai.presets import PRESETS

__all__ = ["BASE", "Recipe", "command_line", "parameters", "resolve"]


def parameters(
    data: str = None,  # auto, cifar10, digits, or a folder or archive of images
    preset: str = None,  # Published settings: sujitojha1, amitkml, gilf641, vivek-a81 or phaninandula; flags go first
    model: str = None,  # resnet18, resnet34 or custom_resnet
    epochs: int = None,  # Passes over the train images
    bs: int = None,  # Batch size, lowered so that a small set still gives 20 steps an epoch
    lr: str = None,  # Highest learning rate (a default is lowered with bs), or "find" to take it from a range test
    lr_suggest: str = None,  # The suggestion that "--lr find" takes: valley, slide, steep or minimum
    opt: str = None,  # sgd, adam, adamw, radam, nadam, rmsprop, qhadam, larc, lamb, ranger; muon, before batch norms
    momentum: float = None,  # Momentum, or Adam's first beta
    mom_min: float = None,  # Momentum at the peak of a one-cycle schedule, when it is to dip there
    nesterov: str = None,  # Nesterov momentum with sgd and muon: yes or no
    wd: float = None,  # Weight decay (L2); with muon of linear layers alone
    wd_bn_bias: str = None,  # Whether weight decay reaches batch norm and biases: yes or no
    sched: str = None,  # one-cycle, flat-cos, step, plateau or none
    pct_start: float = None,  # Fraction of the run before the peak (one-cycle) or before the fall (flat-cos)
    peak_epoch: float = None,  # The same in epochs, for one-cycle
    div: float = None,  # one-cycle starts at lr / div
    div_final: float = None,  # one-cycle and flat-cos end at lr / div_final
    anneal: str = None,  # Shape of one-cycle: cos or linear
    step_size: int = None,  # step: epochs between falls
    gamma: float = None,  # step, plateau: the factor of a fall
    plateau_patience: int = None,  # plateau: epochs without a better validation loss before a fall
    valid_pct: float = None,  # Fraction of train cut off, stratified, to choose on; the test split is then read once
    split_seed: int = None,  # Seed of that cut
    subset: int = None,  # Train on a stratified part of so many images
    no_test: bool = False,  # Never read the test split (with --valid-pct)
    save_best: bool = False,  # Keep the weights of the best validation accuracy in best.pth (with --valid-pct)
    patience: int = None,  # Stop after so many epochs without a better validation accuracy (with --valid-pct)
    label_smoothing: float = None,  # Share of the target spread over all classes
    l1: float = None,  # Weight of the L1 penalty on convolution and linear weights
    clip: float = None,  # Clip the gradient's norm
    clip_value: float = None,  # Clip each component of the gradient
    mixup: float = None,  # MixUp with this alpha
    cutmix: float = None,  # CutMix with this alpha
    ema: float = None,  # Decay per step of an average of the weights, which is then evaluated and saved
    padding: int = None,  # RandomCrop: pixels of padding on every side (0: no crop)
    pad_mode: str = None,  # RandomCrop: zeros or reflect
    cutout: int = None,  # CutOut: side of the hole in pixels (0: none)
    n_holes: int = None,  # CutOut: holes per image
    max_holes: int = None,  # CutOut: each image draws from --n-holes to this many
    cutout_p: float = None,  # CutOut: probability per image
    flip: float = None,  # Probability of a horizontal flip, by chance (default: .5, on digits 0)
    flip_by: str = None,  # chance, or epoch: each image is flipped in every other one
    vflip: float = None,  # Probability of a vertical flip
    rotate: float = None,  # Rotate by up to so many degrees either way
    n_images: int = None,  # Images in the galleries
    n_cols: int = None,  # Columns in the galleries
    cam_layer: str = None,  # Grad-CAM: layer or layers, separated by commas (default: deepest of at least 5 pixels)
    cam_target: str = None,  # Grad-CAM: explain the predicted or the true class
    cam_method: str = None,  # Grad-CAM: a method of pytorch-grad-cam by name
    cam_alpha: float = None,  # Grad-CAM: opacity of the heatmap in the overlay
    seed: int = None,  # Seed of weights, order and augmentation
    device: str = None,  # auto, cpu, cuda, cuda:N or mps
    precision: str = None,  # auto, fp32, fp16 or bf16
    compile: str = None,  # torch.compile, in fp32 on a CPU with Winograd's convolutions: auto, yes or no
    out: str = None,  # The run's folder (default: runs/<recipe>-<date>-<time>)
    tensorboard: bool = False,  # Write TensorBoard logs into the run's folder
    resume: str = None,  # Go on with an interrupted run: its folder, or "latest"
    debug: bool = False,  # Show tracebacks
):
    """The signature that all recipes share: what is None takes the preset's value, else the recipe's, else BASE's."""


BASE = dict(
    data="auto",
    preset=None,
    model="resnet18",
    epochs=20,
    bs=128,
    lr=0.1,
    lr_suggest="valley",
    opt="sgd",
    momentum=0.9,
    mom_min=None,
    nesterov="yes",
    wd=5e-4,
    wd_bn_bias="no",
    sched="one-cycle",
    pct_start=0.25,
    peak_epoch=None,
    div=25.0,
    div_final=1e5,
    anneal="cos",
    step_size=6,
    gamma=0.1,
    plateau_patience=2,
    valid_pct=None,
    split_seed=42,
    subset=None,
    no_test=False,
    save_best=False,
    patience=None,
    label_smoothing=0.0,
    l1=None,
    clip=None,
    clip_value=None,
    mixup=None,
    cutmix=None,
    ema=None,
    padding=4,
    pad_mode="zeros",
    cutout=16,
    n_holes=1,
    max_holes=None,
    cutout_p=1.0,
    flip=None,
    flip_by="chance",
    vflip=0.0,
    rotate=0.0,
    n_images=10,
    n_cols=5,
    cam_layer=None,
    cam_target="predicted",
    cam_method="GradCAM",
    cam_alpha=0.5,
    seed=42,
    device="auto",
    precision="auto",
    compile="auto",
    out=None,
    tensorboard=False,
    resume=None,
    debug=False,
)


@dataclass(frozen=True)
class Recipe:
    """A recipe's name and what it sets other than BASE."""

    name: str
    defaults: dict = field(default_factory=dict)

    @property
    def settings(self):
        return {**BASE, **self.defaults}


def resolve(recipe, given):
    """Every parameter of a run as a namespace: `given` before its preset, the preset before the recipe's defaults.

    `given` holds what a caller set, by name; None stands for what was not. Values that no run could take raise
    InputError, before anything is read or written.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        check_name("parameter", name, tuple(BASE))
    chosen = {}
    if "preset" in given:
        chosen = PRESETS[check_name("--preset", given["preset"], tuple(PRESETS))].settings
    settings = {**recipe.settings, **chosen, **given}
    _give_way(settings, given)
    for check in _CHECKS:
        check(settings, given)
    return SimpleNamespace(**settings)


def _give_way(settings, given):
    """Drop what a preset or recipe set and an explicit flag contradicts."""
    for explicit, other in (
        ("pct_start", "peak_epoch"),
        ("clip", "clip_value"),
        ("clip_value", "clip"),
        ("mixup", "cutmix"),
        ("cutmix", "mixup"),
    ):
        if explicit in given and other not in given:
            settings[other] = None
    if "flip" in given and "flip_by" not in given:
        settings["flip_by"] = "chance"
    if settings["sched"] != "one-cycle" and "mom_min" not in given:
        settings["mom_min"] = None


def _flag(name):
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Range:
    """The numbers a parameter may take; `above` and `below` exclude the bound itself."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value):
        low_ok = value > self.low if self.above else value >= self.low
        high_ok = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and low_ok and high_ok

    def __str__(self):
        low = f"{'above' if self.above else 'at least'} {self.low}"
        high = "finite" if self.high == math.inf else f"{'below' if self.below else 'at most'} {self.high}"
        return f"{low} and {high}"


_POSITIVE, _COUNT, _NOT_NEGATIVE = Range(0, above=True), Range(1, 10**9), Range(0)
_SHARE, _BELOW_ONE, _INSIDE = Range(0, 1), Range(0, 1, below=True), Range(0, 1, above=True, below=True)
_SEED = Range(0, 2**32 - 1)  # as numpy takes them

RANGES = dict(
    epochs=Range(1, 10_000),
    bs=Range(1, 65_536),
    lr=Range(0, 100, above=True),
    momentum=_BELOW_ONE,
    mom_min=_BELOW_ONE,
    wd=Range(0, 1),
    pct_start=_INSIDE,
    peak_epoch=_POSITIVE,
    div=Range(1),
    div_final=Range(1),
    step_size=_COUNT,
    gamma=_INSIDE,
    plateau_patience=Range(0, 10_000),
    valid_pct=_INSIDE,
    split_seed=_SEED,
    subset=_COUNT,
    patience=_COUNT,
    label_smoothing=_BELOW_ONE,
    l1=_NOT_NEGATIVE,
    clip=_POSITIVE,
    clip_value=_POSITIVE,
    mixup=_POSITIVE,
    cutmix=_POSITIVE,
    ema=_INSIDE,
    padding=Range(0, 31),
    cutout=Range(0, 32),
    n_holes=Range(1, 64),
    max_holes=Range(1, 64),
    cutout_p=_SHARE,
    flip=_SHARE,
    vflip=_SHARE,
    rotate=Range(0, 180),
    n_images=Range(1, 100),
    n_cols=Range(1, 20),
    cam_alpha=_SHARE,
    seed=_SEED,
)

_YES_NO = ("yes", "no")
CHOICES = dict(
    model=MODEL_NAMES,
    lr_suggest=SUGGESTIONS,
    opt=TORCH_OPTIMIZERS + FASTAI_OPTIMIZERS,
    nesterov=_YES_NO,
    wd_bn_bias=_YES_NO,
    sched=SCHEDULES,
    anneal=ANNEALS,
    pad_mode=PAD_MODES,
    flip_by=FLIP_BY,
    precision=PRECISIONS,
    compile=("auto", *_YES_NO),
    cam_target=("predicted", "true"),
    cam_method=tuple(CAM_METHODS),
)


def _check_types(settings, given):
    """On the command line argparse has seen to this; a call from a notebook may hold anything."""
    for name, parameter in inspect.signature(parameters).parameters.items():
        value, kind = settings[name], parameter.annotation
        if value is not None and name != "lr":
            settings[name] = _TYPES[kind](_flag(name), value)


def _text(flag, value):
    if isinstance(value, bool):  # nesterov=True
        return "yes" if value else "no"
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{flag} {value!r}: must be text")
    value = os.fspath(value)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError(f"{flag} {value!r}: must be printable and not empty")
    return value


def _whole(flag, value):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{flag} {value!r}: must be a whole number")
    return int(value)


def _number(flag, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{flag} {value!r}: must be a number")
    return float(value)


def _switch(flag, value):
    if not isinstance(value, bool):
        raise InputError(f"{flag} {value!r}: must be True or False")
    return value


_TYPES = {str: _text, int: _whole, float: _number, bool: _switch}


def _check_lr(settings, given):
    lr = settings["lr"]
    if isinstance(lr, str) and lr == "find":
        return
    try:
        settings["lr"] = float(lr)
    except (TypeError, ValueError):
        raise InputError(f"--lr {lr}: neither a number nor find") from None


def _check_names(settings, given):
    for name, known in CHOICES.items():
        check_name(_flag(name), settings[name], known)


def _check_ranges(settings, given):
    for name, allowed in RANGES.items():
        value = settings[name]
        if value is not None and value != "find" and value not in allowed:
            raise InputError(f"{_flag(name)} {value}: must be {allowed}")


_BELONGS = (  # what has a meaning beside one value of another parameter alone
    ("peak_epoch", "sched", ("one-cycle",)),
    ("div", "sched", ("one-cycle",)),
    ("anneal", "sched", ("one-cycle",)),
    ("mom_min", "sched", ("one-cycle",)),
    ("pct_start", "sched", ("one-cycle", "flat-cos")),
    ("div_final", "sched", ("one-cycle", "flat-cos")),
    ("step_size", "sched", ("step",)),
    ("gamma", "sched", ("step", "plateau")),
    ("plateau_patience", "sched", ("plateau",)),
    ("lr_suggest", "lr", ("find",)),
)


def _check_together(settings, given):
    s = SimpleNamespace(**settings)

    def refuse(when, message):
        if when:
            raise InputError(message)

    for flag, other, values in _BELONGS:
        refuse(
            flag in given and settings[other] not in values,
            f"{_flag(flag)}: goes with {_flag(other)} {' or '.join(values)}, not {settings[other]}",
        )
    for flag in ("n_holes", "max_holes", "cutout_p", "pad_mode"):
        needed = "padding" if flag == "pad_mode" else "cutout"
        refuse(flag in given and settings[needed] == 0, f"{_flag(flag)}: needs {_flag(needed)} above 0")
    refuse(
        s.sched == "plateau" and s.valid_pct is None,
        "--sched plateau: needs --valid-pct, as the test split may not steer a run",
    )
    refuse(
        s.sched == "plateau" and s.opt in FASTAI_OPTIMIZERS,
        f"--sched plateau: works with torch's optimizers ({', '.join(TORCH_OPTIMIZERS)}), not with --opt {s.opt}",
    )
    for flag in ("no_test", "save_best", "patience"):
        refuse(
            settings[flag] and s.valid_pct is None,
            f"{_flag(flag)}: needs --valid-pct, as nothing may be chosen on the test split",
        )
    refuse(
        "peak_epoch" in given and "pct_start" in given,
        "--peak-epoch and --pct-start: both say where the peak is, take one of them",
    )
    if s.peak_epoch is not None:
        refuse(s.peak_epoch >= s.epochs, f"--peak-epoch {s.peak_epoch:g}: must lie before --epochs ({s.epochs})")
    refuse(
        given.get("flip_by") == "epoch" and s.flip not in (None, 0.5),
        f"--flip-by epoch: mirrors each image half of the time, not --flip {s.flip}",
    )
    refuse(s.mixup and s.cutmix, "--mixup and --cutmix: take one of them, together they do not work")
    refuse(s.clip and s.clip_value, "--clip and --clip-value: take one of them")
    refuse(
        s.max_holes is not None and s.max_holes < s.n_holes,
        f"--max-holes {s.max_holes}: must be at least --n-holes ({s.n_holes})",
    )
    refuse(
        "nesterov" in given and s.nesterov == "yes" and s.opt not in NESTEROV_OPTIMIZERS,
        f"--nesterov yes: only --opt {' and '.join(NESTEROV_OPTIMIZERS)} have it, not {s.opt}",
    )
    refuse(
        s.nesterov == "yes" and s.opt in NESTEROV_OPTIMIZERS and s.momentum == 0,
        "--momentum 0: Nesterov's needs one above 0, or give --nesterov no",
    )
    refuse(
        s.mom_min is not None and s.mom_min > s.momentum,
        f"--mom-min {s.mom_min}: must not be above --momentum ({s.momentum})",
    )
    refuse(
        s.tensorboard and find_spec("tensorboard") is None,
        "--tensorboard: the package is not installed; pip install tensorboard",
    )


def _check_device(settings, given):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", settings["device"]):
        raise InputError(f"--device {settings['device']}: give auto, cpu, cuda, cuda:N or mps")


def _check_layers(settings, given):
    layers = settings["cam_layer"]
    if layers is not None and not all(re.fullmatch(r"\w+(\.\w+)*", name.strip()) for name in layers.split(",")):
        raise InputError(f"--cam-layer {layers}: give names of layers, separated by commas, as layer3 or layer2,layer3")


def command_line(config, without=()):
    """The command that repeats the run of a config.json in a folder of its own, quoted for a shell.

    `without`: parameters that are left out. None where no recipe made the run.
    """
    if not config.get("recipe"):
        return None
    words = ["python", f"recipes/{config['recipe']}.py"]
    for name, value in (config["given"] or {}).items():
        if name in ("out", "resume", "debug", *without) or value is None or value is False:
            continue
        flag, text = "--" + name.replace("_", "-"), str(value)
        words += [flag] if value is True else [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return shlex.join(words)


_CHECKS = (_check_types, _check_lr, _check_names, _check_ranges, _check_together, _check_device, _check_layers)

assert set(BASE) == set(inspect.signature(parameters).parameters), "parameters and BASE name different things"
