"""Mixed precision on every device: what was asked for, what the hardware has, and the callback that does it."""

import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.optimizer import OptimWrapper

from cifar_fastai.errors import InputError
from cifar_fastai.names import PRECISIONS, check_name

__all__ = ["Precision", "ScaledStep", "autocast", "choose_device", "choose_precision", "torch_optimizer"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device, precision):
    """The context in which a model computes in `precision` on `device`; for fp32 it changes nothing."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def torch_optimizer(opt):
    """The torch optimizer that a Learner's `opt` wraps, or fastai's own as it is."""
    return opt.opt if isinstance(opt, OptimWrapper) else opt


def choose_device(name="auto"):
    """The torch.device for `name`: auto takes a GPU where there is one. InputError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; try --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch sees no Apple GPU; try --device auto")
    return device


def choose_precision(name, device):
    """(precision, reason): "fp32", "fp16" or "bf16" for `name` on `device`.

    auto takes half precision only where the hardware computes in it: bf16 emulated on a CPU is many times slower.
    """
    check_name("--precision", name, PRECISIONS)
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: on a CPU take bf16 or fp32")
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        with torch.cuda.device(device):  # which is not always the first
            has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has it") if has_it else ("fp16", "this GPU has no bf16")
    if device.type == "cpu":
        return ("bf16", "this CPU has it") if _cpu_has_bf16() else ("fp32", "this CPU has no bf16")
    return "fp32", f"the safe choice on {device.type}"


def _cpu_has_bf16():
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # an older torch
    return bool(asked and asked())


class Precision(Callback):
    """Autocast around the model, in training and evaluation, on any device; the loss is computed in float32.

    fastai's own `MixedPrecision` enters autocast("cuda") only, which leaves a CPU in float32. float16 needs
    `ScaledStep` beside it, which `cifar_learner` adds.
    """

    order = 10

    def __init__(self, precision="bf16"):
        self.precision, self.autocast = precision, None

    def before_batch(self):
        self.leave()
        self.autocast = autocast(next(self.model.parameters()).device, self.precision)
        self.autocast.__enter__()

    def after_pred(self):
        self.leave()
        self.learn.pred = self.pred.float()

    def after_cancel_batch(self):
        self.leave()

    def leave(self):
        """Go back to float32; `CifarLearner` sees to it after an error in the model too."""
        if self.autocast is not None:
            self.autocast.__exit__(None, None, None)
            self.autocast = None

    def __getstate__(self):
        return {**self.__dict__, "autocast": None}


class ScaledStep(Callback):
    """float16's other half: the loss is scaled up before backward, the gradients down before the step.

    With a fused optimizer the check for overflow stays on the device. It runs after what reads gradients (clipping).
    """

    order = 90

    def __init__(self):
        self.scaler = None

    def before_fit(self):
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(self.dls.device.type)

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def after_backward(self):
        self.scaler.unscale_(torch_optimizer(self.opt))

    def before_step(self):
        self.scaler.step(torch_optimizer(self.opt))
        self.scaler.update()
        raise CancelStepException  # the step is done, or was left out for its overflow

    def __getstate__(self):
        return {**self.__dict__, "scaler": None}
