"""The networks, by name: `create_model("resnet18", n_classes=10)` or `from cifar_fastai.models import resnet18`."""

from cifar_fastai.models.custom_resnet import CustomResNet, custom_resnet
from cifar_fastai.models.resnet import ResNet, resnet18, resnet34
from cifar_fastai.names import MODEL_NAMES, check_name

__all__ = ["CustomResNet", "ResNet", "create_model", "custom_resnet", "resnet18", "resnet34"]

_FACTORIES = dict(zip(MODEL_NAMES, (resnet18, resnet34, custom_resnet), strict=True))


def create_model(name, n_classes=10):
    """A new network with freshly drawn weights; raises InputError with the near names where `name` is not known."""
    return _FACTORIES[check_name("--model", name, MODEL_NAMES)](n_classes)
