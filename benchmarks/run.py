"""The benchmark from start to end: settings, all groups of rows, one table, a JSON file."""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.groups import Settings, few_images, time_epoch, time_pipeline, time_start, time_step_cost, write_folder
from benchmarks.timing import markdown_table
from cifar_fastai.data.images import load_images
from cifar_fastai.data.loaders import default_bs
from cifar_fastai.errors import InputError
from cifar_fastai.files import write_json
from cifar_fastai.hardware import choose_device, choose_precision, hardware_name, versions
from cifar_fastai.settings import check_values
from cifar_fastai.training.compiling import choose_compile

__all__ = ["run_benchmark"]


def run_benchmark(
    data="auto",
    device="auto",
    precision="auto",
    compile="auto",
    bs=None,
    minutes=15.0,
    steps=None,
    repeats=None,
    json=None,
    quick=False,
):
    """Measure epoch, input pipeline, cost per step and start, ours and others', and print one table; the results.

    Arguments: those of recipes/benchmark.py. Raises InputError for wrong arguments, before the measurements.
    """
    start = time.perf_counter()
    for name, value, least in (("minutes", minutes, 0), ("steps", steps, 2), ("repeats", repeats, 1), ("bs", bs, 2)):
        if value is not None and not value >= least:
            raise InputError(f"must be at least {least}", **{name: value})
    if json and not Path(json).resolve().parent.is_dir():
        raise InputError("there is no such folder; create it first", json=str(json))
    with TemporaryDirectory(prefix="cifar_fastai-benchmark-") as folder:
        settings, header = _prepare(data, device, precision, compile, bs, minutes, steps, repeats, quick, folder)
        print("\n".join(header), flush=True)
        write_folder(settings.images, settings.folder / "images")
        results, notes = [], ["a trial (--quick): its numbers say nothing about speed"] if quick else []
        for time_group in (time_epoch, time_pipeline, time_step_cost, time_start):
            group_results, group_notes = time_group(settings)
            results += group_results
            notes += group_notes
    notes += [f"{result.name}: {result.note}" for result in results if result.note]
    print("", *markdown_table(results), "", *(f"- {note}" for note in notes), sep="\n")
    print(f"- measured in {(time.perf_counter() - start) / 60:.1f} minutes")
    if json:
        rows = [result.as_dict() for result in results]
        write_json(json, dict(machine=_machine(settings), settings=_as_dict(settings, quick), notes=notes, rows=rows))
    return results


def _prepare(data, device, precision, compile, bs, minutes, steps, repeats, quick, folder):
    """The benchmark's Settings, and the lines that are printed before it starts."""
    device = choose_device(device)
    precision, precision_reason = choose_precision(precision, device)
    check_values(compile=compile)
    if quick and compile == "auto":
        compile = "no"
    compiled, compile_reason = choose_compile(compile, device, n_images=20 * 50_000)
    images = load_images(data)
    if quick:
        images = few_images(images, 600)
    bs = bs or default_bs(8 if quick else 512 if device.type == "cuda" else 128, images.n_train)
    if images.n_train // bs < 3:
        raise InputError(f"{images.n_train} train images give fewer than 3 such batches; try a smaller one", bs=bs)
    settings = Settings(
        images,
        Path(folder),
        device,
        precision,
        compiled,
        bs,
        repeats=repeats or (2 if quick else 5),
        steps=steps or (2 if quick else None),
        seconds=60 * minutes,
        pipeline_seconds=0.2 if quick else 3.0,
        cost_steps=5 if quick else 400,
        start_repeats=1 if quick else 3,
    )
    machine = _machine(settings)
    header = [
        machine["hardware"]
        + "; "
        + ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value),
        f"{images.name} ({images.n_train:,} train images), batches of {bs}, {settings.repeats} rounds",
        f"{precision} ({precision_reason}), {'ours and the limit compiled' if compiled else 'not compiled'} "
        f"({compile_reason})",
    ]
    return settings, header + ([f"*** {images.note} ***"] if images.note else [])


def _machine(settings):
    """Hardware, threads and versions, on which the numbers depend."""
    hardware = hardware_name(torch.device("cpu"))
    if settings.device.type != "cpu":
        hardware = f"{hardware_name(settings.device)}; {hardware}"
    return dict(
        hardware=f"{hardware}, {os.cpu_count()} cores",
        device=str(settings.device),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        versions=versions(),
    )


def _as_dict(settings, quick):
    names = "precision", "compiled", "bs", "repeats"
    values = {name: getattr(settings, name) for name in names}
    return {"data": settings.images.name, "train_images": settings.images.n_train, "quick": quick} | values
