"""The cost of a start, measured in a process of its own, which prints it as JSON on its last line.

    python -m benchmarks.startup load DATA
    python -m benchmarks.startup train DATA DEVICE PRECISION BS

DATA is an argument of `load_images`; CIFAR_FASTAI_CACHE is the folder of the cache. Times are seconds since 1970.
"""

import json
import sys
import time
from pathlib import Path

__all__ = ["load", "peak_memory", "train"]


def load(data):
    """Seconds that `load_images` takes here, imports left out: it decodes, or reads the cache."""
    from cifar_fastai.data.images import load_images

    start = time.perf_counter()
    load_images(data, progress=False)
    return {"seconds": time.perf_counter() - start}


def train(data, device, precision, bs):
    """The times at which the first training step begins and is done."""
    import torch
    from fastai.callback.core import Callback, CancelFitException

    import cifar_fastai.runs.train  # noqa: F401  (all that a recipe imports)
    from cifar_fastai.data.images import load_images
    from cifar_fastai.data.loaders import cifar_dls
    from cifar_fastai.hardware import keep_freed_memory
    from cifar_fastai.training.learner import cifar_learner

    device, report = torch.device(device), {}

    class FirstStep(Callback):
        order = 1000

        def before_batch(self):
            report["begins"] = time.time()

        def after_batch(self):
            self.loss.item()  # waits for the device
            report["done"] = time.time()
            raise CancelFitException

    if device.type == "cpu":
        keep_freed_memory()
    images = load_images(data, progress=False)
    learn = cifar_learner(cifar_dls(images, int(bs), device=device), precision=precision)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, cbs=FirstStep())
    return report


def peak_memory():
    """The peak memory of this process so far, in bytes; None where the system does not report it.

    On Linux from /proc, because `ru_maxrss` includes the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kib = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        return None if kib is None else int(kib) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    report = {"load": load, "train": train}[what](*arguments)
    print(json.dumps(report | {"peak_bytes": peak_memory()}))
