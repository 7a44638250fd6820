"""The names a user may give on the command line, and the answer to one that is none of them."""

from difflib import get_close_matches

from cifar_fastai.errors import InputError

__all__ = ["ANNEALS", "MODEL_NAMES", "PAD_MODES", "PRECISIONS", "SCHEDULES", "SUGGESTIONS", "TORCH_OPTIMIZERS",
           "FASTAI_OPTIMIZERS", "check_name"]

MODEL_NAMES = ("resnet18", "resnet34", "custom_resnet")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
PAD_MODES = ("zeros", "reflect")
SCHEDULES = ("one-cycle", "flat-cos", "step", "plateau", "none")
ANNEALS = ("cos", "linear")
SUGGESTIONS = ("valley", "slide", "steep", "minimum")
TORCH_OPTIMIZERS = ("sgd", "adam", "adamw", "radam", "nadam", "rmsprop")  # torch's own, fused or foreach
FASTAI_OPTIMIZERS = ("qhadam", "larc", "lamb", "ranger")  # where torch has no equal, fastai's


def check_name(flag, name, known):
    """Return `name` where it is among `known`; else raise InputError with the near ones."""
    if name in known:
        return name
    lower = {item.lower(): item for item in known}
    near = [lower[item] for item in get_close_matches(str(name).lower(), lower, n=2, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
    raise InputError(f"{flag} {name}: no such name; {hint}")
