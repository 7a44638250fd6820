"""TensorBoard and Weights & Biases read what the logs hold; a full disk ends in one error."""

import json
import struct

import matplotlib.pyplot as plt
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from wandb.proto.wandb_internal_pb2 import Record

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.training import loggers
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.loggers import TensorBoardLog, WandbLog

METRICS = dict(test_accuracy=0.5, valid_accuracy=0.25, tta_accuracy=0.75, tta_shift_accuracy=None)
RESULTS = {"final/test_accuracy": 0.5, "final/test_tta_accuracy": 0.75}


@pytest.fixture
def learn(tiny_images, tiny_model):
    return cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu"), tiny_model)


def fit(learn, log, n_epoch, start_epoch=0):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 0.01, cbs=log, start_epoch=start_epoch)


def train_and_resume(learn, log):
    """Three epochs of six steps; the second was interrupted in the middle, and made again with a log of its own."""
    fit(learn, log(), 2)
    del learn.history.rows[1:], learn.history.lrs[6:], learn.history.moms[6:]
    fit(learn, log(), 3, start_epoch=1)
    (log,) = learn.history.logs.values()
    log.add_results(METRICS, {"curves": plt.figure(figsize=(2, 1), dpi=50)}, 18)
    return {6 * row["epoch"] - 1: pytest.approx(row["train_loss"]) for row in learn.history.rows}


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return events, {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_every_step_every_epoch_and_the_pictures_once(learn, tmp_path):
    losses = train_and_resume(learn, lambda: TensorBoardLog(tmp_path))
    events, scalars = read(tmp_path)
    assert [step for step, _ in scalars["step/loss"]] == list(range(18))
    assert scalars["step/lr"] == [(step, pytest.approx(0.01)) for step in range(18)] and "step/momentum" in scalars
    assert dict(scalars["epoch/train_loss"]) == losses and "epoch/test_accuracy" in scalars
    finals = {tag: values for tag, values in scalars.items() if tag.startswith("final")}
    assert finals == {tag: [(17, value)] for tag, value in RESULTS.items()}
    (picture,) = events.Images("pictures/curves")
    assert (picture.width, picture.height, picture.step) == (100, 50, 17)


def test_tensorboard_shows_the_settings_beside_the_results(learn, tmp_path):
    log = TensorBoardLog(tmp_path)
    fit(learn, log, 1)
    log.add_results(METRICS | dict(test_accuracy=None), {}, 6)
    events, scalars = read(tmp_path)
    hparams = events.PluginTagToContent("hparams")
    values = parse_session_start_info_plugin_data(hparams["_hparams_/session_start_info"]).hparams
    assert values["wd"].number_value == learn.settings["wd"] and values["opt"].string_value == "sgd"
    assert {"final/valid_accuracy", "final/valid_tta_accuracy"} <= scalars.keys(), "nothing is of the test split"
    assert b"final/valid_accuracy" in hparams["_hparams_/experiment"]


def wandb_records(path):
    """The records of a .wandb file, a log as LevelDB writes it: blocks of 32 KiB, chunks with a header of 7 bytes."""
    content, position, parts = path.read_bytes(), 7, []
    assert content.startswith(b":W&B")
    while position < len(content):
        if (left := -position % 32768) < 7 and left:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield Record.FromString(b"".join(parts))
            parts = []


def test_wandb_keeps_the_same_offline(learn, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    losses = train_and_resume(learn, lambda: WandbLog(tmp_path, dict(epochs=3, opt="sgd")))
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "one run, though it was resumed"
    history, config = {}, {}
    for folder in folders:
        for record in wandb_records(next(folder.glob("*.wandb"))):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history.setdefault(row.get("_step"), {}).update(row)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert {step: row["epoch/train_loss"] for step, row in history.items() if "epoch/train_loss" in row} == losses
    assert [step for step in history if step is not None] == list(range(18))
    assert all({"step/loss", "step/lr", "step/momentum"} <= row.keys() for step, row in history.items() if step)
    assert (config["epochs"], config["opt"]) == (3, "sgd")
    assert {tag: history[17][tag] for tag in RESULTS} == RESULTS and "epoch/test_accuracy" in history[17]
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/**/*.png")
    assert Image.open(picture).size == (100, 50)


@pytest.mark.parametrize("log", loggers.LOGGERS.values())
def test_what_is_not_installed_is_named(log, tmp_path, monkeypatch):
    name = next(name for name in loggers.LOGGERS if loggers.LOGGERS[name] is log)
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(InputError, match=rf'{name} is not installed: pip install "cifar_fastai\[{name}\]"'):
        log(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_error(learn, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        fit(learn, TensorBoardLog(tmp_path / "file"), 1)
    assert error.value.filename == str(tmp_path / "file" / "tensorboard") and capfd.readouterr().err == ""


@pytest.mark.parametrize("link", ["", "file"])
def test_a_planted_link_is_not_written_through(learn, tmp_path, monkeypatch, link):
    folder, other = tmp_path / "tensorboard", tmp_path / "other"
    other.mkdir()
    if link:
        monkeypatch.setattr("socket.gethostname", lambda: "host")
        monkeypatch.setattr("os.getpid", lambda: 1)
        monkeypatch.setattr("time.time", lambda: 1.0)
        folder.mkdir()
        (folder / "events.out.tfevents.1.host.1").symlink_to(other / "planted")
    else:
        folder.symlink_to(other)
    with pytest.raises(OSError) as error:
        fit(learn, TensorBoardLog(tmp_path), 1)
    assert error.value.filename == str(folder) and not list(other.iterdir())
