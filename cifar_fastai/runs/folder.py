"""A run's folder: its name, its files, and what they say in one line."""

import json
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from cifar_fastai.data.sources import SPLITS
from cifar_fastai.errors import InputError, printable, reason
from cifar_fastai.files import lock_folder, read_json, remove_leftovers
from cifar_fastai.training.recorder import in_epochs

__all__ = [
    "describe_run",
    "hold_folder",
    "is_run",
    "latest_finished",
    "make_folder",
    "picture_path",
    "public_config",
    "read_config",
]


def make_folder(recipe, out=None, data=""):
    """A new folder for a run: `out`, or runs/<recipe>-<date>-<time>.

    Raises InputError where a run is there already, and among the images of `data`, where it would become a class.
    """
    folder, data = Path("runs" if out is None else out), Path(os.path.expanduser(data))
    try:
        splits = [path for name in SPLITS for path in (data / name, *data.glob(f"*/{name}"))]
        if any(Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(split)) for split in splits):
            problem = "lies among the images, where it would become a class; choose another folder"
            raise InputError(problem, out=str(folder))
        if out is None:
            return _make_default_folder(f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (folder / "metrics.json").exists():
            raise InputError("holds a finished run; choose another folder", out=out)
        if (folder / "checkpoint.pth").exists():
            raise InputError(f"holds a run already; choose another folder, or `resume` {out}", out=out)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be created ({reason(error)})", out=out) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError("cannot be written to; choose another folder", out=out)
    return folder


def hold_folder(folder, stack, argument):
    """Lock `folder` until `stack`, an ExitStack, is closed, and remove what a killed process has left in it; `folder`.

    Raises InputError where another process holds it; the message calls it by the name `argument`.
    """
    if not stack.enter_context(lock_folder(folder)):
        hint = "" if argument == "resume" else "; choose another folder"
        raise InputError(f"another process is training there{hint}", **{argument: str(folder)})
    remove_leftovers(folder)
    return folder


def _make_default_folder(name):
    try:
        Path("runs").mkdir(exist_ok=True)
        for n in count(1):  # two runs may start in the same second
            folder = Path("runs") / (name if n == 1 else f"{name}-{n}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise InputError(f"runs/{name}: cannot be created ({reason(error)}); set `out`") from None


def picture_path(out, suffix=".png"):
    """`out` as a Path. InputError unless it names a file with this suffix in a folder that exists."""
    out = Path(out)
    if out.suffix != suffix or out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"must be a file name that ends in {suffix}, in a folder that exists", out=str(out))
    return out


def is_run(folder):
    """Whether `folder` holds a run, finished or not; `load_run` says how to resume one that is not."""
    return any((Path(folder) / name).exists() for name in ("metrics.json", "checkpoint.pth"))


def latest_finished(runs="runs"):
    """The folder of the newest finished run under `runs`; InputError if there is none."""
    finished = sorted(Path(runs).glob("*/metrics.json"), key=os.path.getmtime)
    if not finished:
        raise InputError(f"no finished run under {runs}; name its folder with `run`")
    return finished[-1].parent


def read_config(folder):
    """config.json of a run's folder as a dict; InputError where there is none that can be read."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: not a run's folder (no config.json in it)")
    config = read_json(path)
    if not isinstance(config.get("parameters"), dict):
        raise InputError(f"{path}: not a run's configuration")
    return config


def public_config(folder):
    """config.json of a run's folder as a dict, without any path of this machine. InputError as `read_config`."""
    config = read_config(folder)
    try:
        for values in (config["parameters"], config.get("given") or {}):
            for name in ("out", "data"):
                if values.get(name) is not None:
                    values[name] = Path(values[name]).name
        config |= dict(data_source=Path(config["data_source"]).name, data_path=None)
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()  # as it will be written
        return config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its config.json is damaged ({reason(error)})") from None


def describe_run(folder):
    """A finished run in one line: network, data, epochs, time, hardware, accuracy. InputError where there is none."""
    config = read_config(folder)
    try:
        metrics = read_json(Path(folder) / "metrics.json")
        split, seconds = "valid" if metrics["test_accuracy"] is None else "test", metrics["seconds"]
        duration = f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
        return printable(
            f"{metrics['model']} on {metrics['dataset']}: {in_epochs(metrics['epochs'])} in {duration} "
            f"on {config.get('hardware')}; {split} accuracy {metrics[f'{split}_accuracy']:.2%}"
        )
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its metrics.json cannot be read ({reason(error)}); is the run finished?") from None
