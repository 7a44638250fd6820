"""The progress line: a terminal sees how far and how long, and it is gone in the end; a log file sees none of it."""

import io
import itertools
import re
from types import SimpleNamespace

import pytest

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training import progress
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.progress import ConsoleProgress
from cifar_fastai.training.range_test import range_test

LINE = re.compile(r"\s*(\S*) +\[(=* *)\] ([a-z ]+), (\d+):(\d\d) left ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def learn(tiny_images, tiny_model):
    return cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu"), tiny_model)


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on a terminal whose clock goes on by a second at every look."""
    stream, seconds = Terminal(), itertools.count(1)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    return stream


def drawn(stream):
    """The lines that were drawn one over the other: (which epoch, marks of the bar, what, seconds left)."""
    found = [LINE.fullmatch(text.removesuffix("\033[K")) for text in stream.getvalue().split("\r") if "left" in text]
    assert all(len(match[2]) == 20 for match in found)
    return [(match[1], match[2].count("="), match[3], 60 * int(match[4]) + int(match[5])) for match in found]


def test_two_epochs(learn, terminal):
    steps = len(learn.dls.train)
    assert steps == 6
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01, cbs=ConsoleProgress())
    lines = drawn(terminal)
    trained = [line for line in lines if line[2] == "train"]
    assert [epoch for epoch, *_ in trained] == ["1/2"] * steps + ["2/2"] * steps
    assert [marks for _, marks, *_ in trained] == [3, 6, 10, 13, 16, 20] * 2
    assert [line[:2] for line in lines if line[2] == "evaluate"] == [("1/2", 20), ("2/2", 20)]
    left = [seconds for *_, seconds in trained]
    assert left[0] == 11 and left[-1] == 0, "a step takes a second of this clock, and 11 follow the first"
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_range_test(learn, terminal):
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(ConsoleProgress()):
        range_test(learn, num_it=20)
    lines = drawn(terminal)
    assert 10 < len(lines) <= 20
    assert [(marks, what) for _, marks, what, _ in lines] == [(n, "range test") for n in range(1, len(lines) + 1)]
    assert lines[0][-1] == 19
    assert terminal.getvalue().endswith("\r\033[K")


def test_a_log_file_gets_none_of_it(learn, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01, cbs=ConsoleProgress())
    assert stream.getvalue() == ""
