"""Fair timing on a noisy machine: rows take turns, the clock waits for the device, medians are compared."""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Clock", "Result", "Row", "markdown_table", "take_turns"]


class Clock:
    """Times one pass over `steps` steps: `start()`, then `step()` after each, until that returns True.

    The first `warm` steps are timed apart, because they include the costs that an epoch has once (its order, its
    workers, the wait for the first batch). `seconds` limits the time of the other steps. Only reading the clock waits
    for the device.
    """

    def __init__(self, device, steps, warm=1, seconds=math.inf):
        self.device, self.steps, self.warm, self.limit = device, steps, warm, seconds

    def start(self):
        self.done, self.began = 0, self._now()

    def step(self):
        self.done += 1
        if self.done == self.warm:
            self.warmed = self._now()
        if self.done <= self.warm:
            return False
        if self.done < self.steps and time.perf_counter() - self.warmed < self.limit:
            return False
        self.ended = self._now()
        return True

    @property
    def per_step(self):
        """Seconds of a step after the warm ones."""
        return (self.ended - self.warmed) / (self.done - self.warm)

    def seconds_for(self, steps):
        """Seconds that a pass over `steps` steps takes: as measured, or scaled, the warm ones counted once."""
        return self.warmed - self.began + (steps - self.warm) * self.per_step

    def _now(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """Something to be timed: `run(clock)` goes through one pass."""

    name: str
    run: Callable
    goal: float | None = None  # how many times as fast as this row ours should be
    note: str | None = None


@dataclass
class Result:
    """The measurements of a row: one number of `seconds` a round, for one epoch, image, step or start."""

    group: str
    name: str
    unit: str  # what `seconds` are the time of
    seconds: list[float]
    images: int = 0  # processed in this time, where that applies
    peak_bytes: int | None = None
    ours: "Result | None" = None  # the row it is compared with
    goal: float | None = None
    limit: float | None = None  # of seconds
    note: str | None = None

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def spread(self):
        """Slowest minus fastest round, as a fraction of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def ratio(self):
        """How many times as fast ours is: the median over the rounds, each compared within itself."""
        if self.ours is None:
            return None
        return statistics.median(a / b for a, b in zip(self.seconds, self.ours.seconds, strict=True))

    @property
    def images_per_second(self):
        return self.images / self.median if self.images else None

    @property
    def met(self):
        if self.goal is not None:
            return self.ratio >= self.goal
        return None if self.limit is None else self.median <= self.limit

    def as_dict(self):
        """Everything, for JSON; times in seconds, memory in bytes."""
        return {
            "group": self.group,
            "row": self.name,
            "unit": self.unit,
            "seconds": self.seconds,
            "median": self.median,
            "spread": self.spread,
            "images_per_second": self.images_per_second,
            "ratio": self.ratio,
            "peak_bytes": self.peak_bytes,
            "goal": self.goal,
            "limit": self.limit,
            "met": self.met,
            "note": self.note,
        }


def take_turns(title, rows, repeats, new_clock):
    """Time `rows` in the order A B C A B C ...: {name: [clock of round 1, clock of round 2, ...]}."""
    clocks = {row.name: [] for row in rows}
    for done in range(repeats):
        for row in rows:
            progress(f"{title}: round {done + 1} of {repeats}, {row.name}")
            clock = new_clock()
            gc.collect()
            row.run(clock)
            clocks[row.name].append(clock)
    progress()
    return clocks


def progress(text=""):
    """Show the current work on a terminal; a log file gets none of it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def markdown_table(results):
    """The results as lines of one Markdown table that reads well as plain text, too."""
    header = ["what", "who", "time", "images/s", "ours is", "goal", "spread", "peak memory"]
    rows = [header, *(_cells(result) for result in results)]
    for above, below in zip(rows[-2::-1], rows[:0:-1], strict=True):
        if above[0] == below[0]:
            below[0] = ""  # a group is named once
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        " | ".join(
            [
                *(cell.ljust(w) for cell, w in zip(row[:2], widths, strict=False)),
                *(cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in rows
    ]
    rule = "|".join(["-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths)])
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]


def _cells(result):
    rate, ratio, peak = result.images_per_second, result.ratio, result.peak_bytes
    goal = f"{result.goal:g}x" if result.goal is not None else f"{result.limit:g} s" if result.limit is not None else ""
    return [
        result.group,
        result.name,
        _duration(result.median) + (f"/{result.unit}" if result.unit != "start" else ""),
        "" if rate is None else f"{rate:,.0f}",
        "" if ratio is None else f"{ratio:.2f}x",
        goal and f"{goal}, {'met' if result.met else 'missed'}",
        f"{result.spread:.1%}",
        "" if peak is None else f"{peak / 2**20:,.0f} MiB",
    ]


def _duration(seconds):
    value, unit = next(
        ((seconds / size, unit) for unit, size in (("s", 1), ("ms", 1e-3)) if seconds >= size), (seconds / 1e-6, "us")
    )
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"
