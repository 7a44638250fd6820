"""The training recipe for ResNet18 on CIFAR-10 with fastai: data, learner, training run, error explorer.

The names below load on first use, so `import cifar_fastai` costs nothing.
"""

import warnings
from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "api": "AlternatingFlip CutOut Heatmaps ImageSet Predictions RandomCrop RandomFlip RandomRotate cam_layers "
    "cifar_block cifar_dls cifar_learner create_model custom_resnet gradcam load_images predict predict_files "
    "range_test resnet18 resnet34 test_dl",
    "report.page": "write_report",
    "runs.folder": "describe_run is_run",
    "runs.run": "load_run",
    "runs.notebook": "KeepRun write_run",
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'cifar_fastai' has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # about its own jit, at import
        value = getattr(import_module(f"cifar_fastai.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
