"""One run from start to end: the story that every recipe tells."""

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from cifar_fastai.config import resolve
from cifar_fastai.data.images import load_images
from cifar_fastai.errors import InputError, RunError, reason
from cifar_fastai.files import lock_folder, remove_leftovers, write_json
from cifar_fastai.hardware import autocast, choose_device, choose_precision, keep_freed_memory
from cifar_fastai.plots.charts import plot_lr_find, save_figure
from cifar_fastai.runs.folder import learner_for, make_folder, run_config
from cifar_fastai.runs.results import check_layers, write_results
from cifar_fastai.runs.resume import resume_command, run_to_resume, saved_run
from cifar_fastai.training.checkpoint import Checkpoint, set_random_states
from cifar_fastai.training.compiling import choose_compile, compile_model
from cifar_fastai.training.history import History, in_epochs
from cifar_fastai.training.loggers import TensorBoardLog
from cifar_fastai.training.progress import ConsoleProgress
from cifar_fastai.training.range_test import range_test
from cifar_fastai.training.recorder import DeviceProgress
from cifar_fastai.training.runlog import KeepBest, RunLog, StopWaiting
from cifar_fastai.training.schedule import fit_scheduled
from cifar_fastai.training.signals import StopOnSignal, Stopped, catch_signals

__all__ = ["find_lr", "train"]


def train(recipe, given, finish=None):
    """Train, evaluate and explain one network as `recipe` (a Recipe) and `given` (a dict of parameters) say.

    `finish` takes the trained run and by default writes all that a run's folder holds. Returns the folder. InputError
    for what cannot be, RunError for what went wrong, Stopped by a signal; up to the last finished epoch all is kept,
    and `--resume` goes on from there. On a CPU the process keeps, from here on, the memory that it frees.
    """
    with catch_signals(), ExitStack() as stack:
        folder = None if given.get("resume") is None else run_to_resume(given["resume"])
        try:
            run = _new(recipe, given, stack) if folder is None else _resumed(recipe, given, folder, stack)
            folder = run.folder
            _fit(run)
            (finish or write_results)(run)
            (folder / "checkpoint.pth").unlink(missing_ok=True)
        except (Stopped, OSError) as error:
            if folder is not None and os.path.exists(folder / "checkpoint.pth"):
                error.resume = resume_command(recipe.name, folder)
            raise
    return folder


def find_lr(recipe, given, start_lr=1e-5, end_lr=10.0, num_it=100):
    """The range test alone, as a picture in `--out` (lr_find.png by default) and as numbers; the RangeTest."""
    if not 0 < start_lr < end_lr < float("inf"):
        raise InputError(f"--start-lr {start_lr:g}, --end-lr {end_lr:g}: the first must lie between 0 and the second")
    if num_it < 20:
        raise InputError(f"--num-it {num_it}: give at least 20 steps")
    out = Path(given.get("out") or "lr_find.png")
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: give a file name that ends in .png, in a folder that exists")
    if given.get("resume"):
        raise InputError("--resume: a range test takes seconds and is done anew; resume goes with the other recipes")
    cfg = resolve(recipe, {name: value for name, value in given.items() if name != "out"})
    cfg.given = _given(cfg, given)
    with catch_signals():
        run = _prepared(recipe.name, cfg, choose_device(cfg.device))
        train = run.learn.dls.train
        print(f"{cfg.model} on {run.images.name}: {num_it} steps of {cfg.bs} of {len(train.dataset):,} train images")
        with _bare(run.learn), run.learn.added_cbs(ConsoleProgress()):
            found = range_test(run.learn, start_lr, end_lr, num_it)
    save_figure(plot_lr_find(found.lrs, found.losses, found.suggestions), out)
    for name, lr in found.suggestions.items():
        print(f"{name:<8} {'-' if lr is None else f'{lr:.3g}'}")
    print(f"picture: {out}")
    return found


def _given(cfg, given):
    """The resolved values of what was set at all; 0 is."""
    return {name: getattr(cfg, name) for name, value in given.items() if value is not None and value is not False}


def _new(recipe, given, stack):
    """A run that starts: everything is checked before its folder is made."""
    cfg = resolve(recipe, given)
    cfg.given = _given(cfg, given)
    run = _prepared(recipe.name, cfg, choose_device(cfg.device))
    run.folder = make_folder(recipe.name, cfg.out)
    if not stack.enter_context(lock_folder(run.folder)):
        raise InputError(f"--out {run.folder}: another run is going on there; give another folder")
    _print_header(run)
    write_json(run.folder / "config.json", run.config)
    return run


def _resumed(recipe, given, folder, stack):
    """A run that goes on from its checkpoint, with the parameters it was started with."""
    if not stack.enter_context(lock_folder(folder)):
        raise InputError(f"--resume {folder}: this run is going on, in another process")
    saved, cfg = saved_run(folder, recipe.name, given)
    device = choose_device(given.get("device") or saved["config"]["device"])
    if not str(saved["config"]["device"]).startswith(device.type):  # what was chosen there may not be had here
        cfg.precision = saved["given"].get("precision", "auto")
    run = _prepared(recipe.name, cfg, device, fingerprint=saved["fingerprint"])
    compiled = {"compiled": saved["config"].get("compiled", False)}  # also where no epoch is left to compile for
    run.folder, run.saved, run.config = folder, saved, saved["config"] | run.config | compiled
    try:
        run.learn.model.load_state_dict(saved["model"])
    except Exception as error:
        raise InputError(f"{folder / 'checkpoint.pth'}: does not fit the network ({reason(error)})") from None
    remove_leftovers(folder)
    print(f"going on with {folder} after epoch {saved['epoch']} of {cfg.epochs}", flush=True)
    _print_header(run)
    write_json(folder / "config.json", run.config)
    return run


def _prepared(name, cfg, device, fingerprint=None):
    """Data, learner and what is decided about them, for a run called `name`."""
    precision, why_precision = choose_precision(cfg.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    images = load_images(cfg.data)
    if images.note:
        print(f"\n*** {images.note} ***\n", flush=True)
    if fingerprint not in (None, images.fingerprint):
        raise InputError(f"{images.source}: the images have changed since the run began; it needs the same ones")
    _seed(cfg.seed)
    cfg.precision = precision
    learn = learner_for(cfg, images, device)
    check_layers(learn, cfg)
    n_images = cfg.epochs * len(learn.dls.train) * cfg.bs
    compiled, why_compile = choose_compile(cfg.compile, device, n_images)
    config = run_config(name, cfg, images, learn)
    return SimpleNamespace(
        name=name,
        cfg=cfg,
        images=images,
        learn=learn,
        device=device,
        config=config,
        saved=None,
        folder=None,
        why_precision=why_precision,
        compiled=compiled,
        why_compile=why_compile,
        started=time.perf_counter(),
        n_parameters=sum(p.numel() for p in learn.model.parameters()),
        eval_split=config["eval_split"],
    )


def _seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _print_header(run):
    cfg, images, train = run.cfg, run.images, run.learn.dls.train
    split = f"{len(run.learn.dls.valid_ds):,} {run.eval_split}"
    peak = "found by a range test" if cfg.lr == "find" else f"{cfg.lr:g}"
    print(
        f"{cfg.model} on {images.name}: {len(train.dataset):,} train and {split} images of {len(images.classes)} "
        f"classes; {run.n_parameters:,} parameters"
    )
    print(f"images: {images.source}")
    print(
        f"{run.config['hardware']}: {cfg.precision} ({run.why_precision}), "
        f"{'compiled' if run.compiled else 'not compiled'} ({run.why_compile})"
    )
    print(
        f"{in_epochs(cfg.epochs)} of {len(train)} steps of {cfg.bs}; {cfg.opt}, {cfg.sched}, lr {peak}; seed {cfg.seed}"
    )
    print(f"files: {run.folder}", flush=True)


def _fit(run):
    """Train what is left to train; afterwards the model holds the weights that are evaluated."""
    cfg, saved = run.cfg, run.saved
    log = run.log = RunLog(run.folder / "history.csv", run.eval_split, saved["rows"] if saved else ())
    run.tensorboard = TensorBoardLog(run.folder / "tensorboard") if cfg.tensorboard else None
    if saved:
        log.lrs, log.moms = list(saved["lrs"]), list(saved["moms"])
        log.write()
        if saved["finished_epochs"]:
            run.learn.model.load_state_dict(saved["callbacks"].get("ema", saved)["model"])
            set_random_states(saved["random"], run.learn.dls)
            return
    try:
        _train(run)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    else:
        return
    fits = _fitting_bs(run)  # out here, where nothing holds the tensors of the step that failed
    hint = f"try --bs {fits}, which fits" if fits else "not even one image fits, try --device cpu"
    raise RunError(f"--bs {cfg.bs}: too large for the memory of {run.config['hardware']}; {hint}")


def _train(run):
    cfg, learn, saved = run.cfg, run.learn, run.saved
    if run.compiled:
        _compile(run)
    meta = {"config": run.config, "given": cfg.given, "recipe": run.name, "fingerprint": run.images.fingerprint}
    cbs = [run.log, Checkpoint(run.folder / "checkpoint.pth", meta, saved), StopOnSignal(), ConsoleProgress()]
    if cfg.save_best or cfg.patience:
        cbs += [KeepBest(run.folder / "best.pth" if cfg.save_best else None, cfg.patience), StopWaiting()]
    if run.tensorboard:
        cbs.append(run.tensorboard)
    with learn.no_logging(), _bare(learn):
        if cfg.lr == "find":
            _find_lr(run)
        run.log.print_header()
        fit_scheduled(learn, cfg, cfg.lr, cbs, start_epoch=saved["epoch"] if saved else 0)


def _bare(learn):
    """Without what notebooks see. The bar floods a log, and fastai's own `no_bar` puts another one in its place."""
    return learn.removed_cbs(learn._grab_cbs((DeviceProgress, History)))


def _is_out_of_memory(error):
    """torch has a class for CUDA's alone; the CPU's and Apple's come as RuntimeError."""
    words = str(error).lower()
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "out of memory" in words or "can't allocate memory" in words


def _fitting_bs(run):
    """The largest of a half, a quarter, ... of the batch size with which a training step fits; None if none does."""
    learn, bs = run.learn, run.cfg.bs // 2
    while bs:
        learn._end_cleanup()
        learn.loss_grad = None
        learn.model.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with autocast(run.device, run.cfg.precision):
                out = learn.model.train().forward(torch.zeros(bs, 3, 32, 32, device=run.device))  # (bs, classes)
            F.cross_entropy(out.float(), torch.zeros(bs, dtype=torch.long, device=run.device)).backward()
            return bs
        except (MemoryError, RuntimeError):
            bs //= 2


def _compile(run):
    began = time.perf_counter()
    batch = torch.zeros(run.cfg.bs, 3, 32, 32, device=run.device)  # as training gives them
    failed = compile_model(run.learn.model, batch, autocast(run.device, run.cfg.precision))
    run.config["compiled"] = not failed
    write_json(run.folder / "config.json", run.config)
    winograd = ", with Winograd's convolutions" if (run.device.type, run.cfg.precision) == ("cpu", "fp32") else ""
    print(failed or f"compiled in {time.perf_counter() - began:.0f} s{winograd}", flush=True)


def _find_lr(run):
    """Take the learning rate from a range test, keep its picture, and write the number into config.json."""
    cfg = run.cfg
    print(f"range test of 100 steps of {cfg.bs}", flush=True)
    with run.learn.added_cbs(ConsoleProgress()):
        found = range_test(run.learn)
    save_figure(plot_lr_find(found.lrs, found.losses, found.suggestions), run.folder / "lr_find.png")
    cfg.lr = found.suggestions[cfg.lr_suggest]
    if cfg.lr is None:
        raise RunError(f"--lr find: the range test gives no {cfg.lr_suggest}; try --lr-suggest valley, or give --lr")
    run.config["parameters"]["lr"] = cfg.lr
    run.config["lr_find"] = found.suggestions
    write_json(run.folder / "config.json", run.config)
    print(f"lr {cfg.lr:.3g}: the {cfg.lr_suggest} of the range test", flush=True)
