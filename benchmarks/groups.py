"""The benchmark's four groups of rows: an epoch, the input pipeline, a step without a model, a start."""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import peers
from benchmarks.timing import Clock, Result, Row, progress, take_turns
from cifar_fastai.data.images import ImageSet
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import RunError
from cifar_fastai.hardware import autocast, keep_freed_memory
from cifar_fastai.models import resnet18
from cifar_fastai.training.callbacks import StopOnBadLoss
from cifar_fastai.training.compiling import compile_model
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.optimizers import optimizer_factory
from cifar_fastai.training.recorder import ConsoleProgress, DeviceProgress
from cifar_fastai.training.signals import StopOnSignal

__all__ = [
    "EPOCH_IMAGES",
    "Settings",
    "few_images",
    "time_epoch",
    "time_pipeline",
    "time_start",
    "time_step_cost",
    "write_archive",
    "write_folder",
]

EPOCH_IMAGES = 50_000  # an epoch of CIFAR-10, which times are scaled to
START_SIZES = (10_000, 60_000)
MIN_TIMED_STEPS = 3


@dataclass
class Settings:
    """The settings of all groups."""

    images: ImageSet
    folder: Path  # temporary; holds `images` in train/<class>/ and test/<class>/
    device: torch.device
    precision: str
    compiled: bool
    bs: int
    repeats: int
    steps: int | None  # of an epoch that are timed; None: as many as fit into `seconds`
    seconds: float  # for all rounds of the epoch's rows on a CPU
    pipeline_seconds: float  # the longest that a row of the pipeline takes in a round
    cost_steps: int  # of the epoch without a model
    start_repeats: int

    @property
    def epoch_steps(self):
        return EPOCH_IMAGES // self.bs

    @property
    def data_steps(self):
        """The steps of one pass over the train images, without an incomplete last batch."""
        return self.images.n_train // self.bs

    @property
    def dls(self):
        augment = dict(pad_mode="zeros", flip_by="chance", cutout=16)  # as in the usual scripts
        return cifar_dls(self.images, self.bs, device=self.device, **augment)


def time_epoch(s):
    """Training epochs of ResNet18, without validation: (results, notes)."""
    notes = []

    def compiled(model, batch, winograd=True):
        if s.compiled:
            progress("compiling")
            failure = compile_model(model, batch, autocast(s.device, s.precision), winograd)
            notes.extend([failure] if failure and failure not in notes else [])

    if s.device.type == "cpu" and keep_freed_memory():
        notes.append("epoch: all rows run in a process that keeps the memory it frees, as recipes do on a CPU")
    dls = s.dls
    x, y = (t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
    learn = cifar_learner(dls, resnet18(), opt="sgd", precision=s.precision, cbs=[StopOnBadLoss()])
    limit = resnet18().to(s.device, memory_format=torch.channels_last)
    compiled(learn.model, x)
    compiled(limit, x)
    loader = peers.torchvision_dl(s.images, s.bs, workers=2)
    script = partial(peers.script_epoch, loader)
    cuda = s.device.type == "cuda"
    rows = [
        Row("ours, through Learner", _ours(learn, s.folder)),
        Row("limit: bare loop, one fixed batch", _fixed_batch(limit, x, y, s), 0.95 if cuda else 0.97),
        Row(
            "fastai, from folder",
            partial(_fit_stock, _fastai(s)),
            1.0,
            None if cuda else f"fastai's to_fp16 is for CUDA; on {s.device.type} it trains in fp32",
        ),
        Row(
            "usual script, fp32 as published",
            script(resnet18(), "fp32", s.device),
            4.0 if cuda else 2.5 if s.precision == "bf16" else 1.0,
        ),
    ]
    if s.precision != "fp32":
        rows.append(Row(f"usual script, in {s.precision}", script(resnet18(), s.precision, s.device), 1.0))
    if s.compiled and s.device.type == "cpu" and s.precision == "fp32":
        plain = resnet18().to(memory_format=torch.channels_last)
        compiled(plain, x, winograd=False)
        rows.insert(2, Row("the same with torch's convolutions", _fixed_batch(plain, x, y, s)))
    steps = _steps(s, rows)
    scaled = steps < s.epoch_steps
    clocks = take_turns("epoch", rows, s.repeats, partial(Clock, s.device, steps))
    group = f"epoch, scaled from {steps} steps" if scaled else "epoch"
    results = _results(
        group, rows, clocks, "epoch", lambda clock: clock.seconds_for(s.epoch_steps), s.epoch_steps * s.bs
    )
    if s.precision == "fp32":
        same = "our precision is fp32 on this device, so this is the row above, not measured twice"
        results.append(replace(results[-1], name="usual script, in our precision", goal=1.0, note=same))
    how = "all of them run in every round"
    if scaled:
        how = f"measured over {steps} in every round, scaled (the first, where loaders start, counted once)"
    return results, [f"epoch: {s.epoch_steps} training steps of {s.bs} images, no validation; {how}", *notes]


def time_pipeline(s):
    """Augmented images a second as they arrive on the device, without a model: (results, notes)."""
    cores = os.cpu_count()
    rows = [
        Row("ours", _batches(s.dls.train, s.device)),
        Row(
            f"fastai, from folder, {min(cores, 16)} workers",
            _batches(peers.fastai_dls(s.folder / "images", s.bs, s.device).train, s.device),
            10.0,
        ),
        Row(f"torchvision, {cores} workers", _batches(peers.torchvision_dl(s.images, s.bs, cores), s.device), 4.0),
    ]
    warm = min(2 * cores + 1, s.data_steps - 1)  # until the queues of the workers are full
    take_turns("warming up the pipelines", rows, 1, partial(Clock, s.device, 2))
    clocks = take_turns("pipeline", rows, s.repeats, partial(Clock, s.device, s.data_steps, warm, s.pipeline_seconds))
    results = _results("pipeline", rows, clocks, "image", lambda clock: clock.per_step / s.bs, 1)
    return results, [
        f"pipeline: batches of {s.bs} after the first {warm}; ours crops, flips and cuts out, fastai's is "
        "aug_transforms(), torchvision's crops and flips, of images in memory"
    ]


def time_step_cost(s):
    """The cost of a training step with one linear layer as the model: (results, notes)."""
    dls = s.dls
    x, y = (t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
    ours = cifar_learner(dls, _linear(s), precision=s.precision, cbs=[StopOnBadLoss()], lr=1e-3)
    rows = [
        Row("ours, through Learner", _ours(ours, s.folder)),
        Row("fastai's Learner, Recorder, bar, same batches", partial(_fit_stock, peers.stock_learner(dls, _linear(s)))),
        Row("bare loop, same batches", _own_batches(_linear(s), dls.train, s)),
        Row("bare loop, one fixed batch", _fixed_batch(_linear(s), x, y, s)),
    ]
    steps = min(s.cost_steps, s.data_steps)
    take_turns("warming up the linear layer", rows, 1, partial(Clock, s.device, 2))
    clocks = take_turns("step", rows, s.repeats, partial(Clock, s.device, steps))
    return _results("step, linear layer", rows, clocks, "step", lambda clock: clock.per_step, s.bs), [
        "step: ours also keeps the training accuracy and the run's log, and checks that the loss is a number"
    ]


def time_start(s):
    """Decoding, the cache and the first step, each in a process of its own: (results, notes)."""
    cache, measured = s.folder / "cache", {}
    sizes = sorted({min(size, len(s.images.images)) for size in START_SIZES})
    archives = {n: write_archive(few_images(s.images, n), s.folder / f"{n}.tgz", s.folder / "images") for n in sizes}
    for n, archive in archives.items():
        progress(f"start: filling the cache with {n:,} images")
        _child(["load", archive], cache)

    def note(what, n, seconds, report):
        measured.setdefault((what, n), []).append((seconds, report["peak_bytes"]))

    for done in range(s.start_repeats):
        for n, archive in archives.items():
            progress(f"start: round {done + 1} of {s.start_repeats}, {n:,} images")
            report = _child(["load", archive], s.folder / f"cache-{n}-{done}")
            note("decode", n, report["seconds"], report)
            report = _child(["load", archive], cache)
            note("read the cache", n, report["seconds"], report)
            start = time.time()
            report = _child(["train", archive, s.device, s.precision, min(s.bs, n // 4)], cache)
            note("until the first step begins", n, report["begins"] - start, report)
            note("until the first step is done", n, report["done"] - start, report)
    progress()
    results = []
    for (what, n), values in sorted(measured.items(), key=lambda item: (item[0][1], list(measured).index(item[0]))):
        seconds, peaks = zip(*values, strict=True)
        peak = None if None in peaks else max(peaks)
        limit = 10.0 if what == "until the first step begins" else None
        results.append(Result(f"start, {n:,} images", what, "start", list(seconds), peak_bytes=peak, limit=limit))
    return results, [
        "start: the archive holds PNG files, written from the decoded images; the first step counts from "
        "the start of the process, images in the cache, not compiled; memory of the host alone"
    ]


def few_images(images, n):
    """An ImageSet of about `n` of the images, with the same shares of splits and classes; all if it has fewer."""
    if n >= len(images.images):
        return images
    n_train = max(len(images.classes), round(n * images.n_train / len(images.images)))
    splits = [(np.arange(images.n_train), n_train), (np.arange(images.n_train, len(images.images)), n - n_train)]
    parts = [_shares(rows, images.labels[rows], max(size, len(images.classes))) for rows, size in splits]
    rows = np.concatenate(parts)
    return replace(images, images=images.images[rows], labels=images.labels[rows], n_train=len(parts[0]))


def _shares(rows, labels, n):
    """The first `n` rows taken from the classes in turn, in their original order."""
    turns = np.empty(len(rows), np.int64)
    for label in np.unique(labels):
        turns[labels == label] = np.arange((labels == label).sum())
    return np.sort(rows[np.argsort(turns, kind="stable")[:n]])


def write_folder(images, folder):
    """Write all images as PNG files, train/<class>/*.png and test/<class>/*.png."""
    for row in range(len(images.images)):
        if row % 1000 == 0:
            progress(f"writing {row:,} of {len(images.images):,} PNG files")
        path = folder / _png_name(images, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[row].transpose(1, 2, 0)).save(path)  # (32, 32, 3)
    progress()


def write_archive(images, archive, folder):
    """A .tgz of as many PNG files as `images` has, from `folder`, which `write_folder` has filled."""
    progress(f"writing {archive.name}")
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for split, labels in (("train", images.train_labels), ("test", images.test_labels)):
            for label, count in enumerate(np.bincount(labels, minlength=len(images.classes))):
                files = sorted((folder / split / images.classes[label]).iterdir())[:count]
                for file in files:
                    tar.add(file, Path("images", split, images.classes[label], file.name))
    return archive


def _png_name(images, row):
    split = "train" if row < images.n_train else "test"
    return Path(split, images.classes[images.labels[row]], f"{row:05}.png")


def _ours(learn, folder):
    """Our epoch as in the recipes: with their log and their console line in place of fastai's bar."""
    learn.remove_cbs(learn._grab_cbs(DeviceProgress))
    learn.history.path, learn.history.verbose = folder / "history.csv", True

    def run(clock):
        with learn.no_logging():
            peers.fit(learn, clock, [StopOnSignal(), ConsoleProgress()])

    return run


def _fit_stock(learn, clock):
    peers.fit(learn, clock)


def _fastai(s):
    return peers.fastai_learner(s.folder / "images", resnet18(), s.bs, s.device)


def _bare_step(model, s):
    """PyTorch's own step with the optimizer of `cifar_learner`."""
    wrapped = optimizer_factory()(model.parameters(), lr=1e-3)
    wrapped.set_hypers(wd=5e-4)
    return peers.training_step(model, wrapped.opt, s.precision, s.device)


def _fixed_batch(model, x, y, s):
    """A bare loop over one batch: nothing but the model and its optimizer."""
    step, x = _bare_step(model, s), x.contiguous(memory_format=torch.channels_last)

    def run(clock):
        clock.start()
        step(x, y)
        while not clock.step():
            step(x, y)

    return run


def _own_batches(model, dl, s):
    step = _bare_step(model, s)

    def run(clock):
        clock.start()
        for x, y in dl:
            step(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))
            if clock.step():
                break

    return run


def _batches(dl, device):
    """A pass over the batches of `dl`, moved to the device."""

    def run(clock):
        clock.start()
        for x, y in dl:
            x.to(device), y.to(device)
            if clock.step():
                break

    return run


def _linear(s):
    net = nn.Sequential(nn.Flatten(), nn.Linear(s.images.images[0].size, len(s.images.classes)))
    return net.to(s.device)


def _steps(s, rows):
    """How many steps of an epoch to time: all of them on a GPU, else as many as the time allows."""
    longest = min(s.epoch_steps, s.data_steps)
    trial = min(1 + MIN_TIMED_STEPS, longest) if s.steps is None else 2
    clocks = take_turns("warming up ResNet18", rows, 1, partial(Clock, s.device, trial))
    if s.steps is not None:
        return min(s.steps, longest)
    if s.device.type != "cpu":
        return longest
    round_of_steps = sum(clock.per_step for [clock] in clocks.values())
    return min(longest, max(1 + MIN_TIMED_STEPS, int(s.seconds / s.repeats / round_of_steps)))


def _results(group, rows, clocks, unit, seconds, images):
    """One Result a row, each compared with the first one, which is ours."""
    results = []
    for row in rows:
        values = [seconds(clock) for clock in clocks[row.name]]
        ours = results[0] if results else None
        results.append(Result(group, row.name, unit, values, images, None, ours, row.goal, note=row.note))
    return results


def _child(arguments, cache):
    """The report of `benchmarks.startup`. Raises RunError with its last line of output where it failed."""
    home = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"CIFAR_FASTAI_CACHE": str(cache), "PYTHONPATH": paths},
    )
    if process.returncode:
        last = (process.stderr.strip() or f"status {process.returncode}").splitlines()[-1]
        raise RunError(f"the start could not be measured: {last}")
    return json.loads(process.stdout.splitlines()[-1])
