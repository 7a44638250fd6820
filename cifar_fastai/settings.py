"""Settings: every parameter of a run, once, with its type, default, allowed values and help.

The command line, the checks, the recipes, config.json, resume and the table in docs/parameters.md all derive from the
fields of `Settings`. A default is neutral: the technique is off, and the optimizer is plain SGD.
"""

import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import get_args

from cifar_fastai.errors import InputError, check_choice

__all__ = ["OPTIONS", "Settings", "check_values", "choices", "resolve"]

YES_NO = ("yes", "no")
TORCH_OPTIMIZERS = ("sgd", "adam", "adamw", "radam", "nadam", "rmsprop", "muon")
FASTAI_OPTIMIZERS = ("qhadam", "larc", "lamb", "ranger")  # where torch has no equivalent
NESTEROV_OPTIMIZERS = ("sgd", "muon")
CAM_METHODS = ("GradCAM", "GradCAM++", "HiResCAM", "XGradCAM", "LayerCAM", "GradCAMElementWise", "EigenGradCAM",
               "EigenCAM", "FEM", "ScoreCAM", "AblationCAM")  # fmt: skip
SEEDS = dict(ge=0, le=2**32 - 1)  # what numpy accepts


def option(default, help, **limits):
    """A field of `Settings`.

    `limits`: `choices` (allowed texts), `words` (texts that a number may be instead), `pattern` (a regular expression
    for a text, and what it asks for in words), `ge gt le lt` (bounds of a number), `needs` (another field's name and
    the values beside which this one has a meaning, none for any but zero), `identity` (False for what does not define
    the run: places and devices).
    """
    return field(default=default, metadata=dict(help=help, **limits))


@dataclass(frozen=True)
class Settings:
    """The parameters of a run. `Settings(epochs=3)` is plain SGD without augmentation; see `recipes` for named ones."""

    data: str = option("auto", "auto, cifar10, digits, or a folder or archive of images", identity=False)
    preset: str | None = option(None, "Settings of a published solution, in place of the recipe's")
    model: str = option("resnet18", "Network", choices=("resnet18", "resnet34", "custom_resnet"))
    epochs: int = option(20, "Passes over the train images", ge=1, le=10_000)
    bs: int = option(128, "Batch size; a default is lowered so that a small set gives 20 steps", ge=1, le=65_536)
    lr: float | str = option(
        0.1,
        'Highest learning rate (a default is lowered with bs), or "find" for a range test',
        words=("find",),
        gt=0,
        le=100,
    )
    lr_suggest: str = option(
        "valley", "Which suggestion of the range test to use", choices=("valley", "slide", "steep", "minimum"),
        needs=("lr", "find"),
    )  # fmt: skip
    opt: str = option("sgd", "Optimizer", choices=TORCH_OPTIMIZERS + FASTAI_OPTIMIZERS)
    momentum: float = option(0.9, "Momentum, or Adam's first beta", ge=0, lt=1)
    mom_min: float | None = option(
        None, "Momentum at the peak of a one-cycle schedule", ge=0, lt=1, needs=("sched", "one-cycle")
    )
    nesterov: str = option("no", "Nesterov momentum, with sgd and muon", choices=YES_NO)
    wd: float = option(0.0, "Weight decay (L2); muon decays linear layers only", ge=0, le=1)
    wd_bn_bias: str = option("yes", "Whether weight decay includes batch norm and biases", choices=YES_NO)
    sched: str = option("none", "Schedule", choices=("one-cycle", "flat-cos", "step", "plateau", "none"))
    pct_start: float = option(
        0.3, "Fraction of the run before the peak (one-cycle) or before the fall (flat-cos)", gt=0, lt=1,
        needs=("sched", "one-cycle", "flat-cos"),
    )  # fmt: skip
    peak_epoch: float | None = option(None, "The peak of one-cycle in epochs", gt=0, needs=("sched", "one-cycle"))
    div: float = option(25.0, "one-cycle starts at lr / div", ge=1, needs=("sched", "one-cycle"))
    div_final: float = option(
        25e4, "one-cycle and flat-cos end at lr / div_final", ge=1, needs=("sched", "one-cycle", "flat-cos")
    )
    anneal: str = option("cos", "Shape of one-cycle", choices=("cos", "linear"), needs=("sched", "one-cycle"))
    step_size: int = option(6, "step: epochs between falls", ge=1, le=10**9, needs=("sched", "step"))
    gamma: float = option(0.1, "step, plateau: factor of a fall", gt=0, lt=1, needs=("sched", "step", "plateau"))
    plateau_patience: int = option(
        2, "plateau: epochs without a better validation loss before a fall", ge=0, le=10_000, needs=("sched", "plateau")
    )
    valid_pct: float | None = option(
        None, "Fraction of train for validation, stratified; the test split is then read once, at the end", gt=0, lt=1
    )
    split_seed: int = option(42, "Seed of that split", **SEEDS)
    subset: int | None = option(None, "Train on a stratified subset of this size", ge=1, le=10**9)
    no_test: bool = option(False, "Never read the test split", needs=("valid_pct",))
    save_best: bool = option(
        False, "Keep the weights of the best validation accuracy in best.pth", needs=("valid_pct",)
    )
    patience: int | None = option(
        None, "Stop after this many epochs without a better validation accuracy", ge=1, le=10**9, needs=("valid_pct",)
    )
    label_smoothing: float = option(0.0, "Share of the target spread over all classes", ge=0, lt=1)
    l1: float | None = option(None, "Weight of the L1 penalty on convolution and linear weights", ge=0)
    clip: float | None = option(None, "Largest norm of the gradient", gt=0)
    clip_value: float | None = option(None, "Largest component of the gradient", gt=0)
    mixup: float | None = option(None, "MixUp's alpha", gt=0)
    cutmix: float | None = option(None, "CutMix's alpha", gt=0)
    ema: float | None = option(
        None, "Decay per step of an average of the weights, which is evaluated and saved", gt=0, lt=1
    )
    padding: int = option(0, "RandomCrop: pixels of padding on every side (0: no crop)", ge=0, le=31)
    pad_mode: str = option("zeros", "RandomCrop: padding", choices=("zeros", "reflect"), needs=("padding",))
    cutout: int = option(0, "CutOut: side of a hole in pixels (0: none)", ge=0, le=32)
    n_holes: int = option(1, "CutOut: holes per image", ge=1, le=64, needs=("cutout",))
    max_holes: int | None = option(
        None, "CutOut: each image draws from n_holes to this many", ge=1, le=64, needs=("cutout",)
    )
    cutout_p: float = option(1.0, "CutOut: probability per image", ge=0, le=1, needs=("cutout",))
    flip: float | None = option(0.0, "Probability of a horizontal flip (our recipes: .5, and 0 on digits)", ge=0, le=1)
    flip_by: str = option("chance", "Flip by chance, or each image in every other epoch", choices=("chance", "epoch"))
    vflip: float = option(0.0, "Probability of a vertical flip", ge=0, le=1)
    rotate: float = option(0.0, "Largest rotation in degrees, either way", ge=0, le=180)
    n_images: int = option(10, "Images in the galleries", ge=1, le=100)
    n_cols: int = option(5, "Columns in the galleries", ge=1, le=20)
    cam_layer: str | None = option(
        None, "Grad-CAM: layers, separated by commas (default: the deepest whose map has at least 5 pixels a side)",
        pattern=(r"\s*\w+(\.\w+)*\s*(,\s*\w+(\.\w+)*\s*)*", "give names of layers, separated by commas: layer2,layer3"),
    )  # fmt: skip
    cam_target: str = option("predicted", "Grad-CAM: class to explain", choices=("predicted", "true"))
    cam_method: str = option("GradCAM", "Grad-CAM: method of pytorch-grad-cam", choices=CAM_METHODS)
    cam_alpha: float = option(0.5, "Grad-CAM: opacity of the heatmap in the overlay", ge=0, le=1)
    seed: int = option(42, "Seed of weights, order and augmentation", **SEEDS)
    device: str = option(
        "auto", "auto, cpu, cuda, cuda:N or mps", identity=False,
        pattern=(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", "give auto, cpu, cuda, cuda:N or mps"),
    )  # fmt: skip
    precision: str = option("auto", "Precision", choices=("auto", "fp32", "fp16", "bf16"))
    compile: str = option(
        "auto", "torch.compile, in fp32 on a CPU with Winograd's convolutions", choices=("auto", *YES_NO)
    )
    out: str | None = option(None, "The run's folder (default: runs/<recipe>-<date>-<time>)", identity=False)
    tensorboard: bool = option(False, "Write TensorBoard logs into the run's folder")

    @classmethod
    def from_dict(cls, values):
        """Settings of a dict that holds some of the parameters and perhaps others, such as a config.json's."""
        values = {name: value for name, value in values.items() if name in OPTIONS}
        return _checked(cls(**check_values(**values)), ())

    def to_dict(self):
        """Every parameter by name."""
        return asdict(self)

    @property
    def peak_fraction(self):
        """Where the peak of one-cycle lies, as a fraction of the run."""
        return self.peak_epoch / self.epochs if self.peak_epoch else self.pct_start


OPTIONS = {option.name: option for option in fields(Settings)}

# What may not be combined: (condition on the settings and the names that were set, wrong arguments, message).
REFUSED = (
    (lambda s, set_: {"peak_epoch", "pct_start"} <= set_, "peak_epoch pct_start",
     "both say where the peak is; use one of them"),
    (lambda s, set_: s.peak_epoch is not None and s.peak_epoch >= s.epochs, "peak_epoch",
     "must lie before `epochs` ({s.epochs})"),
    (lambda s, set_: s.sched == "plateau" and s.valid_pct is None, "sched",
     "needs `valid_pct`, because the test split may not steer a run"),
    (lambda s, set_: s.sched == "plateau" and s.opt in FASTAI_OPTIMIZERS, "sched",
     f"works with torch's optimizers ({', '.join(TORCH_OPTIMIZERS)}), not with `opt` {{s.opt}}"),
    (lambda s, set_: "flip_by" in set_ and s.flip_by == "epoch" and s.flip not in (None, 0.5), "flip_by",
     "flips each image half of the time, which is not `flip` {s.flip}"),
    (lambda s, set_: s.mixup and s.cutmix, "mixup cutmix", "do not work together; use one of them"),
    (lambda s, set_: s.clip and s.clip_value, "clip clip_value", "use one of them"),
    (lambda s, set_: s.max_holes is not None and s.max_holes < s.n_holes, "max_holes",
     "must be at least `n_holes` ({s.n_holes})"),
    (lambda s, set_: "nesterov" in set_ and s.nesterov == "yes" and s.opt not in NESTEROV_OPTIMIZERS, "nesterov",
     f"only `opt` {' and '.join(NESTEROV_OPTIMIZERS)} have it, not {{s.opt}}"),
    (lambda s, set_: s.nesterov == "yes" and s.opt in NESTEROV_OPTIMIZERS and s.momentum == 0, "momentum",
     "Nesterov momentum must be above 0; or set `nesterov` to no"),
    (lambda s, set_: s.mom_min is not None and s.mom_min > s.momentum, "mom_min",
     "must not be above `momentum` ({s.momentum})"),
)  # fmt: skip

# What gives way when the user sets something else: (set, not set, its new value).
GIVES_WAY = (
    ("pct_start", "peak_epoch", None),
    ("clip", "clip_value", None),
    ("clip_value", "clip", None),
    ("mixup", "cutmix", None),
    ("cutmix", "mixup", None),
    ("flip", "flip_by", "chance"),
)


def resolve(settings, overrides):
    """(settings, overrides): `settings` with what a user set, a dict, and that dict with its values converted.

    None stands for what was not set. Raises InputError for values and combinations that no run could use.
    """
    for name in overrides:
        check_choice(tuple(OPTIONS), parameter=name)
    overrides = check_values(**{name: value for name, value in overrides.items() if value is not None})
    changes = {other: value for name, other, value in GIVES_WAY if name in overrides and other not in overrides}
    settings = replace(settings, **changes, **overrides)
    if settings.sched != "one-cycle" and "mom_min" not in overrides:
        settings = replace(settings, mom_min=None)
    return _checked(settings, set(overrides)), overrides


def choices(name):
    """The texts that the parameter `name` may be."""
    return OPTIONS[name].metadata["choices"]


def check_values(**values):
    """The values by name, converted to the types of their parameters. Raises InputError for the first wrong one."""
    return {name: _check_value(OPTIONS[name], value) for name, value in values.items()}


def _check_value(option, value):
    name, limits, kinds = option.name, option.metadata, get_args(option.type) or (option.type,)
    if value is None and (type(None) in kinds or option.default is None):
        return None
    if float in kinds and isinstance(value, str) and "words" in limits:
        if value in limits["words"]:
            return value
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"neither a number nor {' or '.join(limits['words'])}", **{name: value}) from None
    value = _CONVERSIONS[kinds[0]](name, value)
    if "choices" in limits:
        check_choice(limits["choices"], **{name: value})
    if "pattern" in limits and not re.fullmatch(limits["pattern"][0], value):
        raise InputError(limits["pattern"][1], **{name: value})
    if kinds[0] in (int, float) and not _in_range(value, limits):
        raise InputError(f"must be {range_text(option)}", **{name: value})
    return value


def _text(name, value):
    if isinstance(value, bool):  # nesterov=True
        return "yes" if value else "no"
    if not isinstance(value, (str, os.PathLike)):
        raise InputError("must be text", **{name: value})
    value = os.fspath(value)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError("must be printable and not empty", **{name: value})
    return value


def _whole(name, value):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError("must be a whole number", **{name: value})
    return int(value)


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError("must be a number", **{name: value})
    return float(value)


def _switch(name, value):
    if not isinstance(value, bool):
        raise InputError("must be True or False", **{name: value})
    return value


_CONVERSIONS = {str: _text, int: _whole, float: _number, bool: _switch}


def _in_range(value, limits):
    return (
        math.isfinite(value)
        and value >= limits.get("ge", -math.inf)
        and value > limits.get("gt", -math.inf)
        and value <= limits.get("le", math.inf)
        and value < limits.get("lt", math.inf)
    )


def range_text(option):
    """The numbers that `option` may be, in words: "at least 0 and below 1"."""
    words = dict(ge="at least", gt="above", le="at most", lt="below")
    bounds = [f"{text} {option.metadata[key]}" for key, text in words.items() if key in option.metadata]
    return " and ".join(bounds if len(bounds) == 2 else [*bounds, "finite"])


def _checked(settings, names):
    """`settings`, if its values go together; `names` are the parameters that a user set."""
    for name in names:
        other, *values = OPTIONS[name].metadata.get("needs", (None,))
        if other is None or getattr(settings, name) in (None, False):
            continue
        actual = getattr(settings, other)
        if values and actual not in values:
            raise InputError(
                f"goes with `{other}` {' or '.join(values)}, not {actual}", **{name: getattr(settings, name)}
            )
        if not values and not actual:
            raise InputError(f"needs `{other}`", **{name: getattr(settings, name)})
    for condition, wrong, message in REFUSED:
        if condition(settings, set(names)):
            raise InputError(message.format(s=settings), **{name: getattr(settings, name) for name in wrong.split()})
    return settings
