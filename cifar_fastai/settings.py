"""Settings: every parameter of a run, once, with its type, default, allowed values and help.

The command line, the checks, the recipes, config.json, resume and the table in docs/parameters.md all derive from the
fields of `Settings`. A default is neutral: the technique is off, and the optimizer is plain SGD.
"""

import math
import operator
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import get_args

from cifar_fastai.errors import InputError, check_choice

__all__ = ["OPTIONS", "PLACES", "Settings", "check_values", "choices", "resolve"]

YES_NO = ("yes", "no")
TORCH_OPTIMIZERS = ("sgd", "adam", "adamw", "radam", "nadam", "rmsprop", "muon")
FASTAI_OPTIMIZERS = ("qhadam", "larc", "lamb", "ranger")  # where torch has no equivalent
NESTEROV_OPTIMIZERS = ("sgd", "muon")
CAM_METHODS = (
    "GradCAM GradCAM++ HiResCAM XGradCAM LayerCAM GradCAMElementWise EigenGradCAM EigenCAM FEM ScoreCAM AblationCAM"
).split()
LAYER = r"\s*\w+(\.\w+)*\s*"
LAYERS = (f"{LAYER}(,{LAYER})*", "give names of layers, separated by commas: layer2,layer3")
LOGS = (r"(tensorboard|wandb)(,(tensorboard|wandb))*", "give tensorboard or wandb, or both, separated by a comma")
DEVICE = (r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", "give auto, cpu, cuda, cuda:N or mps")
SEEDS = dict(ge=0, le=2**32 - 1)  # what numpy accepts
MANY = dict(ge=1, le=10**9)
SIZE = dict(ge=1e-6, le=1e6)  # float32 has no numbers far beyond
BETWEEN = dict(gt=0, lt=1)
PROBABILITY = dict(ge=0, le=1)
ONE_CYCLE = dict(needs=("sched", "one-cycle"))
ONE_CYCLE_OR_FLAT = dict(needs=("sched", "one-cycle", "flat-cos"))
VALID = dict(needs=("valid_pct",))
CUTOUT = dict(needs=("cutout",))


def option(default, help, **limits):
    """A field of `Settings`.

    `limits`: `choices` (allowed texts), `words` (texts that a number may be instead), `pattern` (a regular expression
    for a text, and what it asks for in words), `ge gt le lt` (bounds of a number), `needs` (another field's name and
    the values that give this one a meaning; without values, any but none and zero), `identity` (False for places and
    devices, which do not define the run).
    """
    return field(default=default, metadata=dict(help=help, **limits))


@dataclass(frozen=True)
class Settings:
    """The parameters of a run. `Settings(epochs=3)` is plain SGD without augmentation; see `recipes` for named ones."""

    data: str = option(
        "auto",
        "auto, cifar10, cifar100, cifar100-coarse (20 superclasses), digits, or a folder or archive of images",
        identity=False,
    )
    size: int | None = option(
        None, "Pixels a side, to which images of another size are resized (default: 32, no other)", ge=16, le=128
    )
    preset: str | None = option(None, "Settings of a published solution, in place of the recipe's")
    model: str = option("resnet18", "Network", choices=("resnet18", "resnet34", "custom_resnet"))
    # on a CPU torch 2.14 crashes in convolutions of fewer than 16 channels with an odd batch size
    width: int = option(64, "Channels of the first convolution; at 16 a CPU trains ResNet18 in minutes", ge=16, le=512)
    epochs: int = option(20, "Passes over the train images", ge=1, le=10_000)
    bs: int = option(128, "Batch size; a default is lowered so that a small set gives 20 steps", ge=1, le=65_536)
    lr: float | str = option(
        0.1, "Highest learning rate (a default is lowered with bs), or find: range test", words=("find",), gt=0, le=100
    )
    lr_suggest: str = option(
        "valley", "Suggestion of the range test", choices=("valley", "slide", "steep", "minimum"), needs=("lr", "find")
    )
    opt: str = option("sgd", "Optimizer", choices=TORCH_OPTIMIZERS + FASTAI_OPTIMIZERS)
    momentum: float = option(0.9, "Momentum, or Adam's first beta", ge=0, lt=1)
    mom_min: float | None = option(None, "Momentum at the peak of a one-cycle schedule", ge=0, lt=1, **ONE_CYCLE)
    nesterov: str = option("no", "Nesterov momentum, with sgd and muon", choices=YES_NO)
    wd: float = option(0.0, "Weight decay (L2); muon decays linear layers only", ge=0, le=1)
    wd_bn_bias: str = option("yes", "Whether weight decay includes batch norm and biases", choices=YES_NO)
    sched: str = option("none", "Schedule", choices=("one-cycle", "flat-cos", "step", "plateau", "none"))
    pct_start: float = option(0.3, "Fraction of the run before the peak or the fall", **BETWEEN, **ONE_CYCLE_OR_FLAT)
    peak_epoch: float | None = option(None, "The peak of one-cycle in epochs", gt=0, le=10_000, **ONE_CYCLE)
    div: float = option(25.0, "one-cycle starts at lr / div", ge=1, le=1e12, **ONE_CYCLE)
    div_final: float = option(25e4, "one-cycle and flat-cos end at lr / div_final", ge=1, le=1e12, **ONE_CYCLE_OR_FLAT)
    anneal: str = option("cos", "Shape of one-cycle", choices=("cos", "linear"), **ONE_CYCLE)
    step_size: int = option(6, "step: epochs between falls", **MANY, needs=("sched", "step"))
    gamma: float = option(0.1, "step, plateau: factor of a fall", **BETWEEN, needs=("sched", "step", "plateau"))
    plateau_patience: int = option(
        2, "plateau: epochs without a better validation loss before a fall", ge=0, le=10_000, needs=("sched", "plateau")
    )
    valid_pct: float | None = option(
        None, "Fraction of train for validation, stratified; the test split is then read once, at the end", **BETWEEN
    )
    split_seed: int = option(42, "Seed of that split", **SEEDS)
    subset: int | None = option(None, "Train on a stratified subset of this size (valid_pct: the same share)", **MANY)
    no_test: bool = option(False, "Never read the test split", **VALID)
    save_best: bool = option(False, "Keep the weights of the best validation accuracy in best.pth", **VALID)
    patience: int | None = option(
        None, "Stop after this many epochs without a better validation accuracy", **MANY, **VALID
    )
    label_smoothing: float = option(0.0, "Share of the target spread over all classes", ge=0, lt=1)
    l1: float | None = option(None, "Weight of the L1 penalty on convolution and linear weights", ge=0, le=1e6)
    clip: float | None = option(None, "Largest norm of the gradient", **SIZE)
    clip_value: float | None = option(None, "Largest component of the gradient", **SIZE)
    mixup: float | None = option(None, "MixUp's alpha", **SIZE)
    cutmix: float | None = option(None, "CutMix's alpha", **SIZE)
    ema: float | None = option(None, "Decay per step of averaged weights, which are evaluated and saved", **BETWEEN)
    padding: int = option(0, "RandomCrop: pixels of padding on every side (0: no crop)", ge=0, le=31)
    pad_mode: str = option("zeros", "RandomCrop: padding", choices=("zeros", "reflect"), needs=("padding",))
    cutout: int = option(0, "CutOut: side of a hole in pixels (0: none)", ge=0, le=128)
    n_holes: int = option(1, "CutOut: holes per image", ge=1, le=64, **CUTOUT)
    max_holes: int | None = option(None, "CutOut: each image draws from n_holes to this many", ge=1, le=64, **CUTOUT)
    cutout_p: float = option(1.0, "CutOut: probability per image", **PROBABILITY, **CUTOUT)
    flip: float | None = option(
        0.0, "Probability of a horizontal flip (our recipes: .5, and 0 on digits)", **PROBABILITY
    )
    flip_by: str = option("chance", "Flip by chance, or each image in every other epoch", choices=("chance", "epoch"))
    vflip: float = option(0.0, "Probability of a vertical flip", **PROBABILITY)
    rotate: float = option(0.0, "Largest rotation in degrees, either way", ge=0, le=180)
    n_images: int = option(10, "Images in the galleries", ge=1, le=100)
    n_cols: int = option(5, "Columns in the galleries", ge=1, le=20)
    cam_layer: str | None = option(
        None, "Grad-CAM: layers, separated by commas (default: the deepest of at least 5 x 5 pixels)", pattern=LAYERS
    )
    cam_target: str = option("predicted", "Grad-CAM: class to explain", choices=("predicted", "true"))
    cam_method: str = option("GradCAM", "Grad-CAM: method of pytorch-grad-cam", choices=CAM_METHODS)
    cam_alpha: float = option(0.5, "Grad-CAM: opacity of the heatmap in the overlay", **PROBABILITY)
    seed: int | None = option(42, "Seed of weights, order and augmentation", **SEEDS)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", pattern=DEVICE, identity=False)
    precision: str = option("auto", "Precision", choices=("auto", "fp32", "fp16", "bf16"))
    sync_bn: str = option(
        "auto", "Batch norm over all processes; auto: below 64 images each", choices=("auto", *YES_NO)
    )
    compile: str = option("auto", "torch.compile; on a CPU in fp32 with Winograd", choices=("auto", *YES_NO))
    out: str | None = option(None, "The run's folder (default: runs/<recipe>-<date>-<time>)", identity=False)
    log: str | None = option(None, "Loggers, separated by commas: tensorboard, wandb (Weights & Biases)", pattern=LOGS)
    tensorboard: bool = option(False, "The same as log tensorboard")
    no_tta: bool = option(False, "Evaluate without test-time augmentation, six times as fast")
    no_explain: bool = option(False, "No heatmaps: neither gradcam.png nor the explorer of the errors in report.html")

    @classmethod
    def from_dict(cls, values):
        """Settings of a dict that holds some of the parameters and perhaps others, such as a config.json's."""
        values = {name: value for name, value in values.items() if name in OPTIONS}
        return _check_together(cls(**check_values(**values)), ())

    def to_dict(self):
        """Every parameter by name."""
        return asdict(self)

    @property
    def network(self):
        """The network's name, with its width where that is not the usual one."""
        return self.model if self.width == OPTIONS["width"].default else f"{self.model}, width {self.width}"

    @property
    def loggers(self):
        """The names of the run's loggers."""
        names = [*(self.log or "").split(","), "tensorboard" if self.tensorboard else ""]
        return tuple(dict.fromkeys(filter(None, names)))

    @property
    def peak_fraction(self):
        """Where the peak of one-cycle lies, as a fraction of the run."""
        return self.peak_epoch / self.epochs if self.peak_epoch else self.pct_start


OPTIONS = {option.name: option for option in fields(Settings)}
PLACES = tuple(name for name, option in OPTIONS.items() if not option.metadata.get("identity", True))


# A parameter of the recipe that gives way when the user sets another one: {set: (gives way, its new value)}.
GIVES_WAY = dict(
    pct_start=("peak_epoch", None),
    clip=("clip_value", None),
    clip_value=("clip", None),
    mixup=("cutmix", None),
    cutmix=("mixup", None),
    flip=("flip_by", "chance"),
)


def _refusals(s, overrides):
    """The combinations that are refused: (wrong arguments, whether `s` has the combination, message)."""
    plateau, nesterov = s.sched == "plateau", s.nesterov == "yes"
    lacks_nesterov, is_half = s.opt not in NESTEROV_OPTIMIZERS, s.flip_by == "chance" or s.flip in (None, 0.5)
    return (
        ("peak_epoch pct_start", {"peak_epoch", "pct_start"} <= set(overrides), "both set the peak; use one of them"),
        ("peak_epoch", s.peak_epoch and s.peak_epoch >= s.epochs, f"must lie before `epochs` ({s.epochs})"),
        ("sched", plateau and not s.valid_pct, "needs `valid_pct`, because the test split may not steer a run"),
        ("sched", plateau and s.opt in FASTAI_OPTIMIZERS, f"needs an optimizer of torch, which `opt` {s.opt} is not"),
        ("flip_by", "flip_by" in overrides and not is_half, f"flips half of the images, which is not `flip` {s.flip}"),
        ("mixup cutmix", s.mixup and s.cutmix, "do not work together; use one of them"),
        ("clip clip_value", s.clip and s.clip_value, "use one of them"),
        ("max_holes", s.max_holes and s.max_holes < s.n_holes, f"must be at least `n_holes` ({s.n_holes})"),
        ("nesterov", "nesterov" in overrides and nesterov and lacks_nesterov, f"needs `opt` sgd or muon, not {s.opt}"),
        ("momentum", nesterov and not (lacks_nesterov or s.momentum), "must be above 0, or `nesterov` must be no"),
        (
            "mom_min",
            {"mom_min", "momentum"} & {*overrides} and s.mom_min and s.mom_min > s.momentum,
            f"must not be above `momentum` ({s.momentum})",
        ),
    )


def _check_together(settings, overrides):
    """`settings`, if its values go together; `overrides` holds the parameters that a user set."""
    for name in overrides:
        other, *values = OPTIONS[name].metadata.get("needs", (None,))
        state = other and getattr(settings, other)
        value = getattr(settings, name)
        if other and value is not None and value is not False and not (state in values if values else state):
            needs = f"goes with `{other}` {' or '.join(values)}, not {state}" if values else f"needs `{other}`"
            raise InputError(needs, **{name: value})
    for names, is_refused, message in _refusals(settings, overrides):
        if is_refused:
            raise InputError(message, **{name: getattr(settings, name) for name in names.split()})
    return settings


def resolve(settings, overrides):
    """(settings, overrides): `settings` with what a user set, a dict, and that dict with its values converted.

    None stands for what was not set. Raises InputError for values and combinations that no run could use.
    """
    ordered = {name: overrides[name] for name in [*OPTIONS, *overrides] if overrides.get(name) is not None}
    overrides = check_values(**ordered)
    changes = dict(GIVES_WAY[name] for name in overrides if name in GIVES_WAY)
    settings = replace(settings, **changes | overrides)
    if settings.sched != "one-cycle" and "mom_min" not in overrides:
        settings = replace(settings, mom_min=None)
    return _check_together(settings, overrides), overrides


def choices(name):
    """The texts that the parameter `name` may be."""
    return OPTIONS[name].metadata["choices"]


_KINDS = {
    str: ((str, os.PathLike), "text"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
}
_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def check_values(**values):
    """The values by name, converted to the types of their parameters. Raises InputError for the first wrong one.

    A Python user may pass numpy's numbers, paths, and booleans for yes and no.
    """
    for name in values:
        check_choice(tuple(OPTIONS), parameter=name)
    return {name: _check_value(name, value) for name, value in values.items()}


def _check_value(name, value):
    limits, kinds = OPTIONS[name].metadata, get_args(OPTIONS[name].type) or (OPTIONS[name].type,)
    kind, words = kinds[0], limits.get("words", ())
    types, description = _KINDS[kind]

    def require(condition, message):
        if not condition:
            raise InputError(message, **{name: value})

    if value is None and type(None) in kinds or isinstance(value, str) and value in words:
        return value
    if kind is str and isinstance(value, bool):
        value = "yes" if value else "no"
    elif words and isinstance(value, str):  # from the command line
        with suppress(ValueError):
            value = float(value)
    is_bool = isinstance(value, bool)
    require(isinstance(value, types) and is_bool == (kind is bool), " or ".join([f"must be {description}", *words]))
    if kind is str:
        value = os.fsdecode(value)
        require(value.strip() and value.isprintable(), "must be printable and not empty")
    if "choices" in limits:
        check_choice(limits["choices"], **{name: value})
    pattern, hint = limits.get("pattern", (".*", ""))
    require(kind is not str or re.fullmatch(pattern, value), hint)
    with suppress(OverflowError):  # a whole number that no float can hold is beyond every bound
        value = kind(value)
    bounds = [(holds, words, limits[key]) for key, (holds, words) in _BOUNDS.items() if key in limits]
    texts = [f"{words} {bound}" for _, words, bound in bounds]
    is_in_range = all(holds(value, bound) for holds, _, bound in bounds) and (kind is not float or math.isfinite(value))
    require(is_in_range, f"must be {' and '.join(texts if len(texts) == 2 else [*texts, 'finite'])}")
    return value
