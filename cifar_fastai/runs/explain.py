"""Why a finished run decides as it does: for its own errors, or for any image files."""

from pathlib import Path

import numpy as np
import torch

from cifar_fastai.data.loaders import reported_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import default_layer, gradcam, layer_names
from cifar_fastai.evaluation.predictions import image_batch, predict, predict_files
from cifar_fastai.names import CAM_METHODS, check_name
from cifar_fastai.plots.charts import plot_gradcam, save_figure
from cifar_fastai.runs.folder import load_network, load_run, read_config
from cifar_fastai.runs.results import class_names, normalised, pixels

__all__ = ["explain_errors", "explain_files", "explain_run"]

MAX_IMAGES = 100  # of one picture


def explain_run(
    run,
    images=(),
    layer=None,
    method="GradCAM",
    target="predicted",
    n=10,
    alpha=0.5,
    out=None,
    data=None,
    device="auto",
):
    """Print a table and draw explain.png for `images`, files of any size, or for the run's `n` worst errors.

    `layer`: one or several by name, separated by commas; `target`: "predicted", "true" (of the run's own images) or
    the name of a class. Returns the path of the picture. InputError for what is no run, image, layer or class.
    """
    config = read_config(run)  # what is no run is said before what is no picture
    out = Path(out) if out is not None else Path(run) / "explain.png"
    _check(images, method, target, n, alpha, out)
    learn = load_network(run, device, data) if images else load_run(run, device, data)[0]
    with learn.no_bar():
        layers = [name.strip() for name in layer.split(",")] if layer else [default_layer(learn)]
        for name in layers:  # a wrong name is said before the work, not after it
            gradcam(learn, torch.zeros(0, 3, 32, 32), [] if target == "true" else target, name, method)
        if images:
            figure = explain_files(learn, images, layers, method, target, alpha)
        else:
            asked = config["parameters"]
            split, dl = reported_dl(learn.dls, asked.get("valid_pct"), asked.get("no_test"))
            figure = explain_errors(learn, layers, method, target, n, alpha, split, dl)
    save_figure(figure, out)
    print(f"picture: {out}")
    return out


def _check(images, method, target, n, alpha, out):
    check_name("--method", method, tuple(CAM_METHODS))
    if not 1 <= n <= MAX_IMAGES:
        raise InputError(f"--n {n}: must be from 1 to {MAX_IMAGES}")
    if len(images) > MAX_IMAGES:
        raise InputError(f"--images: {len(images)} files; one picture takes {MAX_IMAGES}")
    if not 0 <= alpha <= 1:
        raise InputError(f"--alpha {alpha}: must be from 0 to 1")
    if images and target == "true":
        raise InputError("--target true: nobody knows the true class of a file; give predicted or the name of a class")
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: give a file name that ends in .png, in a folder that exists")


def explain_files(learn, files, layer=None, method="GradCAM", target="predicted", alpha=0.5):
    """A Figure of heatmaps for image files, the table of their three most probable classes printed.

    `layer`, `method`: as for `learn.plot_gradcam`; `target`: "predicted", a class id or the name of a class.
    """
    found = predict_files(learn, files)
    width = max(len(str(item.file)) for item in found)
    for item in found:
        note = f"  ({item.note})" if item.note else ""
        print(f"{str(item.file):<{width}}  {_top3(item.top3)}{note}")
    x = image_batch(learn, [item.image for item in found])  # (N, 3, 32, 32)
    predicted, confidence = zip(*(item.top3[0] for item in found), strict=True)
    explained = [int(item.probs.argmax()) for item in found] if target == "predicted" else target
    heat = [gradcam(learn, x, explained, name, method) for name in layer_names(layer)]
    return plot_gradcam(
        np.stack([item.image for item in found]),
        heat,
        [None] * len(found),
        predicted,
        confidence,
        alpha=alpha,
        classes=found[0].classes,
    )


def explain_errors(learn, layer=None, method="GradCAM", target="predicted", n=10, alpha=0.5, split="test", dl=None):
    """A Figure of heatmaps for the `n` worst errors, their table printed.

    `layer`, `method`, `target`: as for `learn.plot_gradcam`, without "both".
    `dl` (default `learn.dls.valid`) holds the images, `split` is what they are called.
    """
    dl = learn.dls.valid if dl is None else dl
    predictions = predict(learn, dl)
    chosen = predictions.misclassified(n)
    true, predicted = class_names(predictions, chosen)
    print(f"{len(predictions.errors):,} of {len(predictions):,} {split} images are misclassified; the worst by loss:")
    width = max((len(name) for name in predictions.classes), default=0)
    for position, name in zip(chosen, true, strict=True):
        top = np.argsort(-predictions.probs[position])[:3]
        top3 = [(predictions.classes[k], predictions.probs[position, k]) for k in top]
        print(f"{predictions.indices[position]:>6}  true {name:<{width}}  {_top3(top3)}")
    explained = {"true": predictions.targets, "predicted": predictions.predicted}.get(target)
    explained = target if explained is None else explained[chosen]
    x = normalised(dl, chosen)
    heat = [gradcam(learn, x, explained, name, method) for name in layer_names(layer)]
    return plot_gradcam(
        pixels(dl, chosen),
        heat,
        true,
        predicted,
        predictions.confidence[chosen],
        alpha=alpha,
        classes=predictions.classes,
    )


def _top3(top3):
    return ", ".join(f"{name} {probability:.1%}" for name, probability in top3)
