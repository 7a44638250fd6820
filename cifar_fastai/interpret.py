"""Two pictures for a notebook, on any fastai Learner: `learn.plot_misclassified()` and `learn.plot_gradcam()`."""

import numpy as np
import torch
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastcore.basics import patch

from cifar_fastai.errors import InputError
from cifar_fastai.galleries import plot_gradcam as draw_gradcam
from cifar_fastai.galleries import plot_tiles
from cifar_fastai.gradcam import gradcam
from cifar_fastai.predict import predict

__all__ = ["split_batch"]


@patch
def plot_misclassified(self: Learner, n=10, dl=None, preds=None, n_cols=5):
    """A Figure of the `n` misclassified images with the worst losses, each with both classes, confidence and loss.

    `dl` is by default `learn.dls.valid`; `preds`, its `Predictions`, spares the pass over it.
    """
    dl, preds = _predicted(self, dl, preds)
    chosen = _worst(preds, n)
    _, images = split_batch(self, dl, chosen)
    title = f"{len(chosen)} of {len(preds.errors)} misclassified images, worst loss first"
    return plot_tiles(images, *_words(preds, chosen), preds.losses[chosen], n_cols=n_cols, title=title)


@patch
def plot_gradcam(self: Learner, n=10, layer=None, method="GradCAM", target="predicted", dl=None, preds=None,
                 alpha=0.5):  # fmt: skip
    """A Figure of heatmaps for the `n` misclassified images with the worst losses: image, heatmap, overlay.

    `layer`: a name, several, or None for `default_layer`. `target`: "predicted", "true", "both" side by side, a class
    id or the name of a class. `method`: one of `gradcam.METHODS`. `dl`, `preds`: as for `plot_misclassified`.
    Raises InputError for names that are not known and for a layer whose map is too small.
    """
    dl, preds = _predicted(self, dl, preds)
    chosen = _worst(preds, n)
    x, images = split_batch(self, dl, chosen)
    ids = {"predicted": preds.predicted[chosen], "true": preds.targets[chosen]}
    targets = list(ids.values()) if target == "both" else [ids.get(target, target)]
    layers = [layer] if layer is None or isinstance(layer, str) else layer
    heatmaps = [gradcam(self, x, target, layer, method) for layer in layers for target in targets]
    return draw_gradcam(images, heatmaps, *_words(preds, chosen), alpha=alpha, classes=preds.classes)


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


def _predicted(learn, dl, preds):
    dl = learn.dls.valid if dl is None else dl
    return dl, predict(learn, dl) if preds is None else preds


def _worst(preds, n):
    if n < 1:
        raise InputError(f"n {n}: give how many images to show, at least 1")
    return preds.misclassified(n)


def _words(preds, chosen):
    names = np.array(preds.classes, dtype=object)
    return list(names[preds.targets[chosen]]), list(names[preds.predicted[chosen]]), preds.confidence[chosen]
