"""The training recipe for ResNet18 on CIFAR-10 with fastai: data, learner, training run, error explorer.

The names below load on first use, so that `import cifar_fastai` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # no name that is also a module's: `cifar_fastai.predict` would be one or the other by turns
    "ImageSet": "data.images",
    "load_images": "data.images",
    "cifar_dls": "data.loaders",
    "cifar_block": "data.loaders",
    "test_dl": "data.loaders",
    "AlternatingFlip": "data.augment",
    "CutOut": "data.augment",
    "RandomCrop": "data.augment",
    "RandomFlip": "data.augment",
    "create_model": "models",
    "resnet18": "models",
    "resnet34": "models",
    "custom_resnet": "models",
    "cifar_learner": "training.learner",
    "range_test": "training.range_test",
    "load_run": "runs.folder",
    "describe_run": "runs.folder",
    "is_run": "runs.folder",
    "write_run": "runs.notebook",
    "Predictions": "evaluation.predictions",
    "predict_files": "evaluation.predictions",
    "Heatmaps": "evaluation.gradcam",
    "cam_layers": "evaluation.gradcam",
    "write_report": "report.page",
}

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
