"""What a run computes on: processes, device, precision, their names, and the versions that a result depends on."""

import ctypes
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import distributed

from cifar_fastai.errors import InputError
from cifar_fastai.settings import check_values

__all__ = [
    "autocast",
    "choose_device",
    "choose_precision",
    "hardware_name",
    "keep_freed_memory",
    "n_processes",
    "rank",
    "versions",
]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as numbered in glibc's malloc.h


def n_processes():
    """How many processes train together: those that `training.distributed.meet` has joined, else 1."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank():
    """The number of this process among those that train together, from 0."""
    return distributed.get_rank() if n_processes() > 1 else 0


def choose_device(device="auto"):
    """The torch.device with this name; "auto" is a GPU where there is one. InputError for a device that is absent."""
    name = str(device)
    check_values(device=name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if n_processes() > 1 and (device.index is not None or device.type == "mps"):
        raise InputError("each of several processes has a GPU of its own; use cuda", device=name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"torch sees {torch.cuda.device_count()} CUDA devices; try auto", device=name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("torch sees no Apple GPU; try auto", device=name)
    return device


def choose_precision(precision, device):
    """(precision, why): "fp32", "fp16" or "bf16" on `device`, a torch.device, and the reason in words.

    "auto" takes half precision only where the hardware computes in it: emulated bf16 is many times slower on a CPU.
    """
    check_values(precision=precision)
    if precision == "fp16" and device.type == "cpu":
        raise InputError("not available on a CPU; use bf16 or fp32", precision=precision)
    if precision != "auto":
        return precision, "as requested"
    if device.type == "cuda":
        with torch.cuda.device(device):  # which is not always the first
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bf16") if has_bf16 else ("fp16", "this GPU has no bf16")
    if device.type == "cpu":
        return ("bf16", "this CPU has bf16") if _cpu_has_bf16() else ("fp32", "this CPU has no bf16")
    return "fp32", f"the safe choice on {device.type}"


def _cpu_has_bf16():
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # an older torch
    return bool(is_supported and is_supported())


def autocast(device, precision):
    """The context in which a model computes in `precision` on `device`; in fp32 it changes nothing."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)


def hardware_name(device):
    """The GPU's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    n = torch.get_num_threads()
    return f"{name}, {n} thread{'s' * (n > 1)}" + (", Apple GPU" if device.type == "mps" else "")


def versions():
    """{name: version} of what a result depends on; git_commit is None unless the package lies in a checkout."""
    numbers = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "fastai", "cifar_fastai"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    try:  # an installed package may lie in a checkout of something else
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        numbers["git_commit"] = _git("rev-parse", "--short", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        numbers["git_commit"] = None
    return numbers


def _git(*words):
    git = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout


def keep_freed_memory():
    """Make this process keep the memory that tensors on the CPU free. True where the C library supports it.

    glibc maps every tensor of more than 32 MB anew, and the kernel then clears it page by page: up to a fifth of an
    epoch. The price is a higher peak, because freed pieces that fit no later tensor stay with the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # Windows, macOS, musl
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))  # map nothing, return nothing
