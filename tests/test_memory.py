"""Memory that was freed is used again; told by the pages that the kernel has to hand out."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from cifar_fastai.hardware import keep_freed_memory

told = {kept} and keep_freed_memory()

def step():
    layers = [torch.ones(12 * 2**20) for _ in range(4)]  # 48 MB each, 12,288 pages of 4 KB
    layers += [layer + 1 for layer in layers]

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept):
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    told, n = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return told == "True", int(n)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that can be told")
def test_what_is_freed_is_seldom_asked_for_again():
    told, kept = faults(True)
    assert told and kept < faults(False)[1] / 4
