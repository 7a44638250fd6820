"""checkpoint.pth: all that a run needs to go on from the end of an epoch, to the digit.

fastai's `start_epoch` skips epochs; what it leaves out is put back here before the first step that is done: momenta,
random states, the loader's order, counters. Only plain values and tensors are stored, so that it loads with
`weights_only=True` and a file from a stranger can run no code.
"""

import hashlib
import io
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.torch_core import to_device
from fastcore.foundation import L

from cifar_fastai.errors import InputError, reason
from cifar_fastai.files import atomic_write, lock_folder
from cifar_fastai.training.precision import torch_optimizer

__all__ = [
    "Checkpoint",
    "latest_unfinished",
    "load_checkpoint",
    "load_weights",
    "random_states",
    "save_torch",
    "set_random_states",
]

VERSION = 2
_KINDS = dict(
    version=int,
    epoch=int,
    finished_epochs=bool,
    model=dict,
    opt=dict,
    random=dict,
    rows=list,
    lrs=list,
    moms=list,
    train_iter=int,
    callbacks=dict,
    config=dict,
    given=dict,
    recipe=str,
    fingerprint=str,
    digest=str,
)


def plain(value):
    """`value` with numpy's scalars as Python's and tuples kept, so that weights_only=True takes it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, L):  # fastai's list
        value = list(value)
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def digest(value, state=None):
    """A hash over every number and name in nested dicts, lists and tensors. ValueError for a tensor that repeats
    itself, which a small file could make as large as it likes."""
    top = state is None
    state = hashlib.blake2b(digest_size=16) if top else state
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor larger than what it holds")
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key, item in value.items():
            state.update(f"{key!r}:".encode())
            digest(item, state)
    elif isinstance(value, (list, tuple)):
        state.update(f"[{len(value)}".encode())
        for item in value:
            digest(item, state)
    else:
        state.update(repr(value).encode())
    return state.hexdigest() if top else None


def random_states(dls):
    """Every random state that a step draws from: python, numpy, torch, the device, the train loader's order."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "loader": dls.train.rng.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if dls.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(dls.device)
    elif dls.device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, dls):
    """Put back what `random_states` returned; a device's own state only on such a device."""
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    dls.train.rng.setstate(states["loader"])
    if "cuda" in states and dls.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], dls.device)
    elif "mps" in states and dls.device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


class Checkpoint(Callback):
    """Write `path` at the end of every epoch; with `restore`, what `load_checkpoint` gave, go on from there.

    `meta`: what else to store (config, given, recipe, fingerprint). The learner's weights are put back by the caller,
    before the fit; all else here, in front of the first step. InputError for what does not fit the run.
    """

    order = 100

    def __init__(self, path, meta, restore=None):
        self.path, self.meta, self.restore = Path(path), meta, restore

    def before_train(self):
        if self.restore is None:
            return
        saved, self.restore = self.restore, None
        try:
            self._restore_opt(saved["opt"])
            self.learn.train_iter = saved["train_iter"]
            self._restore_callbacks(saved["callbacks"])
            set_random_states(saved["random"], self.dls)
        except Exception as error:
            raise InputError(f"{self.path}: does not fit this run ({reason(error)})") from None

    def after_epoch(self):
        if self.learn.run_log.trained_epoch != self.epoch:
            return  # one that a resumed run skips
        log = self.learn.run_log
        average = getattr(self.learn, "weight_average", None)
        raw = self.model.state_dict() if average is None or average.raw is None else average.raw
        keep = getattr(self.learn, "keep_best", None)
        stopped = keep is not None and keep.patience is not None and keep.waited >= keep.patience
        done = self.epoch + 1
        state = {
            "version": VERSION,
            "epoch": done,
            "finished_epochs": stopped or done == self.n_epoch,
            "model": dict(raw),
            "opt": plain(torch_optimizer(self.opt).state_dict()),
            "random": random_states(self.dls),
            "rows": plain(log.rows),
            "lrs": log.lrs,
            "moms": log.moms,
            "train_iter": self.train_iter,
            "callbacks": self._callback_states(),
            **self.meta,
        }
        state["digest"] = digest(state)
        save_torch(self.path, state)

    def _restore_opt(self, saved):
        opt = torch_optimizer(self.opt)
        if opt is self.opt:  # fastai's own, which leave tensors where they are
            opt.load_state_dict(to_device(saved, self.dls.device))
            return
        ids = [k for group in saved["param_groups"] for k in group["params"]]
        params = dict(zip(ids, (p for group in opt.param_groups for p in group["params"]), strict=True))
        state = {
            k: {name: _laid_out(name, value, params[k]) for name, value in kept.items()}
            for k, kept in saved["state"].items()
        }
        opt.load_state_dict(saved | {"state": state})

    def _callback_states(self):
        states, learn = {}, self.learn
        if hasattr(learn, "scaled_step"):
            states["scaler"] = learn.scaled_step.scaler.state_dict()
        if hasattr(learn, "weight_average"):
            average = learn.weight_average
            states["ema"] = {"model": dict(average.average.module.state_dict()), "n_updates": average.n_updates}
        if hasattr(learn, "keep_best"):
            states["keep_best"] = {"best": learn.keep_best.best, "waited": learn.keep_best.waited}
        if hasattr(learn, "plateau"):
            states["plateau"] = plain(learn.plateau.state_dict())
        return states

    def _restore_callbacks(self, states):
        learn = self.learn
        if "scaler" in states and hasattr(learn, "scaled_step"):
            learn.scaled_step.scaler.load_state_dict(states["scaler"])
        if "ema" in states:
            learn.weight_average.average.module.load_state_dict(states["ema"]["model"])
            learn.weight_average.n_updates = states["ema"]["n_updates"]
        if "keep_best" in states:
            learn.keep_best.best, learn.keep_best.waited = states["keep_best"]["best"], states["keep_best"]["waited"]
        if "plateau" in states:
            learn.plateau.scheduler.load_state_dict(states["plateau"])


def _laid_out(name, value, param):
    """A tensor of an optimizer's state as `param` lies in memory: fused kernels look at no shapes and no strides."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != (() if name == "step" else param.shape):
        raise ValueError(f"{name} of shape {tuple(value.shape)} for weights of shape {tuple(param.shape)}")
    return value if name == "step" else torch.empty_like(param, dtype=value.dtype).copy_(value)


def save_torch(path, value):
    """torch.save, atomically, with an OSError on a full disk (torch's own writer turns that into something else)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def _load(path, what):
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged or planted file fails in more ways than torch names
        planted = "Weights only" in str(error)
        reason = "it holds more than numbers, and might run code" if planted else "it is damaged, or something else"
        raise InputError(f"{path}: cannot be loaded as {what}; {reason}") from None


def _check_archive(path):
    """torch.save's files are zip archives, not compressed, with checksums that torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist()]
        if not sizes or sum(sizes) > Path(path).stat().st_size:
            raise ValueError("empty, compressed, or parts in each other")
        if archive.testzip() is not None:
            raise ValueError("a checksum differs")


def load_checkpoint(path):
    """What `Checkpoint` wrote to `path`, on the CPU; InputError for a file that is damaged, altered or foreign."""
    state = _load(path, "a checkpoint")
    if type(state) is not dict or {key: type(value) for key, value in state.items()} != _KINDS:
        raise InputError(f"{path}: not a checkpoint of cifar_fastai")
    if state["version"] != VERSION:
        raise InputError(f"{path}: not a checkpoint of this version of cifar_fastai")
    try:
        whole = digest({key: value for key, value in state.items() if key != "digest"}) == state["digest"]
    except Exception:  # kinds of tensors, or of nesting, that no checkpoint has
        whole = False
    if whole is not True:
        raise InputError(f"{path}: altered or damaged since it was written; its checksum differs")
    return state


def load_weights(model, path):
    """Load the state dict in `path` (model.pth, best.pth) into `model`; InputError where it does not fit."""
    state = _load(path, "weights")
    try:
        model.load_state_dict(state)
    except Exception as error:
        first = str(error).splitlines()[0].rstrip(":")
        raise InputError(f"{path}: does not fit the network ({first})") from None
    return model


def latest_unfinished(runs="runs"):
    """The folder of the newest run under `runs` that was interrupted: it has a checkpoint left, and no process goes on
    with it. InputError where there is none."""
    found = []
    for path in Path(runs).glob("*/checkpoint.pth"):
        with suppress(FileNotFoundError), lock_folder(path.parent) as free:  # it may end just now
            if free:
                found.append((path.stat().st_mtime_ns, path.parent))
    if not found:
        raise InputError(f"--resume latest: no interrupted run under {runs}")
    return max(found)[1]
