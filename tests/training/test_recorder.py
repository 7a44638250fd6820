"""The step loop does not wait for the device, its means are means, and the history is complete and exact."""

import csv
import io
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from hypothesis import given
from hypothesis import strategies as st
from tiny_net import TinyNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.training import recorder
from cifar_fastai.training.callbacks import L1Penalty, StopOnBadLoss
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test
from cifar_fastai.training.recorder import HISTORY_COLUMNS, Bounded, ConsoleProgress, read_history, write_history


class CountReads(TorchDispatchMode):
    """Count what makes a step wait: numbers read into Python, and copies to the host from another device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        elif func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu" and out.device.type == "cpu":
            self.reads += 1
        return out


def reads_in_training(images, cbs=(), bar=None, **kwargs):
    """The reads in an epoch of 480 steps: 20 times the images, in batches of 2."""
    train, labels = np.tile(images.train_images, (20, 1, 1, 1)), np.tile(images.train_labels, 20)
    pixels, labels = np.concatenate([train, images.test_images]), np.concatenate([labels, images.test_labels])
    dls = cifar_dls(replace(images, images=pixels, labels=labels, n_train=len(train)), bs=2, device="cpu")
    learn = cifar_learner(dls, TinyNet(), cbs=cbs, **kwargs)
    if bar is not None:
        learn.remove_cb(learn.progress)
        learn.add_cb(bar)
    counter = CountReads()
    with learn.no_logging(), counter:
        learn.fit_one_cycle(1, 0.1)
    assert len(learn.dls.train) == 480
    return counter.reads


SLOW = [dict(precision="bf16"), dict(opt="adam"), dict(precision="fp32", cbs=[StopOnBadLoss(), L1Penalty(1e-5)])]


@pytest.mark.parametrize("arguments", SLOW, ids=["bf16", "adam", "guarded"])
def test_fewer_than_one_read_in_seven_steps_on_a_slow_machine(tiny_images, arguments):
    assert reads_in_training(tiny_images, **arguments) < 480 / 7


def test_the_counter_sees_what_fastais_own_bar_reads(tiny_images):
    assert reads_in_training(tiny_images, bar=ProgressCallback()) >= 480


def test_losses_are_means_over_images(tiny_images):
    dls = cifar_dls(tiny_images, bs=6, val_bs=4, device="cpu", padding=0, cutout=0, flip=0.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    learn = cifar_learner(dls, model, wd=0.0, momentum=0.0, nesterov=False, precision="fp32")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.0)
    assert len(dls.valid_ds) % 4, "batches of different sizes, or the mean of means would do"
    (row,) = learn.history.rows
    for batches, split in ((dls.train, "train"), (dls.valid, "valid")):
        x, y = (torch.cat(parts).as_subclass(torch.Tensor) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            out = model(x)
        loss = nn.functional.cross_entropy(out, y).item()
        assert row[f"{split}_loss"] == pytest.approx(loss, rel=1e-5), "not smoothed"
        assert row[f"{split}_accuracy"] == pytest.approx((out.argmax(1) == y).float().mean().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu(tiny_images, monkeypatch):
    class NoWaiting(Callback):
        order = -100

        def before_batch(self):
            torch.cuda.set_sync_debug_mode("error" if self.training and self.train_iter > 2 else "default")

        def after_train(self):
            torch.cuda.set_sync_debug_mode("default")

    learn = cifar_learner(cifar_dls(tiny_images, bs=4, device="cuda"), "resnet18", cbs=NoWaiting())
    monkeypatch.setattr(Bounded, "due", lambda *args: False)
    with learn.no_logging():
        learn.fit_one_cycle(1, 0.01)


# History --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def learn(tiny_images, tiny_model):
    """A learner with 6 steps an epoch."""
    return cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu"), tiny_model, precision="fp32")


def fit(learn, n_epoch, lr=0.01, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, lr, **kwargs)


def test_the_history_goes_on_through_fits_and_is_written_after_every_epoch(learn, tmp_path, capsys):
    path = learn.history.path = tmp_path / "history.csv"
    learn.history.verbose, learn.history.eval_split, rows_on_disk = True, "valid", []

    class ReadFile(Callback):
        order = 66

        def after_epoch(self):
            rows_on_disk.append(len(read_history(path)))

    fit(learn, 2, cbs=ReadFile())
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
        range_test(learn, num_it=20)
    fit(learn, 1, lr=0.02)
    history = learn.history
    assert rows_on_disk == [1, 2] and read_history(path) == history.rows
    assert [row["epoch"] for row in history.rows] == [1, 2, 3] and history.lrs == [0.01] * 12 + [0.02] * 6
    assert len(history.moms) == 18 and [row["lr"] for row in history.rows] == [0.01, 0.01, 0.02]
    header, first, *_ = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and header.split("  ")[-1].strip() == "time" and "valid acc" in header
    row = history.rows[0]
    losses = [f"{row[f'{split}_loss']:.4f}" for split in ("train", "valid")]
    accuracies = [f"{row[f'{split}_accuracy']:.2%}" for split in ("train", "valid")]
    speed = f"{row['images_per_second']:,.0f}"
    assert first.split() == ["1/2", losses[0], accuracies[0], losses[1], accuracies[1], "0.01", speed, "0:00"]
    assert len(first) == len(header)


def test_a_resumed_fit_adds_to_the_restored_history(learn, tmp_path):
    fit(learn, 2)
    rows, lrs, moms = learn.history.rows[:1], learn.history.lrs[:6], learn.history.moms[:6]
    learn.history.rows, learn.history.lrs, learn.history.moms = rows, lrs, moms
    fit(learn, 3, start_epoch=1)
    assert [row["epoch"] for row in rows] == [1, 2, 3] and len(lrs) == 18 and learn.history.trained_epoch == 2


def test_a_history_and_a_range_test_show_themselves(learn):
    assert str(learn.history) == "no epoch yet"
    fit(learn, 2)
    header, *rows = str(learn.history).splitlines()
    assert header.split() == list(HISTORY_COLUMNS) and len(rows) == 2 and "<td>2</td>" in learn.history._repr_html_()
    with learn.no_bar():
        line = repr(range_test(learn, num_it=20))
    assert line.startswith("20 steps from lr 1e-05 to ") and "suggestions: valley " in line and "\n" not in line


def test_an_interrupted_epoch_leaves_nothing(learn):
    class Interrupt(Callback):
        def after_step(self):
            if self.train_iter == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(learn, 2, cbs=Interrupt())
    assert len(learn.history.rows) == 1 and len(learn.history.lrs) == 6


numbers = st.none() | st.floats(allow_nan=False)


@given(st.lists(st.tuples(*[numbers] * 7), max_size=4))
def test_history_csv_is_what_the_csv_module_writes_and_numbers_come_back_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "history.csv"
    rows = [dict(zip(HISTORY_COLUMNS, (epoch, *row), strict=True)) for epoch, row in enumerate(values, 1)]
    write_history(path, rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, HISTORY_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    assert path.read_bytes().decode() == text.getvalue()
    read = read_history(path)
    assert read == rows and all(type(row["epoch"]) is int for row in read)


def test_a_damaged_history_is_refused_in_a_line(tmp_path):
    for content in (b"", b"epoch,lr\n1,2,3\n4,5,6,7\n", b"epoch,lr\nx,1\n", b"\xff\xfe\x00"):
        (tmp_path / "history.csv").write_bytes(content)
        with pytest.raises(InputError, match="history.csv: cannot be read"):
            read_history(tmp_path / "history.csv")
    with pytest.raises(InputError, match=r"missing.csv: cannot be read \(No such file or directory\)"):
        read_history(tmp_path / "missing.csv")


# The console's progress line ------------------------------------------------------------------------------------------


def drawn(learn, train, monkeypatch, is_terminal=True):
    """The texts that `train` draws one over the other: [(description, bar, percentage)], and all that was written."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(recorder, "BAR_SECONDS", 0)
    with learn.added_cbs(ConsoleProgress()):
        train(learn)
    texts = re.findall(r"([\w/ ]+?) +\[(=* *)\] +(\d+) %, \d\d:\d\d left", stream.getvalue())
    return [(head.strip(), len(bar.rstrip()), int(percentage)) for head, bar, percentage in texts], stream.getvalue()


def test_the_progress_of_a_fit_a_range_test_and_an_evaluation(learn, monkeypatch):
    """An epoch: 6 steps of 8 images, three passes each, then 18 images of validation, one pass each."""
    texts, written = drawn(learn, lambda learn: fit(learn, 2), monkeypatch)
    passes = [24, 48, 72, 96, 120, 144, 162]
    done = [n / 324 for n in (*passes, *(162 + n for n in passes))]
    expected = [(f"{1 + k // 7}/2", math.floor(20 * part), round(100 * part)) for k, part in enumerate(done)]
    assert [text for text in texts if text[2]] == expected
    assert written.endswith("\r") and not written.split("\r")[-2].strip(), "the line is gone in the end"
    texts, _ = drawn(learn, lambda learn: range_test(learn, num_it=20), monkeypatch)
    assert texts[-1][0] == "range test" and 50 <= texts[-1][2] <= 100
    texts, _ = drawn(learn, lambda learn: predict(learn), monkeypatch)
    assert [text[2] for text in texts if text[0] == "evaluating"][-1] == 100


def test_a_log_file_gets_none_of_it(learn, monkeypatch):
    assert drawn(learn, lambda learn: fit(learn, 1), monkeypatch, is_terminal=False)[1] == ""
