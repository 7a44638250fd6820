"""TensorBoard reads what the log holds; a full disk ends in one error."""

import matplotlib.pyplot as plt
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.loggers import TensorBoardLog


@pytest.fixture
def learn(tiny_images, tiny_model):
    return cifar_learner(cifar_dls(tiny_images, bs=8, device="cpu"), tiny_model)


def fit(learn, log, n_epoch, start_epoch=0):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 0.01, cbs=log, start_epoch=start_epoch)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return events, {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_every_step_every_epoch_and_the_pictures_stand_in_it_once(learn, tmp_path):
    fit(learn, TensorBoardLog(tmp_path), 2)
    history = learn.history
    del history.rows[1:], history.lrs[6:], history.moms[6:]  # as if the second epoch had been interrupted
    log = TensorBoardLog(tmp_path)  # as of a resumed run
    fit(learn, log, 3, start_epoch=1)
    metrics = dict(test_accuracy=0.5, tta_accuracy=0.75, tta_shift_accuracy=None)
    log.add_results(metrics, {"curves": plt.figure(figsize=(2, 1), dpi=50)}, 18)
    events, scalars = read(tmp_path)
    assert [step for step, _ in scalars["step/loss"]] == list(range(18))
    assert scalars["step/lr"] == [(step, pytest.approx(0.01)) for step in range(18)] and "step/momentum" in scalars
    losses = [(6 * row["epoch"] - 1, pytest.approx(row["train_loss"])) for row in history.rows]
    assert scalars["epoch/train_loss"] == losses and "epoch/test_accuracy" in scalars
    finals = {tag: values for tag, values in scalars.items() if tag.startswith("final")}
    assert finals == {"final/test_accuracy": [(17, 0.5)], "final/tta_accuracy": [(17, 0.75)]}
    (picture,) = events.Images("pictures/curves")
    assert (picture.width, picture.height, picture.step) == (100, 50, 17)


def test_a_folder_that_cannot_be_written_is_one_error(learn, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        fit(learn, TensorBoardLog(tmp_path / "file"), 1)
    assert error.value.filename == str(tmp_path / "file") and capfd.readouterr().err == ""


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
        fit(learn, TensorBoardLog(folder), 1)
    assert error.value.filename == str(folder) and not list(other.iterdir())
