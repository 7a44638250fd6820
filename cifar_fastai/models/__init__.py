"""The networks, by name: `create_model("resnet18", n_classes=10)` or `from cifar_fastai.models import resnet18`."""

from cifar_fastai.errors import InputError, check_choice
from cifar_fastai.models.custom_resnet import CustomResNet, custom_resnet
from cifar_fastai.models.resnet import ResNet, resnet18, resnet34

__all__ = ["CustomResNet", "ResNet", "create_model", "custom_resnet", "resnet18", "resnet34"]

_FACTORIES = {"resnet18": resnet18, "resnet34": resnet34, "custom_resnet": custom_resnet}


def create_model(model, n_classes=10, width=64, size=32):
    """A new network by name, with random weights, for images of `size` x `size` pixels.

    `width`: channels of its first convolution. InputError for others, and for a size that the network cannot take.
    """
    if model == "custom_resnet" and not 32 <= size < 64:
        raise InputError(f"needs images of 32 to 63 pixels a side, not {size}; resnet18 takes any", model=model)
    return _FACTORIES[check_choice(tuple(_FACTORIES), model=model)](n_classes, width)
