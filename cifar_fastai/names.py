"""The names a user may give on the command line, and the answer to one that is none of them."""

from difflib import get_close_matches

from cifar_fastai.errors import InputError

__all__ = [
    "ANNEALS",
    "CAM_METHODS",
    "CLASSLESS",
    "FASTAI_OPTIMIZERS",
    "FLIP_BY",
    "MODEL_NAMES",
    "NESTEROV_OPTIMIZERS",
    "PAD_MODES",
    "PER_CHANNEL",
    "PRECISIONS",
    "SCHEDULES",
    "SUGGESTIONS",
    "TORCH_OPTIMIZERS",
    "check_name",
]

MODEL_NAMES = ("resnet18", "resnet34", "custom_resnet")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
PAD_MODES = ("zeros", "reflect")
SCHEDULES = ("one-cycle", "flat-cos", "step", "plateau", "none")
ANNEALS = ("cos", "linear")
FLIP_BY = ("chance", "epoch")
SUGGESTIONS = ("valley", "slide", "steep", "minimum")
TORCH_OPTIMIZERS = ("sgd", "adam", "adamw", "radam", "nadam", "rmsprop", "muon")  # fused or foreach
NESTEROV_OPTIMIZERS = ("sgd", "muon")
FASTAI_OPTIMIZERS = ("qhadam", "larc", "lamb", "ranger")  # where torch has no equal, fastai's

CAM_METHODS = {  # pytorch-grad-cam's, and the names of its classes
    "GradCAM": "GradCAM",
    "GradCAM++": "GradCAMPlusPlus",
    "HiResCAM": "HiResCAM",
    "XGradCAM": "XGradCAM",
    "LayerCAM": "LayerCAM",
    "GradCAMElementWise": "GradCAMElementWise",
    "EigenGradCAM": "EigenGradCAM",
    "EigenCAM": "EigenCAM",
    "FEM": "FEM",
    "ScoreCAM": "ScoreCAM",
    "AblationCAM": "AblationCAM",
}
CLASSLESS = ("EigenCAM", "FEM")  # they explain the activations, no class
PER_CHANNEL = ("ScoreCAM", "AblationCAM")  # a forward pass for every channel of the layer, hundreds for an image


def check_name(flag, name, known):
    """Return `name` where it is among `known`; else raise InputError with the near ones."""
    if name in known:
        return name
    lower = {item.lower(): item for item in known}
    near = [lower[item] for item in get_close_matches(str(name).lower(), lower, n=2, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
    raise InputError(f"{flag} {name}: no such name; {hint}")
