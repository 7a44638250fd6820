"""Device, precision, and memory that is kept: counted by the pages that the kernel hands out."""

import subprocess
import sys

import pytest
import torch

from cifar_fastai import hardware
from cifar_fastai.errors import InputError
from cifar_fastai.hardware import choose_device, choose_precision

CPU = torch.device("cpu")


def test_auto_takes_bf16_on_a_cpu_only_where_the_hardware_has_it(monkeypatch):
    for name, expected in (("avx512_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True}, raising=False)
        assert choose_precision("auto", CPU)[0] == expected
    assert choose_precision("bf16", CPU) == ("bf16", "as requested")


@pytest.mark.parametrize("name, message", [("fp16", "not available on a CPU; use bf16 or fp32"), ("bf61", "mean bf16")])
def test_a_precision_that_cannot_be_used(name, message):
    with pytest.raises(InputError, match=f"precision='{name}': .*{message}"):
        choose_precision(name, CPU)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps" if not torch.backends.mps.is_available() else "cuda:98"])
def test_a_device_that_is_absent(name):
    with pytest.raises(InputError, match=f"device='{name}': "):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_processes_do_not_share_a_gpu(name, monkeypatch):
    monkeypatch.setattr(hardware, "n_processes", lambda: 2)
    with pytest.raises(InputError, match="each of several processes has a GPU of its own"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


FAULTS = """
import resource
import torch
from cifar_fastai.hardware import keep_freed_memory

kept = {keep} and keep_freed_memory()

def step():
    layers = [torch.ones(12 * 2**20) for _ in range(4)]  # 48 MB each, 12,288 pages of 4 KB
    layers += [layer + 1 for layer in layers]

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep):
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    kept, n = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return kept == "True", int(n)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the settings")
def test_freed_memory_is_used_again():
    kept, n_faults = page_faults(True)
    assert kept and n_faults < page_faults(False)[1] / 4
