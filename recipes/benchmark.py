"""How fast is it? Our epoch, pipeline, step and start beside the limit of the hardware and what people use today.

    python recipes/benchmark.py
    python recipes/benchmark.py --quick --json numbers.json

One table: rows take turns, round after round; the numbers are medians over the rounds. "ours is 2.50x": ours is 2.5
times as fast as this row, the median of the rounds, each compared within itself. Spread: slowest round minus fastest,
of the median.
"""

import os
import sys
import time
from pathlib import Path

from cifar_fastai.cli import command

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is no part of the package


@command(dict(bs="512 on a GPU, else 128", repeats=5, steps="a whole epoch on a GPU, else what --minutes allow"))
def main(
    data: str = "auto",  # auto, cifar10, digits, or a folder or archive of images
    device: str = "auto",  # auto, cpu, cuda, cuda:N or mps
    precision: str = "auto",  # Of ours and the limit: auto, fp32, fp16 or bf16
    compile: str = "auto",  # torch.compile for ours and the limit: auto (as for 20 epochs), yes or no
    bs: int = None,  # Batch size
    minutes: float = 15.0,  # Time for the epoch's rows on a CPU
    steps: int = None,  # Steps of an epoch that are timed in each round, and scaled to 50,000 images
    repeats: int = None,  # Rounds
    json: str = None,  # Write all numbers into this file
    quick: bool = False,  # Only try it out: a few small steps of a few images
    debug: bool = False,  # Show tracebacks
):
    "Measure epoch, input pipeline, cost per step and start, ours and others', and print one table."
    from tempfile import TemporaryDirectory

    from benchmarks.groups import time_epoch, time_pipeline, time_start, time_step_cost, write_folder
    from benchmarks.timing import markdown_table
    from cifar_fastai.files import write_json

    began = time.perf_counter()
    check(minutes=minutes, steps=steps, repeats=repeats, bs=bs, json=json)
    with TemporaryDirectory(prefix="cifar_fastai-benchmark-") as folder:
        settings, header = prepare(data, device, precision, compile, bs, minutes, steps, repeats, quick, folder)
        print("\n".join(header), flush=True)
        write_folder(settings.images, settings.folder / "images")
        results, notes = [], ["a trial (--quick): its numbers say nothing about speed"] if quick else []
        for time_group in (time_epoch, time_pipeline, time_step_cost, time_start):
            group_results, group_notes = time_group(settings)
            results += group_results
            notes += group_notes
    notes += [f"{result.name}: {result.note}" for result in results if result.note]
    print("", *markdown_table(results), "", *(f"- {note}" for note in notes), sep="\n")
    print(f"- measured in {(time.perf_counter() - began) / 60:.1f} minutes")
    if json:
        write_json(
            json,
            {
                "machine": machine(settings),
                "settings": chosen(settings, quick),
                "notes": notes,
                "rows": [result.as_dict() for result in results],
            },
        )
    return results


def check(minutes, steps, repeats, bs, json):
    """Raise InputError for what could only fail after a long measurement."""
    from pathlib import Path

    from cifar_fastai.errors import InputError

    for flag, value, least in (("minutes", minutes, 0), ("steps", steps, 2), ("repeats", repeats, 1), ("bs", bs, 2)):
        if value is not None and not value >= least:
            raise InputError(f"--{flag} {value}: must be at least {least}")
    if json and not Path(json).resolve().parent.is_dir():
        raise InputError(f"--json {json}: there is no such folder; make it first")


def prepare(data, device, precision, compile, bs, minutes, steps, repeats, quick, folder):
    """The benchmark's Settings, and what is to be said about them before it starts, line by line."""
    from pathlib import Path

    from benchmarks.groups import Settings, few_images
    from cifar_fastai.config import CHOICES
    from cifar_fastai.data.images import load_images
    from cifar_fastai.data.loaders import default_bs
    from cifar_fastai.errors import InputError
    from cifar_fastai.hardware import choose_device, choose_precision
    from cifar_fastai.names import check_name
    from cifar_fastai.training.compiling import choose_compile

    device = choose_device(device)
    precision, why_precision = choose_precision(precision, device)
    check_name("--compile", compile, CHOICES["compile"])
    if quick and compile == "auto":
        compile = "no"
    compiled, why_compiled = choose_compile(compile, device, n_images=20 * 50_000)
    images = load_images(data)
    if quick:
        images = few_images(images, 600)
    bs = bs or default_bs(8 if quick else 512 if device.type == "cuda" else 128, images.n_train)
    if images.n_train // bs < 3:
        raise InputError(f"--bs {bs}: {images.n_train} train images give fewer than 3 such batches; try a smaller one")
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
    found = machine(settings)
    header = [
        found["hardware"] + "; " + ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value),
        f"{images.name} ({images.n_train:,} train images), batches of {bs}, {settings.repeats} rounds",
        f"{precision} ({why_precision}), {'ours and the limit compiled' if compiled else 'not compiled'} "
        f"({why_compiled})",
    ]
    return settings, header + ([f"*** {images.note} ***"] if images.note else [])


def machine(settings):
    """What the numbers depend on: hardware, threads, versions."""
    import torch

    from cifar_fastai.hardware import hardware_name, versions

    hardware = hardware_name(torch.device("cpu"))
    if settings.device.type != "cpu":
        hardware = f"{hardware_name(settings.device)}; {hardware}"
    return {
        "hardware": f"{hardware}, {os.cpu_count()} cores",
        "device": str(settings.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }


def chosen(settings, quick):
    """The settings as JSON."""
    return {
        "data": settings.images.name,
        "train_images": settings.images.n_train,
        "precision": settings.precision,
        "compiled": settings.compiled,
        "bs": settings.bs,
        "repeats": settings.repeats,
        "quick": quick,
    }


if __name__ == "__main__":
    main()
