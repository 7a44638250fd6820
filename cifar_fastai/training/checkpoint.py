"""checkpoint.pth: all that a run needs to go on from the end of an epoch, to the digit.

Weights and history are restored when the fit begins, all else before its first step: momenta, random states, the
loader's order, counters. Only plain values and tensors are stored, so that the file loads with `weights_only=True`
and one from a stranger can run no code.
"""

import io
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from fastai.torch_core import to_device
from fastcore.foundation import L

from cifar_fastai.errors import InputError, check_extra, printable, reason
from cifar_fastai.files import atomic_write, check_regular, lock_folder, read_json
from cifar_fastai.training.precision import torch_optimizer
from cifar_fastai.training.recorder import FitCallback, history_columns

_VERSION = 3  # of the file's content
_TYPES = dict(version=int, epoch=int, train_iter=int, finished_epochs=bool, recipe=str, fingerprint=str)
_TYPES |= dict.fromkeys(("model", "opt", "random", "callbacks", "config", "given"), dict)
_TYPES |= dict.fromkeys(("rows", "lrs", "moms"), list)
_MAX_DEPTH = 20


class Checkpoint(FitCallback):
    """Write `path` at the end of every epoch; with `restore`, from `load_checkpoint`, go on from there.

    `meta`: what else to store (config, given, recipe, fingerprint). A fit that was finished trains nothing.
    Kept of other callbacks are the attributes that they name in `saved`, and the counts of fastai's trackers.
    InputError for what does not fit the run.
    """

    order = 100
    first_epoch = 0  # of this fit, where `CifarLearner` begins

    def __init__(self, path, meta, restore=None):
        self.path, self.meta, self.restore = Path(path), meta, restore

    def before_fit(self):
        saved, history = self.restore, self.learn.history
        if saved is None:
            return
        _load_state(self.model, saved["model"], self.path)
        history.rows, history.lrs, history.moms = (list(saved[name]) for name in ("rows", "lrs", "moms"))
        history.write()
        self.first_epoch = saved["epoch"]
        if saved["finished_epochs"]:  # perhaps before the last epoch
            self.first_epoch = self.n_epoch
            set_random_states(saved["random"], self.dls)

    def before_train(self):
        if self.restore is None:
            return
        saved, self.restore = self.restore, None
        try:
            self._restore_opt(saved["opt"])
            self.learn.train_iter = saved["train_iter"]
            for name, state in self._callback_states().items():
                if name in saved["callbacks"] or name != "scaled_step":  # the first device may have had no fp16
                    self._restore_callback(name, saved["callbacks"].get(name), state)
            set_random_states(saved["random"], self.dls)
        except Exception as error:
            raise InputError(f"{self.path}: does not fit this run ({reason(error)})") from None

    def _callback_states(self):
        """By callback and attribute, the values or state dicts of the attributes that callbacks list in `saved`."""
        trackers = {cb: sorted({"best", "wait"} & vars(cb).keys()) for cb in self.learn.cbs}  # fastai's list nothing
        names = {cb: getattr(type(cb), "saved", trackers[cb]) for cb in self.learn.cbs}
        parts = {cb.name: {name: getattr(cb, name) for name in names[cb]} for cb in self.learn.cbs}
        return {
            callback: {name: plain(v.state_dict() if hasattr(v, "state_dict") else v) for name, v in values.items()}
            for callback, values in parts.items()
            if values
        }

    def _restore_callback(self, name, state, own_state):
        if not _is_like(state, own_state):
            raise ValueError(f"the state of {name} differs")
        callback = getattr(self.learn, name)
        for attribute, value in to_device(state, self.dls.device).items():
            part = getattr(callback, attribute)
            part.load_state_dict(value) if hasattr(part, "load_state_dict") else setattr(callback, attribute, value)

    def _restore_opt(self, saved):
        opt = torch_optimizer(self.opt)
        if opt is self.opt:  # fastai's own optimizers leave tensors where they are
            opt.load_state_dict(to_device(saved, self.dls.device))
            return
        if not _is_like(saved["param_groups"], plain(opt.state_dict()["param_groups"])):
            raise ValueError("the optimizer's parameter groups differ")
        ids = [k for group in saved["param_groups"] for k in group["params"]]
        params = dict(zip(ids, (p for group in opt.param_groups for p in group["params"]), strict=True))
        state = {k: _like_param(values, params[k]) for k, values in saved["state"].items()}
        opt.load_state_dict(saved | {"state": state})

    def after_epoch(self):
        if self.learn.history.trained_epoch == self.epoch:
            self._write(finished=self.epoch + 1 == self.n_epoch)

    def after_cancel_fit(self):
        if self.learn.history.trained_epoch == self.epoch:  # another callback has ended the fit after this epoch
            self._write(finished=True)

    def _write(self, finished):
        learn, history = self.learn, self.learn.history
        raw = None if finished else getattr(getattr(learn, "weight_average", None), "raw", None)
        state = dict(version=_VERSION, epoch=self.epoch + 1, finished_epochs=finished, train_iter=self.train_iter)
        state |= dict(model=dict(raw or self.model.state_dict()), opt=plain(torch_optimizer(self.opt).state_dict()))
        state |= dict(random=random_states(self.dls), callbacks=self._callback_states())
        state |= dict(rows=history.rows, lrs=history.lrs, moms=history.moms)
        save_torch(self.path, state | self.meta)


def plain(value):
    """`value` with numpy's scalars as Python's and fastai's lists as Python's, which weights_only=True takes."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, L)):
        return (tuple if isinstance(value, tuple) else list)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _is_like(value, example):
    """Whether two nests of dicts, lists and tuples have the same keys, types and shapes; int and float are one type."""
    if type(value) is not type(example) and {type(value), type(example)} != {int, float}:
        return False
    if isinstance(example, dict):
        return value.keys() == example.keys() and all(_is_like(value[key], example[key]) for key in example)
    if isinstance(example, (list, tuple)):
        return len(value) == len(example) and all(map(_is_like, value, example))
    return not isinstance(example, torch.Tensor) or (value.shape, value.dtype) == (example.shape, example.dtype)


def _like_param(state, param):
    """An optimizer's `state` of `param` in its memory layout: fused kernels check no shapes and strides."""
    tensors = {}
    for name, value in state.items():
        shape = () if name in ("step", "mu_product") else param.shape
        if value.shape != shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)} for weights of shape {tuple(param.shape)}")
        tensors[name] = value if shape == () else torch.empty_like(param, dtype=value.dtype).copy_(value)
    return tensors


def random_states(dls):
    """Every random state that a step draws from: python, numpy, torch, the device, the train loader's order."""
    _, keys, *rest = np.random.get_state()  # numpy's scalars are no plain values
    states = dict(python=random.getstate(), torch=torch.get_rng_state(), loader=dls.train.rng.getstate())
    states["numpy"] = [torch.from_numpy(keys.astype(np.int64)), *map(float, rest)]
    if dls.device.type != "cpu":
        device = [dls.device] if dls.device.type == "cuda" else []  # an older torch.mps takes none
        states[dls.device.type] = torch.get_device_module(dls.device).get_rng_state(*device)
    return states


def set_random_states(states, dls):
    """Restore what `random_states` returned; a device's own state only on such a device."""
    random.setstate(states["python"])
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(states["torch"])
    dls.train.rng.setstate(states["loader"])
    if dls.device.type in ("cuda", "mps") and dls.device.type in states:
        device = [dls.device] if dls.device.type == "cuda" else []
        torch.get_device_module(dls.device).set_rng_state(states[dls.device.type], *device)


def save_torch(path, value):
    """torch.save, atomically, with an OSError on a full disk (torch's own writer turns that into something else)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def _load(path, kind):
    """(value, size): what torch.save wrote to `path`, on the CPU, and the bytes of its structure without tensors."""
    try:
        with zipfile.ZipFile(check_regular(path)) as archive:  # torch's are not compressed; it ignores their checksums
            entries = archive.infolist()
            sizes = {entry.filename: entry.file_size for entry in entries}
            too_large = len(sizes) < len(entries) or sum(sizes.values()) > Path(path).stat().st_size
            if too_large or archive.testzip() is not None:
                raise ValueError("compressed, overlapping, or damaged")
        size = next(size for name, size in sizes.items() if name.endswith("data.pkl"))
        return torch.load(path, map_location="cpu", weights_only=True), size
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged or planted file fails in more ways than torch names
        planted = "Weights only" in str(error)
        cause = "it holds more than numbers, and might run code" if planted else "it is damaged, or something else"
        raise InputError(f"{path}: cannot be loaded as {kind}; {cause}") from None


def load_checkpoint(path):
    """What `Checkpoint` wrote to `path`, on the CPU; InputError for a file that is damaged or something else."""
    state, size = _load(path, "a checkpoint")
    if not (_is_plain(state, size) and _is_checkpoint(state) and state["version"] == _VERSION):
        raise InputError(f"{path}: not a checkpoint of cifar_fastai")
    return state


def _is_plain(value, max_nodes):
    """Whether `value` is nested dicts, lists and tuples of numbers, texts and tensors, and no more than its file holds.

    A list may contain another one several times, so that a small file unfolds into any number of nodes. So does a
    tensor with strides of 0.
    """
    nodes = [(value, 0)]
    for value, depth in nodes:  # which grow in the loop
        if type(value) is torch.Tensor:
            bytes_needed = value.numel() * value.element_size()
            if value.layout != torch.strided or bytes_needed > value.untyped_storage().nbytes():
                return False
        elif type(value) in (dict, list, tuple):
            children = [*value.keys(), *value.values()] if type(value) is dict else value
            if depth == _MAX_DEPTH or len(nodes) + len(children) > max_nodes:
                return False
            nodes += [(child, depth + 1) for child in children]
        elif type(value) not in (str, int, float, bool, type(None)):
            return False
    return True


def _is_checkpoint(state):
    """Whether the parts have their types and the history is one of as many epochs as were trained."""
    if type(state) is not dict or any(type(state.get(key)) is not kind for key, kind in _TYPES.items()):
        return False
    rows, lrs, moms = state["rows"], state["lrs"], state["moms"]
    if any(type(row) is not dict or {*map(type, row)} - {str} for row in rows):
        return False
    columns = history_columns(rows)
    if any(tuple(row) != columns for row in rows):
        return False
    numbers = [*moms, *(row[name] for row in rows for name in columns[1:])]
    epochs = [(type(row["epoch"]), row["epoch"]) for row in rows] == [(int, n + 1) for n in range(len(rows))]
    types = {*map(type, lrs)} <= {float} and {*map(type, numbers)} <= {float, type(None)}
    return epochs and types and 0 < state["epoch"] <= len(rows) and len(lrs) == len(moms)  # rows of earlier fits, too


def load_weights(model, path):
    """Load the state dict in `path` (model.pth, best.pth, model.safetensors) into `model`; InputError otherwise."""
    if Path(path).suffix != ".safetensors":
        return _load_state(model, _load(path, "weights")[0], path)
    check_extra("safetensors", "safetensors")
    from safetensors.torch import load

    try:
        state = load(Path(check_regular(path)).read_bytes())
    except Exception:  # safetensors has a type of its own
        raise InputError(f"{path}: cannot be loaded as weights; it is damaged, or something else") from None
    return _load_state(model, state, path)


def _load_state(model, state, path):
    try:
        model.load_state_dict(state)
    except Exception as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{path}: does not fit the network ({printable(first)})") from None
    return model


def latest_unfinished(recipe=None, runs="runs"):
    """The folder of the newest interrupted run under `runs` that no process is resuming; InputError if there is none.

    `recipe`: only runs of the recipe with this name. Folders that cannot be read or locked are skipped.
    """
    unfinished = []
    for path in Path(runs).glob("*/checkpoint.pth"):
        with suppress(OSError, InputError), lock_folder(path.parent) as free:
            if free and recipe in (None, read_json(path.with_name("config.json")).get("recipe")):
                unfinished.append((path.stat().st_mtime_ns, path.parent))
    if not unfinished:
        of_recipe = "" if recipe is None else f" of {recipe}"
        raise InputError(f"no interrupted run{of_recipe} under {runs}", resume="latest")
    return max(unfinished)[1]
