"""What a finished run leaves: its numbers, predictions, weights, pictures and page."""

import errno
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from fastai.torch_core import TensorImage

from cifar_fastai.data.loaders import reported_dl
from cifar_fastai.evaluation.gradcam import default_layer, gradcam
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.files import atomic_write, write_json
from cifar_fastai.names import CLASSLESS, PER_CHANNEL
from cifar_fastai.plots.charts import (
    plot_class_accuracy,
    plot_confusion_matrix,
    plot_curves,
    plot_schedule,
    save_figure,
)
from cifar_fastai.plots.galleries import plot_augmentations, plot_gradcam, plot_tiles
from cifar_fastai.report.page import Tiles, write_report
from cifar_fastai.training.checkpoint import save_torch
from cifar_fastai.training.history import in_epochs

__all__ = ["augmentation_columns", "check_layers", "error_tiles", "export", "network_table", "write_results"]

N_VIEWS = 6  # that predict runs for these three: the image, its mirror image, both moved two ways
MAX_TILES = 4000  # errors that are explained; the page keeps as many of the worst as fit its size


def write_results(run):
    """Evaluate `run.learn` and write everything that a run's folder holds beside its history."""
    learn, cfg, folder = run.learn, run.cfg, run.folder
    with learn.no_bar():
        split, dl = reported_dl(learn.dls, cfg.valid_pct, cfg.no_test)
        print(f"\nevaluating {len(dl.dataset):,} {split} images, {N_VIEWS} views of each", flush=True)
        began = time.perf_counter()
        plain, flip, shift = predict(learn, dl, tta=(None, "flip", "shift"))
        one_pass = (time.perf_counter() - began) / N_VIEWS
        plain.to_csv(folder / "predictions.csv")
        save_torch(folder / "model.pth", learn.model.state_dict())
        export(learn, folder / "learner.pkl")
        n_errors = min(len(plain.errors), MAX_TILES)
        print(f"drawing, and explaining {n_errors:,} errors", flush=True)
        began = time.perf_counter()
        pictures = _draw(run, plain, dl, split)
        tiles = error_tiles(learn, dl, plain, cfg)
        for name, figure in pictures.items():
            save_figure(figure, folder / f"{name}.png")
        if run.tensorboard:
            run.tensorboard.add_pictures(pictures)
        with atomic_write(folder / "summary.txt") as file:
            file.write(network_table(learn) + "\n")
        metrics = _metrics(run, plain, flip, shift, split)
        write_json(folder / "metrics.json", metrics)
        write_report(folder, tiles)
        explaining = time.perf_counter() - began
    _print_results(run, metrics, plain, split)
    print(
        f"explained {len(tiles.indices):,} of {len(plain.errors):,} errors in {explaining:.0f} s, "
        f"{explaining / one_pass:.1f} times one pass over the {split} images"
    )
    print(f"all of it on one page: {folder / 'report.html'}", flush=True)


def _metrics(run, plain, flip, shift, split):
    cfg, last = run.cfg, run.log.rows[-1]
    on_test = split == "test"
    seconds = sum(row["seconds"] for row in run.log.rows)
    return {
        "dataset": run.images.name,
        "model": cfg.model,
        "parameters": run.n_parameters,
        "epochs": len(run.log.rows),
        "seed": cfg.seed,
        "device": run.config["device"],
        "hardware": run.config["hardware"],
        "precision": cfg.precision,
        "eval_split": run.eval_split,
        "train_accuracy": last["train_accuracy"],
        "valid_accuracy": last["valid_accuracy"],
        "valid_loss": last["valid_loss"],
        "test_accuracy": plain.accuracy if on_test else None,
        "tta_accuracy": flip.accuracy,
        "tta_shift_accuracy": shift.accuracy,
        "class_accuracy": plain.class_accuracy,
        "images_per_second": float(np.median([row["images_per_second"] for row in run.log.rows])),
        "seconds": seconds,
    }


def _print_results(run, metrics, plain, split):
    print(f"\n{run.images.name}, {split} accuracy by class")
    for name, accuracy in plain.class_accuracy.items():
        print(f"  {name:<16} {'no images' if accuracy is None else f'{accuracy:>7.2%}'}")
    print(f"{split} accuracy {plain.accuracy:.2%} ({len(plain.targets):,} images, {in_epochs(metrics['epochs'])})")
    wrong = "" if run.images.flip else " (their mirror images mean something else)"
    print(f"with flip TTA {metrics['tta_accuracy']:.2%}{wrong}")
    print(f"with flip and shift TTA {metrics['tta_shift_accuracy']:.2%}")


def _draw(run, predictions, dl, split):
    """Every picture of the run, by the name of its file."""
    cfg, log, dls = run.cfg, run.log, run.learn.dls
    pictures = {
        "curves": plot_curves(log.rows, run.eval_split),
        "augmentations": plot_augmentations(augmentation_columns(dls)),
        "class_accuracy": plot_class_accuracy(predictions.class_accuracy, predictions.accuracy),
        "confusion_matrix": plot_confusion_matrix(predictions.confusion_matrix, predictions.classes),
    }
    if log.lrs:
        pictures["schedule"] = plot_schedule(log.lrs, log.moms, len(dls.train))
    wrong, worst = predictions.misclassified(cfg.n_images), predictions.top_losses(cfg.n_images)
    pictures["misclassified"] = _tiles(dl, predictions, wrong, cfg.n_cols, f"Misclassified {split} images")
    pictures["top_losses"] = _tiles(dl, predictions, worst, cfg.n_cols, f"Highest losses on the {split} images")
    layers = chosen_layers(run.learn, cfg)
    x = normalised(dl, wrong)
    explained = predictions.predicted if cfg.cam_target == "predicted" else predictions.targets
    heat = [gradcam(run.learn, x, explained[wrong], layer, cfg.cam_method) for layer in layers]
    pictures["gradcam"] = plot_gradcam(
        pixels(dl, wrong),
        heat,
        *class_names(predictions, wrong),
        predictions.confidence[wrong],
        alpha=cfg.cam_alpha,
        classes=predictions.classes,
    )
    return pictures


def chosen_layers(learn, cfg):
    """The layers that --cam-layer names, separated by commas, or the default one."""
    return [name.strip() for name in cfg.cam_layer.split(",")] if cfg.cam_layer else [default_layer(learn)]


def check_layers(learn, cfg):
    """InputError where --cam-layer names what is no layer or has too small a map: before the training, not after it."""
    if cfg.cam_layer:
        for layer in chosen_layers(learn, cfg):
            gradcam(learn, torch.zeros(0, 3, 32, 32), [], layer, cfg.cam_method)


def class_names(predictions, chosen):
    """True and predicted class names of the chosen positions."""
    names = np.array(predictions.classes, dtype=object)
    return list(names[predictions.targets[chosen]]), list(names[predictions.predicted[chosen]])


def _tiles(dl, predictions, chosen, n_cols, title):
    true, predicted = class_names(predictions, chosen)
    return plot_tiles(
        pixels(dl, chosen),
        true,
        predicted,
        predictions.confidence[chosen],
        predictions.losses[chosen],
        n_cols=n_cols,
        title=title,
    )


def pixels(dl, chosen):
    """The images at positions `chosen` of the loader's split: uint8 (K, H, W, 3)."""
    if len(chosen) == 0:
        return np.zeros((0, 32, 32, 3), np.uint8)
    rows = np.asarray(list(dl.dataset.items))[np.asarray(chosen)]
    return np.ascontiguousarray(dl.dataset.tls[0].tfms.fs[0].store.images[rows].transpose(0, 2, 3, 1))


def normalised(dl, chosen):
    """The same images as the model gets them: float (K, 3, H, W) on the loader's device."""
    images = torch.from_numpy(pixels(dl, chosen)).permute(0, 3, 1, 2).to(dl.device)  # (K, 3, H, W)
    dl.after_batch.split_idx = 1
    return dl.after_batch((TensorImage(images),))[0].as_subclass(torch.Tensor)


def augmentation_columns(dls, n=6):
    """The same `n` train images after each train-time transform alone and after all: {title: uint8 (n, H, W, 3)}."""
    dl = dls.train
    step = max(1, len(dl.dataset) // n)
    original = pixels(dl, list(range(0, len(dl.dataset), step))[:n])
    tfms = list(dl.after_batch.fs)
    always = [tfm for tfm in tfms if getattr(tfm, "split_idx", None) != 0 and not hasattr(tfm, "before_call")]
    drawn = [tfm for tfm in tfms if tfm not in always]

    def show(chosen):
        x = TensorImage(torch.from_numpy(original).permute(0, 3, 1, 2).to(dl.device))  # (n, 3, H, W)
        used = [tfm for tfm in tfms if tfm in always or tfm in chosen]
        for tfm in used:
            x = tfm(x, split_idx=0)
        for tfm in reversed(used):
            x = tfm.decode(x) if tfm in always else x
        return x.as_subclass(torch.Tensor).cpu().numpy().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)

    columns = {"original": original}
    for tfm in drawn:
        columns[_title(tfm)] = show([tfm])
    columns["all"] = show(drawn)
    return columns


def _title(tfm):
    name = type(tfm).__name__
    return "vertical RandomFlip" if getattr(tfm, "vertical", False) else name


def error_tiles(learn, dl, predictions, cfg, limit=MAX_TILES):
    """The misclassified images, worst loss first, each with the heatmaps of the predicted and of the true class.

    GradCAM stands in for a method that takes a pass for every channel: over thousands of errors that is days. One that
    explains no class gives one heatmap an image.
    """
    chosen = predictions.errors[:limit]
    method = "GradCAM" if cfg.cam_method in PER_CHANNEL else cfg.cam_method
    layer, x = chosen_layers(learn, cfg)[0], normalised(dl, chosen)
    by_predicted = gradcam(learn, x, predictions.predicted[chosen], layer, method)
    by_true = None if method in CLASSLESS else gradcam(learn, x, predictions.targets[chosen], layer, method)
    height, width = by_predicted.map_size
    true, predicted = class_names(predictions, chosen)
    return Tiles(
        images=pixels(dl, chosen),
        indices=predictions.indices[chosen],
        targets=true,
        predicted=predicted,
        confidence=predictions.confidence[chosen],
        losses=predictions.losses[chosen],
        cam_predicted=by_predicted.maps,
        cam_true=by_true and by_true.maps,
        negligible_predicted=by_predicted.negligible,
        negligible_true=by_true and by_true.negligible,
        caption=f"{method} of {layer}, {height} x {width} pixels",
    )


def export(learn, path):
    """`Learner.export`, atomically and without this machine's paths; the file is fastai's own and can run code."""
    path = Path(path)
    part = path.with_name(f".{path.name}.tmp")
    old = learn.path, learn.dls, learn.opt
    try:
        learn.path = Path(".")
        learn.export(part.absolute())
        os.replace(part, path)
    except RuntimeError as error:
        if not re.search("inline_container|[Ww]rit|irectory", str(error)):  # torch's writer, of a full or vanished disk
            raise
        raise OSError(errno.EIO, "cannot be written, is the disk full?", str(path)) from None
    finally:
        learn.path, learn.dls, learn.opt = old  # fastai's export puts the two back only where it succeeds
        part.unlink(missing_ok=True)


def network_table(learn):
    """The layers of the network with output shape and parameters, totals at the end."""
    rows, hooks = [], []

    def note(name, module):
        def hook(module, inputs, output):
            own = sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, tuple(output.shape[1:]), own))

        return module.register_forward_hook(hook)

    model = learn.model
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    training = model.training
    try:
        hooks = [
            note(name, module)
            for name, module in model.named_modules()
            if not list(module.children()) and not (name.endswith("shortcut"))
        ]
        device = next(model.parameters()).device
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        model._compiled_call_impl = compiled
    width = max(len(name) for name, *_ in rows) + 2
    lines = [f"{'layer':<{width}}{'type':<16}{'output (C, H, W)':<20}{'parameters':>12}"]
    for name, kind, shape, own in rows:
        lines.append(f"{name:<{width}}{kind:<16}{' x '.join(map(str, shape)):<20}{own:>12,}")
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return "\n".join(
        [
            *lines,
            f"{'total parameters':<{width + 36}}{total:>12,}",
            f"{'trainable parameters':<{width + 36}}{trainable:>12,}",
        ]
    )
