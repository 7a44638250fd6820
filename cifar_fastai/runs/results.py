"""The results of a finished run: numbers, predictions, weights, pictures and page."""

import copy
import io
import time
from pathlib import Path

import cloudpickle
import numpy as np
import torch
from fastai.callback.hook import hook_outputs

from cifar_fastai.api import gradcam, predict
from cifar_fastai.data.images import DIGITS
from cifar_fastai.data.loaders import ArrayDL, reported_dl
from cifar_fastai.errors import escaped
from cifar_fastai.evaluation.gradcam import PER_CHANNEL, default_layer
from cifar_fastai.evaluation.predictions import images_at
from cifar_fastai.evaluation.tta import TTA
from cifar_fastai.files import atomic_write, write_json
from cifar_fastai.hardware import rank
from cifar_fastai.plots.charts import plot_confusion_matrix
from cifar_fastai.plots.galleries import plot_tiles
from cifar_fastai.plots.style import save_figure
from cifar_fastai.report.page import write_report
from cifar_fastai.report.tiles import Tiles
from cifar_fastai.training.checkpoint import save_torch
from cifar_fastai.training.recorder import HISTORY_COLUMNS, ConsoleProgress, console_bar, in_epochs

__all__ = ["check_layers", "error_tiles", "export", "network_table", "write_results"]

MAX_TILES = 4000  # errors that are explained; the page keeps the worst of them, up to its size limit


def write_results(run, command_line=None):
    """Evaluate the trained `run` and write its results into its folder.

    `command_line`: a function of config.json's content that gives the command to repeat the run, for the page.
    """
    learn, s, folder = run.learn, run.settings, run.folder
    with learn.no_bar():
        split, dl = reported_dl(learn.dls, s.valid_pct, s.no_test)
        views = "" if s.no_tta else f", {len(TTA['shift'])} views of each"
        print(f"\nevaluating {len(dl.dataset):,} {split} images{views}", flush=True)
        with learn.added_cbs(ConsoleProgress()):
            plain, *tta = predict(learn, dl, (None,) if s.no_tta else (None, "flip", "shift"))
        if rank():  # what follows is for the first process
            return
        plain.to_csv(folder / "predictions.csv")
        save_torch(folder / "model.pth", learn.model.state_dict())
        export(learn, folder / "learner.pkl")
        errors = "" if s.no_explain else f", and explaining {min(len(plain.errors), MAX_TILES):,} errors"
        print(f"drawing{errors}", flush=True)
        pictures, start = _draw(run, plain, dl, split), time.perf_counter()
        tiles = None if s.no_explain else error_tiles(learn, dl, plain, s)
        seconds = time.perf_counter() - start
        for name, figure in console_bar("drawing", pictures.items()):
            save_figure(figure, folder / f"{name}.png")
        metrics = _metrics(run, plain, tta, split)
        for log in run.history.logs.values():
            log.add_results(metrics, pictures, len(run.history.lrs))
        with atomic_write(folder / "summary.txt") as file:
            file.write(network_table(learn) + "\n")
        write_json(folder / "metrics.json", metrics)
        write_report(folder, tiles, command_line and command_line(run.config))
    _print_results(run, metrics, plain, split)
    if tiles is not None:
        print(f"explained {len(tiles.indices):,} of {len(plain.errors):,} errors in {seconds:.0f} s")
    print(f"all of it on one page: {escaped(folder / 'report.html')}", flush=True)


def _metrics(run, plain, tta, split):
    """The content of metrics.json."""
    rows, config, s = run.history.rows, run.config, run.settings
    metrics = dict(dataset=run.images.name, model=s.network, parameters=run.n_parameters, epochs=len(rows))
    metrics |= {"seed": s.seed} | {name: config[name] for name in ("device", "hardware", "precision", "eval_split")}
    metrics |= {name: rows[-1].get(name) for name in ("train_accuracy", "valid_accuracy", "valid_loss")}
    metrics |= {name: value for name, value in rows[-1].items() if name not in HISTORY_COLUMNS}  # a user's own
    if s.save_best:
        best = max(rows, key=lambda row: row["valid_accuracy"])  # the first of equal ones, as `KeepBest`
        metrics |= dict(best_epoch=best["epoch"], best_valid_accuracy=best["valid_accuracy"])
    flip, shift = (predictions.accuracy for predictions in tta) if tta else (None, None)
    if split == "valid" and metrics["valid_accuracy"] is None:  # it is not among a user's own
        metrics["valid_accuracy"] = plain.accuracy
    metrics |= dict(test_accuracy=plain.accuracy if split == "test" else None, tta_accuracy=flip)
    metrics |= dict(tta_shift_accuracy=shift, class_accuracy=plain.class_accuracy)
    metrics["images_per_second"] = float(np.median([row["images_per_second"] for row in rows]))
    return metrics | {"seconds": sum(row["seconds"] for row in rows)}


def _print_results(run, metrics, plain, split):
    print(f"\n{run.images.name}, {split} accuracy by class")
    for name, accuracy in plain.class_accuracy.items():
        print(f"  {name:<16} {'no images' if accuracy is None else f'{accuracy:>7.2%}'}")
    if run.images.name == DIGITS and run.images.note:  # not what was asked for
        print(f"*** {run.images.note} ***")
    print(f"{split} accuracy {plain.accuracy:.2%} ({len(plain.targets):,} images, {in_epochs(metrics['epochs'])})")
    if metrics["tta_accuracy"] is not None:
        note = "" if run.images.flip else " (a mirrored image means something else here)"
        print(f"with flip TTA {metrics['tta_accuracy']:.2%}{note}")
        print(f"with flip and shift TTA {metrics['tta_shift_accuracy']:.2%}")
    if "best_epoch" in metrics:
        print(
            f"best.pth: epoch {metrics['best_epoch']}, valid accuracy {metrics['best_valid_accuracy']:.2%}; "
            f'load_run("{run.folder}", weights="best.pth") loads it'
        )


def _draw(run, predictions, dl, split):
    """Every picture of the run, by the name of its file."""
    s, learn, n = run.settings, run.learn, run.settings.n_images
    worst = predictions.top_losses(n)
    numbers = predictions.confidence[worst], predictions.losses[worst]
    about = dict(n_cols=s.n_cols, title=f"The {len(worst)} highest losses on the {split} images")
    inputs = dict(dl=dl, preds=predictions)
    pictures = dict(curves=learn.plot_curves())
    if isinstance(learn.dls.train, ArrayDL):
        pictures["augmentations"] = learn.dls.plot_augmentations()
    pictures |= dict(
        class_accuracy=learn.plot_class_accuracy(**inputs),
        confusion_matrix=plot_confusion_matrix(predictions.confusion_matrix, predictions.classes),
        misclassified=learn.plot_misclassified(n, s.n_cols, **inputs),
        top_losses=plot_tiles(images_at(dl, worst)[1], *predictions.names_at(worst), *numbers, **about),
    )
    if not s.no_explain:
        layers = check_layers(learn, s.cam_layer, s.cam_method)
        pictures["gradcam"] = learn.plot_gradcam(n, layers, s.cam_method, s.cam_target, s.cam_alpha, **inputs)
    return pictures | ({"schedule": learn.plot_schedule()} if run.history.lrs else {})


def image_shape(dls):
    """(channels, height, width) of the images that `dls` gives a network."""
    images = getattr(dls, "images", None)
    return (3, images.size, images.size) if images else tuple(dls.valid.one_batch()[0].shape[1:])


def check_layers(learn, names, method="GradCAM", target="predicted"):
    """The layers in `names`, separated by commas, or the default one, as a list.

    Raises InputError for a layer that does not exist or has too small a map, and for an unknown method or class.
    """
    x = torch.zeros(0, *image_shape(learn.dls))
    layers = [name.strip() for name in names.split(",")] if names else [default_layer(learn, x.shape[-1])]
    for layer in layers:
        gradcam(learn, x, [] if target == "true" else target, layer, method)
    return layers


def error_tiles(learn, dl, predictions, settings, limit=MAX_TILES):
    """The misclassified images, highest loss first, each with the heatmaps of the predicted and of the true class.

    GradCAM replaces methods that take a pass for every channel, which would take days for thousands of errors. A
    method that explains no class gives one heatmap per image.
    """
    positions = predictions.errors[:limit]
    method = "GradCAM" if settings.cam_method in PER_CHANNEL else settings.cam_method
    layer, (x, images) = check_layers(learn, settings.cam_layer, method)[0], images_at(dl, positions)
    by_predicted = gradcam(learn, x, predictions.predicted[positions], layer, method)
    by_true = gradcam(learn, x, predictions.targets[positions], layer, method) if by_predicted.explains_class else None
    numbers = predictions.confidence[positions], predictions.losses[positions]
    maps = by_predicted.maps, by_true and by_true.maps, by_predicted.negligible, by_true and by_true.negligible
    caption = "{} of {}, {} x {} pixels".format(method, layer, *by_predicted.map_size)
    return Tiles(images, predictions.indices[positions], *predictions.names_at(positions), *numbers, *maps, caption)


def export(learn, path):
    """What `Learner.export` writes, atomically and without this machine's paths; it is a pickle and can run code."""
    attributes, buffer = (learn.path, learn.dls, learn.opt), io.BytesIO()
    learn._end_cleanup()
    try:
        learn.path, learn.dls, learn.opt = Path("."), learn.dls.new_empty(), None
        torch.save(learn, buffer, cloudpickle, pickle_protocol=2)
    finally:
        learn.path, learn.dls, learn.opt = attributes
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def network_table(learn):
    """The layers of the network by name, with type, output shape (C, H, W) and parameters; totals at the end."""
    model = copy.deepcopy(learn.model).eval()  # a copy has no hooks to remove, and is not compiled
    layers = {name: module for name, module in model.named_modules() if not list(module.children())}
    with torch.no_grad(), hook_outputs(layers.values()) as hooks:
        model(torch.zeros(1, *image_shape(learn.dls), device=next(model.parameters()).device))
    rows = [("layer", "type", "output (C, H, W)", "parameters")]
    for (name, module), output in zip(layers.items(), hooks.stored, strict=True):
        if output is not None and not name.endswith("shortcut"):
            shape, n_parameters = " x ".join(map(str, output.shape[1:])), sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, shape, f"{n_parameters:,}"))
    parameters = list(learn.model.parameters())
    for kind, subset in ("total", parameters), ("trainable", [p for p in parameters if p.requires_grad]):
        rows.append((f"{kind} parameters", "", "", f"{sum(p.numel() for p in subset):,}"))
    width = max(len(name) for name, *_ in rows[1:]) + 2
    return "\n".join(f"{name:<{width}}{kind:<16}{shape:<20}{n:>12}" for name, kind, shape, n in rows)
