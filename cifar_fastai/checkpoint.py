"""checkpoint.pth: all that a run needs to go on from the end of an epoch, to the digit.

fastai's `start_epoch` skips epochs; what it leaves out is put back here before the first step that is done: momenta,
random states, the loader's order, counters. Only plain values and tensors are stored, so that it loads with
`weights_only=True` and a file from a stranger can run no code.
"""

import hashlib
import io
import random
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L

from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write

__all__ = ["Checkpoint", "latest_unfinished", "load_checkpoint", "load_weights", "save_torch"]

_KEYS = {"version", "epoch", "finished_epochs", "model", "opt", "random", "rows", "lrs", "moms", "train_iter",
         "callbacks", "config", "given", "recipe", "fingerprint", "recorder", "digest"}  # fmt: skip
VERSION = 1


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
    """A hash over every number and name in nested dicts, lists and tensors."""
    top = state is None
    state = hashlib.blake2b(digest_size=16) if top else state
    if isinstance(value, torch.Tensor):
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
    states = {"python": random.getstate(), "torch": torch.get_rng_state(), "loader": dls.train.rng.getstate(),
              "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)]}
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
    before the fit; all else here, in front of the first step.
    """

    order = 100

    def __init__(self, path, meta, restore=None):
        self.path, self.meta, self.restore = Path(path), meta, restore

    def before_train(self):
        if self.restore is None:
            return
        saved, self.restore = self.restore, None
        self._torch_opt.load_state_dict(saved["opt"])
        self.learn.train_iter = saved["train_iter"]
        for name, values in saved["recorder"].items():
            setattr(self.recorder, name, list(values))
        log = self.learn.run_log
        log.rows, log.lrs, log.moms = list(saved["rows"]), list(saved["lrs"]), list(saved["moms"])
        self._restore_callbacks(saved["callbacks"])
        set_random_states(saved["random"], self.dls)

    def after_epoch(self):
        if not self.learn.run_log.rows or self.learn.run_log.rows[-1]["epoch"] != self.epoch + 1:
            return  # an epoch that a resumed run skips
        log, rec = self.learn.run_log, self.recorder
        average = getattr(self.learn, "weight_average", None)
        raw = self.model.state_dict() if average is None or average.raw is None else average.raw
        keep = getattr(self.learn, "keep_best", None)
        stopped = keep is not None and keep.patience is not None and keep.waited >= keep.patience
        done = self.epoch + 1
        state = {
            "version": VERSION, "epoch": done, "finished_epochs": stopped or done == self.n_epoch,
            "model": dict(raw), "opt": plain(self._torch_opt.state_dict()), "random": random_states(self.dls),
            "rows": plain(log.rows), "lrs": log.lrs, "moms": log.moms, "train_iter": self.train_iter,
            "recorder": {"lrs": plain(list(rec.lrs)), "losses": _floats(rec.losses), "iters": list(rec.iters)},
            "callbacks": self._callback_states(), **self.meta,
        }  # fmt: skip
        state["digest"] = digest(state)
        save_torch(self.path, state)

    @property
    def _torch_opt(self):
        return self.opt.opt if isinstance(self.opt, OptimWrapper) else self.opt

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


def _floats(values):
    return torch.stack([torch.as_tensor(v) for v in values]).tolist() if len(values) else []


def save_torch(path, value):
    """torch.save, atomically, with an OSError on a full disk (torch's own writer turns that into something else)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def _load(path, what):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged or planted file fails in more ways than torch names
        reason = "it holds more than weights and would run code" if "Weights only" in str(error) else "it is damaged"
        raise InputError(f"{path}: cannot be loaded as {what}; {reason}") from None


def load_checkpoint(path):
    """What `Checkpoint` wrote to `path`, on the CPU; InputError for a file that is damaged, altered or foreign."""
    state = _load(path, "a checkpoint")
    if not isinstance(state, dict) or not _KEYS <= set(state) or state["version"] != VERSION:
        raise InputError(f"{path}: not a checkpoint of this version of cifar_fastai")
    if digest({key: value for key, value in state.items() if key != "digest"}) != state["digest"]:
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
    """The folder of the newest run under `runs` that has a checkpoint left; InputError where there is none."""
    found = sorted(Path(runs).glob("*/checkpoint.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"--resume latest: no unfinished run under {runs}")
    return found[-1].parent
