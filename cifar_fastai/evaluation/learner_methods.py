"""Pictures for a notebook as methods of fastai's classes; each returns a Figure.

`learn.plot_misclassified()`, `learn.plot_gradcam()` and `learn.plot_class_accuracy()` work on any fastai Learner,
`learn.plot_curves()` and `learn.plot_schedule()` on one that keeps a `History`, as `cifar_learner`'s do, and
`dls.plot_augmentations()` on DataLoaders from `cifar_dls`.
"""

from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastcore.basics import listify, patch
from fastcore.meta import delegates

from cifar_fastai.data.loaders import augmentation_columns
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.evaluation.predictions import images_at, predict
from cifar_fastai.plots import charts, galleries


def _errors(learn, n, dl=None, preds=None, true=None, predicted=None):
    """(preds, positions, title, x, images) of the `n` misclassified images with the highest losses."""
    dl, preds = _predictions(learn, dl, preds)
    total, positions = len(preds.misclassified(None, true, predicted)), preds.misclassified(n, true, predicted)
    kind = (f" of {true}" if true else "") + (f" predicted as {predicted}" if predicted else "")
    title = f"{len(positions)} of {total:,} misclassified images{kind}, highest loss first"
    return preds, positions, title, *images_at(dl, positions)


@patch
@delegates(_errors)
def plot_misclassified(self: Learner, n=10, n_cols=5, **kwargs):
    """A Figure of the `n` misclassified images with the highest losses: true and predicted class, confidence, loss.

    `dl`: by default `learn.dls.valid`; `preds`: its `Predictions`, which saves the pass over it. `true`, `predicted`:
    only images of this class, or predicted as this class, by name. Raises InputError for an unknown class.
    """
    preds, positions, title, _, images = _errors(self, n, **kwargs)
    numbers = preds.confidence[positions], preds.losses[positions]
    return galleries.plot_tiles(images, *preds.names_at(positions), *numbers, n_cols=n_cols, title=title)


@patch
@delegates(_errors)
def plot_gradcam(self: Learner, n=10, layer=None, method="GradCAM", target="predicted", alpha=0.5, **kwargs):
    """A Figure of heatmaps for the `n` misclassified images with the highest losses: image, heatmap, overlay.

    `layer`: a name, several, or None for `default_layer`. `target`: "predicted", "true", "both" side by side, a class
    id or the name of a class. `method`: one of `gradcam.METHODS`. `dl`, `preds`, `true`, `predicted`: as for
    `plot_misclassified`. Raises InputError for unknown names and for a layer whose map is too small.
    """
    preds, positions, title, x, images = _errors(self, n, **kwargs)
    ids = {"predicted": preds.predicted[positions], "true": preds.targets[positions]}
    targets = list(ids.values()) if target == "both" else [ids.get(target, target)]
    heatmaps = [gradcam(self, x, target, name, method) for name in listify(layer) or [None] for target in targets]
    words = *preds.names_at(positions), preds.confidence[positions]
    return galleries.plot_gradcam(images, heatmaps, *words, alpha, title, preds.classes)


@patch
def plot_class_accuracy(self: Learner, dl=None, preds=None):
    """A Figure of the accuracy in each class, best first. `dl`, `preds`: as for `plot_misclassified`."""
    _, preds = _predictions(self, dl, preds)
    return charts.plot_class_accuracy(preds.class_accuracy, preds.accuracy)


@patch
def plot_curves(self: Learner):
    """A Figure of loss and accuracy in every epoch of the learner or its loaded run. InputError without any."""
    settings = getattr(self, "settings", {})  # only `cifar_dls` may evaluate the test split
    is_test = "valid_pct" in settings and settings["valid_pct"] is None
    return charts.plot_curves(_history(self).rows, "test" if is_test else "valid")


@patch
def plot_schedule(self: Learner):
    """A Figure of learning rate and momentum by step. InputError without any, and where a loaded run kept none."""
    history = _history(self)
    if not history.lrs:
        raise InputError("a run's folder keeps no learning rates by step: see its schedule.png")
    return charts.plot_schedule(history.lrs, None if None in history.moms else history.moms, len(self.dls.train))


@patch
def plot_augmentations(self: DataLoaders, n=6):
    """A Figure of `n` train images: originals, after each train-time transform alone, and after all of them."""
    return galleries.plot_augmentations(augmentation_columns(self, n))


def _history(learn):
    history = getattr(learn, "history", None)
    if not getattr(history, "rows", None):
        raise InputError("there is no epoch to draw: train the learner, or load a finished run with load_run")
    return history


def _predictions(learn, dl, preds):
    dl = learn.dls.valid if dl is None else dl
    if preds is not None and len(preds) != len(dl.dataset):
        counts = f"{len(preds):,} images, the split has {len(dl.dataset):,}"
        raise InputError(f"`preds` has predictions of {counts}; pass the `dl` of the predictions, too")
    return dl, predict(learn, dl) if preds is None else preds
