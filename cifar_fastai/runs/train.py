"""One run from start to end: data, learner, fit, evaluation, files."""

import json
import os
import random
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cifar_fastai.data.images import DIGITS, load_images
from cifar_fastai.errors import InputError, RunError, check_extra, escaped, printable, reason, renamed
from cifar_fastai.hardware import autocast, choose_device, choose_precision, keep_freed_memory, n_processes, rank
from cifar_fastai.plots.style import save_figure
from cifar_fastai.recipes import resolve_recipe
from cifar_fastai.runs.folder import hold_folder, make_folder, picture_path
from cifar_fastai.runs.results import check_layers, write_results
from cifar_fastai.runs.run import MACHINE, build_run, load_same_images
from cifar_fastai.settings import PLACES, Settings, check_values
from cifar_fastai.training.callbacks import KeepBest
from cifar_fastai.training.checkpoint import Checkpoint, latest_unfinished, load_checkpoint
from cifar_fastai.training.compiling import choose_compile, compile_model
from cifar_fastai.training.distributed import from_first, gathered, meet, one_first, share_training
from cifar_fastai.training.loggers import LOGGERS
from cifar_fastai.training.range_test import check_range, range_test
from cifar_fastai.training.recorder import ConsoleProgress, in_epochs
from cifar_fastai.training.schedule import fit_scheduled
from cifar_fastai.training.signals import StopOnSignal, Stopped, catch_signals

__all__ = ["find_lr", "train"]


def train(recipe="resnet18", resume=None, finish=write_results, **overrides):
    """Train, evaluate and explain one network: the recipe of this name with `overrides`, parameters of `Settings`.

    `resume`: the folder of an interrupted run, or "latest". `finish` gets the trained `Run` and writes its results.
    Returns the run's folder. Raises InputError for what cannot be used, RunError if the run cannot go on, Stopped after
    a signal; every finished epoch is kept, and `resume` continues from there. On a CPU the process keeps the memory
    that it frees from here on. Processes that torchrun or accelerate has started train one network: each of them calls
    `finish`, and the first alone prints and writes.
    """
    with catch_signals(), meet(), ExitStack() as stack:
        folder = from_first(lambda: None if resume is None else _unfinished_run(resume, recipe))
        try:
            run = _resume_run(recipe, overrides, folder, stack) if folder else _start_run(recipe, overrides, stack)
            folder = run.folder
            _print_header(run)
            run.write_config()
            _fit(run)
            finish(run)
            if rank() == 0:
                (folder / "checkpoint.pth").unlink(missing_ok=True)
        except (Stopped, OSError, RuntimeError) as error:
            if folder and os.path.exists(folder / "checkpoint.pth"):
                error.resume = folder
            raise
    return folder


def find_lr(recipe="resnet18", start_lr=1e-5, end_lr=10.0, num_it=100, out=None, **overrides):
    """The range test alone, as a picture in `out` (default: lr_find.png) and as numbers: a RangeTest."""
    check_range(start_lr, end_lr, num_it)
    out = picture_path(out or "lr_find.png")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    settings, overrides = resolve_recipe(recipe, {"lr": "find"} | overrides)
    with catch_signals():
        run = _prepare_run(recipe, settings, overrides, choose_device(settings.device))
        n_train = len(run.learn.dls.train_ds)
        print(f"{settings.network} on {run.images.name}: {num_it} steps of {run.bs} of {n_train:,} train images")
        with run.learn.no_bar(), run.learn.added_cbs(ConsoleProgress()):
            test = range_test(run.learn, start_lr, end_lr, num_it)
    save_figure(test.plot(), out)
    for name, lr in test.suggestions.items():
        print(f"{name:<8} {'-' if lr is None else f'{lr:.3g}'}")
    print(f"picture: {out}")
    return test


def _start_run(recipe, overrides, stack):
    """A new run: everything is checked before its folder is made."""
    settings, overrides = resolve_recipe(recipe, overrides)
    run = _prepare_run(recipe, settings, overrides, choose_device(settings.device))
    run.folder = from_first(lambda: hold_folder(make_folder(recipe, settings.out, run.images.source), stack, "out"))
    return run


def _unfinished_run(resume, recipe):
    """The folder of an interrupted run: `resume` is a path or "latest". InputError where no run can go on."""
    folder = latest_unfinished(recipe=recipe) if str(resume) == "latest" else Path(resume)
    if (folder / "checkpoint.pth").exists():
        return folder
    problem = "no checkpoint.pth in it: no epoch was finished, start again" if folder.is_dir() else "no such folder"
    raise InputError("this run is finished" if (folder / "metrics.json").exists() else problem, resume=str(folder))


def _resume_run(recipe, overrides, folder, stack):
    """A run that goes on from its checkpoint, with the settings it was started with."""
    path = folder / "checkpoint.pth"
    checkpoint = from_first(lambda: load_checkpoint(hold_folder(folder, stack, "resume") / path.name))
    config, original = checkpoint["config"], checkpoint["given"]  # the overrides of the start
    if checkpoint["recipe"] != recipe:
        name = f"the recipe {printable(checkpoint['recipe'])}" if checkpoint["recipe"] else "a notebook"
        raise InputError(f"a run of {name}, not of {recipe}", resume=str(folder))
    try:
        settings = Settings.from_dict(config["parameters"])
        json.dumps([config, original], allow_nan=False)  # as they will be written
        types = config.get("device"), config.get("versions"), config.get("earlier_parts", [])
        if [*map(type, types)] != [str, dict, list]:
            raise ValueError("device, versions or earlier_parts")
    except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not hold the parameters of a run ({reason(error)})") from None
    _refuse_changes(overrides, settings, original | {"out": str(folder)})
    with one_first():
        images = load_same_images(config, settings, overrides.get("data"), exact=True)
    if overrides.get("data") is not None:  # they have moved
        moved = check_values(data=overrides["data"])
        settings, original = replace(settings, **moved), original | moved
    device = choose_device(overrides.get("device") or config["device"])
    # another kind of device may not have the saved precision
    precision = None if str(config["device"]).startswith(device.type) else original.get("precision", "auto")
    run = _prepare_run(recipe, settings, original, device, precision, images)
    if run.bs != settings.bs:
        raise InputError(f"its batches of {settings.bs} do not divide by {n_processes()} processes", resume=str(folder))
    run.folder, run.checkpoint = folder, checkpoint
    run.precision_reason = "as before" if precision is None else run.precision_reason
    run.suggestions = config.get("lr_find")
    if checkpoint["finished_epochs"]:  # nothing is left to compile for
        run.compiled = config.get("compiled", False)
    print(f"going on with {escaped(folder)} after epoch {checkpoint['epoch']} of {settings.epochs}", flush=True)
    return run


def _refuse_changes(overrides, settings, original):
    """InputError for parameters that differ from the run's; `original`: the overrides of its start."""
    values = {name: overrides[name] for name in overrides.keys() - {"device", "data"} if overrides[name] is not None}
    for name, value in check_values(**values).items():
        saved = [getattr(settings, name), original.get(name)]
        if name in PLACES:
            value, saved = os.path.abspath(value), [path and os.path.abspath(path) for path in saved]
        if value not in saved:
            message = f"this run has {saved[0]}; with `resume` only `device` and `data` may be set"
            raise InputError(message, **{name: overrides[name]})


def _prepare_run(recipe, settings, overrides, device, precision=None, images=None):
    """A `Run` with data and learner, without a folder. `images`: those of a resumed run, else what `data` names."""
    precision, precision_reason = choose_precision(precision or settings.precision, device)
    for name in settings.loggers:  # before the training, not after it
        check_extra(name, name)
    if device.type == "cpu":
        keep_freed_memory()
    with one_first():
        images = images or load_images(settings.data, size=settings.size)
    if n_processes() > 1 and len({*gathered(images.fingerprint)}) > 1:
        raise InputError("the processes do not find the same images there", data=settings.data)
    if images.note:
        print(f"\n*** {images.note} ***\n", flush=True)
    if settings.data == "auto" and images.name == DIGITS:  # the run's own command, and a resumed run, use them again
        settings, overrides = replace(settings, data=DIGITS), overrides | {"data": DIGITS}
    for set_seed in random.seed, np.random.seed, torch.manual_seed:
        set_seed(settings.seed)
    run = build_run(recipe, settings, overrides, images, device, precision, precision_reason)
    if settings.cam_layer:  # before the training, not after it
        with renamed(layer="cam_layer"):
            check_layers(run.learn, settings.cam_layer, settings.cam_method)
    n_images = settings.epochs * len(run.learn.dls.train) * run.bs
    run.compiled, run.compile_reason = choose_compile(settings.compile, device, n_images)
    is_small = run.bs < 64 * n_processes()  # each process's share
    run.sync_bn = n_processes() > 1 and (settings.sync_bn == "yes" or settings.sync_bn == "auto" and is_small)
    if run.sync_bn:
        run.compiled, run.compile_reason = False, "batch norm is synchronised"
    return run


def _print_header(run):
    s, dls, images = run.settings, run.learn.dls, run.images
    name = f"{s.network} (preset {s.preset})" if s.preset else s.network
    sizes = f"{len(dls.train_ds):,} train and {len(dls.valid_ds):,} {run.eval_split} images"
    lowered = f" ({s.lr:g} lowered with the batch size, {run.bs} of {s.bs})" if run.lr != s.lr != "find" else ""
    lr = "from a range test" if run.lr == "find" else f"{run.lr:.3g}{lowered}"
    compiled = "compiled" if run.compiled else "not compiled"
    classes, parameters = len(images.classes), run.n_parameters
    print(f"{name} on {images.name}: {sizes} of {classes} classes; {parameters:,} parameters")
    resized = f", of {s.size} x {s.size} pixels (the shorter side resized, the centre cut)" if s.size else ""
    print(f"images: {images.source}{resized}")
    print(f"{run.machine[0]}: {run.precision} ({run.precision_reason}), {compiled} ({run.compile_reason})")
    if run.checkpoint and (changes := _machine_changes(run)):
        print(f"the last digits may differ from those of a run in one piece: {changes}")
    n, norms = n_processes(), ", batch norm over all" if run.sync_bn else ""
    steps = f"{len(dls.train)} steps of {run.bs}" + (f", {n} processes x {run.bs // n}{norms}" if n > 1 else "")
    print(f"{in_epochs(s.epochs)} of {steps}; {s.opt}, {s.sched}, lr {lr}; seed {s.seed}")
    print(f"files: {escaped(run.folder)}", flush=True)


def _machine_changes(run):
    """How hardware, software and compilation differ from those of the epochs before, in words."""
    then, now = ({name: config.get(name) for name in MACHINE} for config in (run.checkpoint["config"], run.config))
    versions = [values.pop("versions") or {} for values in (then, now)]
    then, now = then | versions[0], now | versions[1]
    changes = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    return escaped("; ".join(changes))


def _fit(run):
    """Train what is left to train; afterwards the model holds the weights that are evaluated."""
    history = run.history
    history.path, history.eval_split, history.verbose = run.folder / "history.csv", run.eval_split, True
    try:
        return _train(run)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    bs = _fitting_bs(run)  # outside the handler, where nothing holds the tensors of the failed step
    hint = f"try `bs` {bs}, which fits" if bs else "not even one image fits, try `device` cpu"
    raise RunError(f"too large for the memory of {run.machine[0]}; {hint}", bs=run.bs)


def _train(run):
    s, learn, checkpoint = run.settings, run.learn, run.checkpoint
    if run.compiled and not (checkpoint and checkpoint["finished_epochs"]):
        _compile(run)
    with learn.no_logging(), learn.no_bar(), share_training(learn, run.sync_bn):
        if run.lr == "find":
            _find_lr(run)
        meta = dict(config=run.config, given=run.overrides, recipe=run.recipe, fingerprint=run.images.fingerprint)
        cbs = [Checkpoint(run.folder / "checkpoint.pth", meta, checkpoint), StopOnSignal(), ConsoleProgress()]
        if s.save_best or s.patience:
            cbs.append(KeepBest(run.folder / "best.pth" if s.save_best else None, s.patience))
        if rank() == 0:
            cbs += [LOGGERS[name](run.folder, run.parameters) for name in s.loggers]
        fit_scheduled(learn, s, run.lr, cbs)


def _is_out_of_memory(error):
    """torch has a class for CUDA's errors; those of the CPU and of Apple's GPU are RuntimeErrors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error).lower() for text in ("out of memory", "can't allocate memory"))


def _fitting_bs(run):
    """The largest of a half, a quarter, ... of the batch size with which a training step fits; None if none does."""
    learn, bs = run.learn, run.bs // n_processes() // 2  # each process's share
    while bs:
        learn._end_cleanup()
        learn.loss_grad = None
        learn.model.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with autocast(run.device, run.precision):
                images = torch.zeros(bs, *run.images.images.shape[1:], device=run.device)
                out = learn.model.train().forward(images)  # (bs, classes)
            F.cross_entropy(out.float(), torch.zeros(bs, dtype=torch.long, device=run.device)).backward()
            return bs * n_processes()
        except (MemoryError, RuntimeError):
            bs //= 2


def _compile(run):
    start, shape = time.perf_counter(), (run.bs // n_processes(), *run.images.images.shape[1:])
    batch = torch.zeros(shape, device=run.device)  # as in training
    failure = compile_model(run.learn.model, batch, autocast(run.device, run.precision))
    run.compiled = not failure
    run.write_config()
    winograd = ", with Winograd's convolutions" if (run.device.type, run.precision) == ("cpu", "fp32") else ""
    print(failure or f"compiled in {time.perf_counter() - start:.0f} s{winograd}", flush=True)


def _find_lr(run):
    """Take the learning rate from a range test, keep its picture, and write the number into config.json."""
    print(f"range test of 100 steps of {run.bs}", flush=True)
    with run.learn.added_cbs(ConsoleProgress()):
        test = range_test(run.learn)
    save_figure(test.plot(), run.folder / "lr_find.png")
    rule = run.settings.lr_suggest
    if test.suggestions[rule] is None:
        raise RunError(f"the range test gives no {rule}; try another `lr_suggest`, or set `lr`")
    run.lr, run.suggestions = test.suggestions[rule], test.suggestions
    run.write_config()
    print(f"lr {run.lr:.3g}: the {rule} of the range test", flush=True)
