"""The training recipe for ResNet18 on CIFAR-10 with fastai: data, learner, training run, error explorer.

The names below load on first use, so that `import cifar_fastai` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # no name that is also a module's: `cifar_fastai.predict` would be one or the other by turns
    "ImageSet": "data", "load_images": "data", "cifar_dls": "loaders", "cifar_block": "loaders", "test_dl": "loaders",
    "AlternatingFlip": "augment", "CutOut": "augment", "RandomCrop": "augment", "RandomFlip": "augment",
    "create_model": "models", "resnet18": "models", "resnet34": "models", "custom_resnet": "models",
    "cifar_learner": "learner", "range_test": "lr_finder", "load_run": "runs", "describe_run": "runs", "is_run": "runs",
    "write_run": "notebook", "Predictions": "predict", "predict_files": "predict", "Heatmaps": "gradcam",
    "cam_layers": "gradcam", "write_report": "report",
}  # fmt: skip

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'cifar_fastai' has no attribute {name!r}")
    module = import_module(f"cifar_fastai.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
