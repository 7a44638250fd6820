"""Explain what a finished run predicts: for its own errors, or for any image files."""

from pathlib import Path

import numpy as np
import pandas as pd
from fastcore.basics import listify

from cifar_fastai.data.loaders import reported_dl
from cifar_fastai.errors import InputError, printable, renamed
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.evaluation.image_files import class_probs, image_batch, predict_files
from cifar_fastai.evaluation.predictions import Predictions, as_cell, images_at
from cifar_fastai.files import atomic_write
from cifar_fastai.plots.galleries import plot_gradcam
from cifar_fastai.plots.style import save_figure
from cifar_fastai.runs.folder import describe_run, latest_finished, picture_path, read_config
from cifar_fastai.runs.results import check_layers
from cifar_fastai.runs.run import load_network, load_run
from cifar_fastai.settings import check_values

__all__ = ["explain_files", "explain_run", "predict_run"]

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
    """Print a table and draw explain.png for `images`, files of any size, or for the run's `n` highest losses.

    `layer`: one or several by name, separated by commas; `target`: "predicted", "true" (of the run's own images) or
    the name of a class. Returns the path of the picture. Raises InputError for a folder without a run, and for
    images, layers or classes that cannot be used.
    """
    settings, out = read_config(run)["parameters"], picture_path(out or Path(run) / "explain.png")
    with renamed(cam_method="method", cam_alpha="alpha"):
        check_values(cam_method=method, cam_alpha=alpha)
    if not 1 <= n <= MAX_IMAGES:
        raise InputError(f"must be from 1 to {MAX_IMAGES}", n=n)
    if len(images) > MAX_IMAGES:
        raise InputError(f"{len(images)} images; one picture takes {MAX_IMAGES}")
    if images and target == "true":
        raise InputError("the true class of a file is unknown; use predicted or the name of a class", target=target)
    learn = load_network(run, device) if images else load_run(run, device, data)[0]
    with learn.no_bar():
        layers = check_layers(learn, layer, method, target)
        if images:
            figure = explain_files(learn, images, layers, method, target, alpha)
        else:
            split, dl = reported_dl(learn.dls, settings.get("valid_pct"), settings.get("no_test"))
            predictions = Predictions.from_csv(Path(run) / "predictions.csv", tuple(map(str, learn.dls.vocab)))
            figure = _explain_errors(learn, split, dl, predictions, n, layers, method, target, alpha)
    save_figure(figure, out)
    print(f"picture: {printable(out)}")
    return out


def predict_run(files, run=None, csv=None, device="auto"):
    """Print the three most probable classes of image files of any size; the `ImagePrediction`s.

    `run`: the folder of a finished run, by default the newest under runs/; `csv`: a file for the table, a row for each
    image. Raises InputError for a folder without a run, and for files that cannot be used.
    """
    run = latest_finished() if run is None else run
    print(f"{printable(run)}: {describe_run(run)}")
    learn = load_network(run, device)
    with learn.no_bar():
        predictions = _predict_and_print(learn, files)
    if csv:
        rows = []
        for prediction in predictions:
            top3 = {f"class_{k}": as_cell(name) for k, (name, _) in enumerate(prediction.top3, 1)}
            top3 |= {f"probability_{k}": score for k, (_, score) in enumerate(prediction.top3, 1)}
            rows.append({"file": as_cell(str(prediction.file))} | top3)
        with atomic_write(csv) as file:
            pd.DataFrame(rows).to_csv(file, index=False, lineterminator="\n")
    return predictions


def explain_files(learn, files, layer=None, method="GradCAM", target="predicted", alpha=0.5):
    """A Figure of heatmaps for image files; prints a table of their three most probable classes.

    `layer`, `method`: as for `learn.plot_gradcam`; `target`: "predicted", a class id or the name of a class.
    """
    predictions = _predict_and_print(learn, files)
    images = np.stack([item.image for item in predictions])
    predicted, confidence = zip(*(item.top3[0] for item in predictions), strict=True)
    targets = [int(item.probs.argmax()) for item in predictions] if target == "predicted" else target
    x = image_batch(learn, images)  # (N, 3, S, S)
    heatmaps = [gradcam(learn, x, targets, name, method) for name in listify(layer) or [None]]
    words = dict(classes=predictions[0].classes, names=[printable(item.file.name) for item in predictions])
    return plot_gradcam(images, heatmaps, [None] * len(images), predicted, confidence, alpha, **words)


def _predict_and_print(learn, files):
    predictions = predict_files(learn, files)
    names = [printable(item.file) for item in predictions]
    for name, item in zip(names, predictions, strict=True):
        note = f"  ({item.note})" if item.note else ""
        print(f"{name:<{max(map(len, names))}}  {_top3(item.probs, item.classes)}{note}")
    return predictions


def _explain_errors(learn, split, dl, predictions, n, layers, method, target, alpha):
    """A Figure of heatmaps for the `n` misclassified images of the highest losses; prints their table."""
    positions = predictions.misclassified(n)
    print(f"{len(predictions.errors):,} of {len(predictions):,} {split} images are misclassified; the worst by loss:")
    width = max(len(printable(name)) for name in predictions.classes)
    probs = class_probs(learn, images_at(dl, positions)[1]) if len(positions) else ()
    for position, name, row in zip(positions, predictions.names_at(positions)[0], probs, strict=True):
        top3 = _top3(row, predictions.classes)
        print(f"{predictions.indices[position]:>6}  true {printable(name):<{width}}  {top3}")
    return learn.plot_gradcam(n, layers, method, target, alpha, dl=dl, preds=predictions)


def _top3(probs, classes):
    return ", ".join(f"{printable(classes[k])} {probs[k]:.1%}" for k in np.argsort(-probs, kind="stable")[:3])
