"""One run from start to end: the story that every recipe tells."""

import random
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from cifar_fastai.checkpoint import Checkpoint, latest_unfinished, load_checkpoint
from cifar_fastai.compiling import choose_compile, compile_model
from cifar_fastai.config import BASE, resolve
from cifar_fastai.data import load_images
from cifar_fastai.errors import InputError, RunError
from cifar_fastai.files import write_json
from cifar_fastai.loaders import test_dl
from cifar_fastai.lr_finder import range_test
from cifar_fastai.outputs import write_results
from cifar_fastai.plots import plot_lr_find, save_figure
from cifar_fastai.precision import choose_device, choose_precision
from cifar_fastai.progress import ConsoleProgress
from cifar_fastai.recorder import DeviceProgress
from cifar_fastai.runlog import KeepBest, RunLog, StopWaiting
from cifar_fastai.runs import describe_machine, learner_for, make_folder, versions
from cifar_fastai.schedule import fit_scheduled
from cifar_fastai.signals import StopOnSignal, Stopped, catch_signals
from cifar_fastai.tensorboard import TensorBoardLog

__all__ = ["find_lr", "train"]


def train(recipe, given):
    """Train, evaluate and explain one network as `recipe` (a Recipe) and `given` (a dict of parameters) say.

    Returns the run's folder. InputError for what cannot be, RunError for what went wrong, Stopped by a signal; up to
    the last finished epoch all is kept, and `--resume` goes on from there.
    """
    with catch_signals():
        run = _resumed(given) if given.get("resume") else _new(recipe, given)
        try:
            _fit(run)
            write_results(run)
        except Stopped as stop:
            if (run.folder / "checkpoint.pth").exists():
                stop.resume = f"python recipes/{run.name}.py --resume {shlex.quote(str(run.folder))}"
            raise
        (run.folder / "checkpoint.pth").unlink(missing_ok=True)
    return run.folder


def find_lr(recipe, given, start_lr=1e-5, end_lr=10.0, num_it=100):
    """The range test alone, as a picture in `--out` (lr_find.png by default) and as numbers; the RangeTest."""
    if not 0 < start_lr < end_lr < float("inf"):
        raise InputError(f"--start-lr {start_lr:g}, --end-lr {end_lr:g}: the first must be above 0 and below the second")
    if num_it < 20:
        raise InputError(f"--num-it {num_it}: give at least 20 steps")
    out = Path(given.get("out") or "lr_find.png")
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: give a file name that ends in .png, in a folder that exists")
    cfg = resolve(recipe, {name: value for name, value in given.items() if name != "out"})
    cfg.given = {name: value for name, value in given.items() if value not in (None, False)}
    with catch_signals():
        run = _prepared(recipe.name, cfg, choose_device(cfg.device))
        train = run.learn.dls.train
        print(f"{cfg.model} on {run.images.name}: {num_it} steps of {cfg.bs} of {len(train.dataset):,} train images")
        found = range_test(run.learn, start_lr, end_lr, num_it)
    save_figure(plot_lr_find(found.lrs, found.losses, found.suggestions), out)
    for name, lr in found.suggestions.items():
        print(f"{name:<8} {'-' if lr is None else f'{lr:.3g}'}")
    print(f"picture: {out}")
    return found


def _new(recipe, given):
    """A run that starts: everything is checked before its folder is made."""
    cfg = resolve(recipe, given)
    cfg.given = {name: value for name, value in given.items() if value not in (None, False)}
    run = _prepared(recipe.name, cfg, choose_device(cfg.device))
    run.folder = make_folder(recipe.name, cfg.out)
    _print_header(run)
    write_json(run.folder / "config.json", run.config)
    return run


def _resumed(given):
    """A run that goes on from its checkpoint, with the parameters it was started with."""
    folder = latest_unfinished() if given["resume"] == "latest" else Path(given["resume"])
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: no such folder")
    if not (folder / "checkpoint.pth").exists():
        if (folder / "metrics.json").exists():
            raise InputError(f"--resume {folder}: this run is finished")
        raise InputError(f"--resume {folder}: holds no checkpoint.pth; no epoch was finished, start it anew")
    saved = load_checkpoint(folder / "checkpoint.pth")
    cfg = SimpleNamespace(**saved["config"]["parameters"])
    for name, value in given.items():
        if value in (None, False) or name in ("resume", "device", "debug"):
            continue
        if value != getattr(cfg, name) and str(value) != str(getattr(cfg, name)):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: this run has {flag} {getattr(cfg, name)}; "
                             "beside --resume only --device may be given")  # fmt: skip
    cfg.given = saved["given"]
    device = choose_device(given.get("device") or saved["config"]["device"])
    run = _prepared(saved["recipe"], cfg, device, fingerprint=saved["fingerprint"])
    run.folder, run.saved = folder, saved
    run.learn.model.load_state_dict(saved["model"])
    print(f"going on with {folder} after epoch {saved['epoch']} of {cfg.epochs}", flush=True)
    _print_header(run)
    return run


def _prepared(name, cfg, device, fingerprint=None):
    """Data, learner and what is decided about them, for a run called `name`."""
    precision, why_precision = choose_precision(cfg.precision, device)
    images = load_images(cfg.data)
    if fingerprint not in (None, images.fingerprint):
        raise InputError(f"{images.source}: the images have changed since the run began; it needs the same ones")
    if images.note:
        print(f"\n*** {images.note} ***\n", flush=True)
    _seed(cfg.seed)
    cfg.precision = precision
    learn = learner_for(cfg, images, device)
    n_images = cfg.epochs * len(learn.dls.train) * cfg.bs
    compiled, why_compile = choose_compile(cfg.compile, device, precision, n_images)
    parameters = {key: getattr(cfg, key) for key in BASE if key not in ("resume", "debug")}
    config = {
        "recipe": name, "given": cfg.given, "parameters": parameters, "data_name": images.name,
        "data_source": images.source, "data_fingerprint": images.fingerprint, "classes": list(images.classes),
        "train_images": len(learn.dls.train_ds), "device": str(device), "hardware": describe_machine(device),
        "precision": precision, "eval_split": "test" if cfg.valid_pct is None else "valid", "versions": versions(),
    }  # fmt: skip
    return SimpleNamespace(
        name=name, cfg=cfg, images=images, learn=learn, device=device, config=config, saved=None, folder=None,
        why_precision=why_precision, compiled=compiled, why_compile=why_compile, started=time.perf_counter(),
        n_parameters=sum(p.numel() for p in learn.model.parameters()), eval_split=config["eval_split"],
        test_dl=None if cfg.no_test else learn.dls.valid if cfg.valid_pct is None else test_dl(learn.dls),
    )  # fmt: skip


def _seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _print_header(run):
    cfg, images, train = run.cfg, run.images, run.learn.dls.train
    split = f"{len(run.learn.dls.valid_ds):,} {run.eval_split}"
    peak = "found by a range test" if cfg.lr == "find" else f"{cfg.lr:g}"
    print(f"{cfg.model} on {images.name}: {len(train.dataset):,} train and {split} images of {len(images.classes)} "
          f"classes; {run.n_parameters:,} parameters")  # fmt: skip
    print(f"{run.config['hardware']}: {cfg.precision} ({run.why_precision}), "
          f"{'compiled' if run.compiled else 'not compiled'} ({run.why_compile})")  # fmt: skip
    print(f"{cfg.epochs} epochs of {len(train)} steps of {cfg.bs}; {cfg.opt}, {cfg.sched}, lr {peak}; seed {cfg.seed}")
    print(f"files: {run.folder}", flush=True)


def _fit(run):
    """Train what is left to train; afterwards the model holds the weights that are evaluated."""
    cfg, learn, saved = run.cfg, run.learn, run.saved
    log = RunLog(run.folder / "history.csv", run.eval_split, saved["rows"] if saved else ())
    run.log = log
    if saved:
        log.lrs, log.moms = list(saved["lrs"]), list(saved["moms"])
        if saved["finished_epochs"]:
            learn.model.load_state_dict(saved["callbacks"].get("ema", saved)["model"])
            log.write()
            return
    if run.compiled:
        _compile(run)
    if cfg.lr == "find":
        _find_lr(run)
    meta = {"config": run.config, "given": cfg.given, "recipe": run.name, "fingerprint": run.images.fingerprint}
    cbs = [log, Checkpoint(run.folder / "checkpoint.pth", meta, saved), StopOnSignal(), ConsoleProgress()]
    if cfg.save_best or cfg.patience:
        cbs += [KeepBest(run.folder / "best.pth" if cfg.save_best else None, cfg.patience), StopWaiting()]
    if cfg.tensorboard:
        cbs.append(TensorBoardLog(run.folder / "tensorboard"))
        run.tensorboard = cbs[-1]
    log.print_header()
    with learn.no_logging(), learn.removed_cbs(learn._grab_cbs(DeviceProgress)):
        try:
            fit_scheduled(learn, cfg, cfg.lr, cbs, start_epoch=saved["epoch"] if saved else 0)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise RunError(f"--bs {cfg.bs}: too large for the memory of {run.config['hardware']}; "
                           f"try --bs {max(1, cfg.bs // 2)}") from None  # fmt: skip


def _compile(run):
    began = time.perf_counter()
    batch, *_ = run.learn.dls.valid.one_batch()
    batch = batch[: run.cfg.bs].as_subclass(torch.Tensor)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.cfg.precision)
    failed = compile_model(run.learn.model, batch, torch.autocast(run.device.type, half, enabled=half is not None))
    print(failed or f"compiled in {time.perf_counter() - began:.0f} s", flush=True)


def _find_lr(run):
    """Take the learning rate from a range test, keep its picture, and write the number into config.json."""
    cfg = run.cfg
    found = range_test(run.learn)
    save_figure(plot_lr_find(found.lrs, found.losses, found.suggestions), run.folder / "lr_find.png")
    cfg.lr = found.suggestions[cfg.lr_suggest]
    if cfg.lr is None:
        raise RunError(f"--lr find: the range test gives no {cfg.lr_suggest}; try --lr-suggest valley, or give --lr")
    run.config["parameters"]["lr"] = cfg.lr
    run.config["lr_find"] = found.suggestions
    write_json(run.folder / "config.json", run.config)
    print(f"lr {cfg.lr:.3g}: the {cfg.lr_suggest} of the range test", flush=True)

