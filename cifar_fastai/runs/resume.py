"""`--resume`: the run that it goes on with, the parameters of that run, and what it refuses."""

import os
import shlex
import sys
from pathlib import Path

from cifar_fastai.config import Recipe, resolve
from cifar_fastai.errors import InputError, printable, reason
from cifar_fastai.training.checkpoint import latest_unfinished, load_checkpoint

__all__ = ["resume_command", "run_to_resume", "saved_run"]


def run_to_resume(named):
    """The folder of the run that `named` means, a path or "latest". InputError where no run can go on."""
    folder = latest_unfinished() if named == "latest" else Path(named)
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: no such folder")
    if not (folder / "checkpoint.pth").exists():
        if (folder / "metrics.json").exists():
            raise InputError(f"--resume {folder}: this run is finished")
        raise InputError(f"--resume {folder}: holds no checkpoint.pth; no epoch was finished, start it anew")
    return folder


def saved_run(folder, recipe, given):
    """(saved, cfg): the checkpoint in `folder`, and the parameters its run was started with, as a namespace.

    InputError for a checkpoint that cannot be trusted, that is another recipe's, or for what stands in `given` and
    differs.
    """
    path = folder / "checkpoint.pth"
    saved = load_checkpoint(path)
    if saved["recipe"] != recipe:
        name = printable(saved["recipe"])
        raise InputError(f"--resume {folder}: a run of {name}, not of {recipe}; go on with it by recipes/{name}.py")
    try:
        cfg = resolve(Recipe(recipe, saved["config"]["parameters"]), {})
    except (InputError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not hold the parameters of a run ({reason(error)})") from None
    _refuse_changes(given, vars(cfg) | {"out": str(folder)}, saved["given"])
    cfg.given = saved["given"]
    return saved, cfg


def _refuse_changes(given, parameters, first_given):
    for name, value in given.items():
        if value is None or value is False or name in ("resume", "device", "debug"):
            continue
        old = parameters.get(name)
        if not any(_same(name, value, known) for known in (old, first_given.get(name))):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {value}: this run has {flag} {old}; beside --resume only --device may be given")


def _same(name, value, old):
    if name in ("data", "out"):
        return old is not None and os.path.abspath(value) == os.path.abspath(old)
    try:
        return float(value) == float(old)  # "0.10" is 0.1
    except (TypeError, ValueError):
        return value == old


def resume_command(recipe, folder):
    """The command line that goes on with the run in `folder`."""
    script = sys.argv[0] if Path(sys.argv[0]).name == f"{recipe}.py" else f"recipes/{recipe}.py"
    return shlex.join(["python", script, "--resume", str(folder)])
