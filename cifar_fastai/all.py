"""For a notebook: `from cifar_fastai.all import *`, which hides no name of `fastai.vision.all`.

Our `RandomCrop` is `BatchRandomCrop` here; `resnet18`, `resnet34` and `test_dl` are left to fastai and torchvision
(`create_model("resnet18")` makes our network).
"""

import cifar_fastai

_LEFT_OUT = ("RandomCrop", "resnet18", "resnet34", "test_dl", "write_report")
__all__ = ["BatchRandomCrop", *(name for name in cifar_fastai.__all__ if name not in _LEFT_OUT)]

BatchRandomCrop = cifar_fastai.RandomCrop
globals().update({name: getattr(cifar_fastai, name) for name in __all__[1:]})
