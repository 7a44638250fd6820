"""Pictures for a notebook, as methods of fastai's own classes; each returns a Figure, which a notebook shows once.

`learn.plot_misclassified()`, `learn.plot_gradcam()` and `learn.plot_class_accuracy()` work on any fastai Learner,
`learn.plot_curves()` and `learn.plot_schedule()` on one that keeps a `History`, as `cifar_learner`'s do, and
`dls.plot_augmentations()` on DataLoaders from `cifar_dls`.
"""

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastcore.basics import patch

from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import gradcam, layer_names
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.plots.charts import plot_class_accuracy as draw_class_accuracy
from cifar_fastai.plots.charts import plot_curves as draw_curves
from cifar_fastai.plots.charts import plot_schedule as draw_schedule
from cifar_fastai.plots.galleries import plot_augmentations as draw_augmentations
from cifar_fastai.plots.galleries import plot_gradcam as draw_gradcam
from cifar_fastai.plots.galleries import plot_tiles
from cifar_fastai.runs.results import augmentation_columns, class_names

__all__ = ["split_batch"]


@patch
def plot_misclassified(self: Learner, n=10, dl=None, preds=None, n_cols=5, true=None, predicted=None):
    """A Figure of the `n` misclassified images with the worst losses, each with both classes, confidence and loss.

    `dl` is by default `learn.dls.valid`; `preds`, its `Predictions`, spares the pass over it. `true`, `predicted`:
    only images of this class, only those taken for that one, by name. Raises InputError for an unknown class.
    """
    dl, preds = _predicted(self, dl, preds)
    chosen = _worst(preds, n, true, predicted)
    _, images = split_batch(self, dl, chosen)
    known = len(preds.misclassified(true=true, predicted=predicted))
    kind = (f" of {true}" if true else "") + (f" taken for {predicted}" if predicted else "")
    title = f"{len(chosen)} of {known:,} misclassified images{kind}, worst loss first"
    return plot_tiles(
        images, *class_names(preds, chosen), preds.confidence[chosen], preds.losses[chosen], n_cols=n_cols, title=title
    )


@patch
def plot_gradcam(
    self: Learner,
    n=10,
    layer=None,
    method="GradCAM",
    target="predicted",
    dl=None,
    preds=None,
    alpha=0.5,
    true=None,
    predicted=None,
):
    """A Figure of heatmaps for the `n` misclassified images with the worst losses: image, heatmap, overlay.

    `layer`: a name, several, or None for `default_layer`. `target`: "predicted", "true", "both" side by side, a class
    id or the name of a class. `method`: one of `gradcam.METHODS`. `dl`, `preds`, `true`, `predicted`: as for
    `plot_misclassified`. Raises InputError for names that are not known and for a layer whose map is too small.
    """
    dl, preds = _predicted(self, dl, preds)
    chosen = _worst(preds, n, true, predicted)
    x, images = split_batch(self, dl, chosen)
    ids = {"predicted": preds.predicted[chosen], "true": preds.targets[chosen]}
    targets = list(ids.values()) if target == "both" else [ids.get(target, target)]
    heatmaps = [gradcam(self, x, target, name, method) for name in layer_names(layer) for target in targets]
    return draw_gradcam(
        images, heatmaps, *class_names(preds, chosen), preds.confidence[chosen], alpha=alpha, classes=preds.classes
    )


@patch
def plot_class_accuracy(self: Learner, dl=None, preds=None):
    """A Figure of the accuracy in each class, best first. `dl`, `preds`: as for `plot_misclassified`."""
    _, preds = _predicted(self, dl, preds)
    return draw_class_accuracy(preds.class_accuracy, preds.accuracy)


@patch
def plot_curves(self: Learner):
    """A Figure of loss and accuracy by epoch, of train and of the split that is evaluated.

    All epochs that the learner was trained for, in one fit or several, those of a loaded run included. Raises
    InputError where there were none.
    """
    history = _history(self)
    settings = getattr(self, "settings", {})
    return draw_curves(history.rows, "test" if settings.get("valid_pct") is None else "valid")


@patch
def plot_schedule(self: Learner):
    """A Figure of learning rate and momentum by step, in all epochs that the learner was trained for.

    Raises InputError where there were none, and for a loaded run whose schedule was not one-cycle.
    """
    history = _history(self)
    if not history.lrs:
        raise InputError("a run's folder keeps no learning rates by step: look at its schedule.png")
    return draw_schedule(history.lrs, None if None in history.moms else history.moms, len(self.dls.train))


@patch
def plot_augmentations(self: DataLoaders, n=6):
    """A Figure of `n` train images as they are, after each train-time transform alone, and after all of them."""
    return draw_augmentations(augmentation_columns(self, n))


def split_batch(learn, dl, positions):
    """The images at these positions of the split of `dl`: (as the model gets them (K, 3, H, W), uint8 (K, H, W, 3))."""
    if not len(positions):
        return torch.zeros(0, 3, 32, 32, device=dl.device), np.zeros((0, 32, 32, 3), np.uint8)
    items = [dl.dataset.items[int(k)] for k in positions]
    dl = learn.dls.test_dl(items, num_workers=0)
    x = torch.cat([batch[0].as_subclass(torch.Tensor) for batch in dl])  # (K, 3, H, W)
    pixels = x
    for tfm in reversed(list(dl.after_batch.fs)):
        if isinstance(tfm, Normalize):
            pixels = pixels * tfm.std.to(x.device) + tfm.mean.to(x.device)
    images = (255 * pixels).round().clip(0, 255).byte().permute(0, 2, 3, 1)  # (K, H, W, 3)
    return x, images.cpu().numpy()


def _history(learn):
    history = getattr(learn, "history", None)
    if not getattr(history, "rows", None):
        raise InputError("there is no epoch to draw: train the learner first, or load a finished run with load_run")
    return history


def _predicted(learn, dl, preds):
    dl = learn.dls.valid if dl is None else dl
    if preds is not None and len(preds) != len(dl.dataset):
        raise InputError(
            f"preds: predictions of {len(preds):,} images, and the split has {len(dl.dataset):,}; "
            "give the dl that they were made with, too"
        )
    return dl, predict(learn, dl) if preds is None else preds


def _worst(preds, n, true=None, predicted=None):
    if n < 1:
        raise InputError(f"n {n}: give how many images to show, at least 1")
    return preds.misclassified(n, true, predicted)
