"""Speed of our epoch, pipeline, step and start, beside the limit of the hardware and the usual scripts.

    python recipes/benchmark.py
    python recipes/benchmark.py --quick --json numbers.json

One table: rows take turns, round after round; the numbers are medians over the rounds. "ours is 2.50x": ours is 2.5
times as fast as this row, the median of the rounds, each compared within itself. Spread: slowest round minus fastest,
as a fraction of the median.
"""

import sys
from pathlib import Path

from cifar_fastai.cli import start

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not part of the package


def main(
    data: str = "auto",  # auto, cifar10, digits, or a folder or archive of images
    device: str = "auto",  # auto, cpu, cuda, cuda:N or mps
    precision: str = "auto",  # Of ours and the limit: auto, fp32, fp16 or bf16
    compile: str = "auto",  # torch.compile for ours and the limit: auto (as for 20 epochs), yes or no
    bs: int = None,  # Batch size (default: 512 on a GPU, else 128)
    minutes: float = 15.0,  # Time for the epoch's rows on a CPU
    steps: int = None,  # Steps of an epoch that are timed in each round, and scaled to 50,000 images
    repeats: int = None,  # Rounds (default: 5)
    json: str = None,  # Write all numbers into this file
    quick: bool = False,  # Only try it out: a few small steps of a few images
):
    "Measure epoch, input pipeline, cost per step and start, ours and others', and print one table."
    from benchmarks.run import run_benchmark  # loads torch, which --help does not need

    return run_benchmark(data, device, precision, compile, bs, minutes, steps, repeats, json, quick)


if __name__ == "__main__":
    start(main)
