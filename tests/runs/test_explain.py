"""recipes/explain.py: what it says and draws of a run's errors and of any image files, and what it refuses."""

import runpy
import shutil
from pathlib import Path

import pytest
import sklearn.datasets
from PIL import Image

from cifar_fastai import load_run, predict_files
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.plots.galleries import plot_gradcam
from cifar_fastai.runs import explain
from cifar_fastai.runs.explain import explain_run

EXPLAIN = Path(__file__).parents[2] / "recipes" / "explain.py"


@pytest.fixture
def run(tiny, tmp_path):
    """The folder of a finished run on the tiny network."""
    return tiny.train(tmp_path / "run", epochs=1).folder


@pytest.fixture
def photo(tmp_path):
    """An ordinary photograph, which comes with scikit-learn: 640 x 427."""
    return Path(shutil.copy(Path(sklearn.datasets.__file__).parent / "images" / "china.jpg", tmp_path / "photo.jpg"))


def listed(text):
    """Index, true class and the most probable class of every line of the table."""
    rows = [line.replace(",", " ").split() for line in text.splitlines() if " true " in line]
    return [(int(row[0]), row[2], row[3]) for row in rows]


def test_the_table_is_that_of_predictions_csv(run, monkeypatch, capsys):
    """Without another pass over the split."""
    monkeypatch.setattr("cifar_fastai.evaluation.learner_methods.predict", lambda *_: pytest.fail("another pass"))
    picture = explain_run(run, n=5)
    rows = Predictions.from_csv(run / "predictions.csv")
    text = capsys.readouterr().out
    assert f"{len(rows.errors)} of 18 test images" in text and len(rows.errors) >= 5
    assert listed(text) == [
        (rows.indices[k], rows.classes[rows.targets[k]], rows.classes[rows.predicted[k]]) for k in rows.misclassified(5)
    ]
    assert picture == run / "explain.png" and Image.open(picture).width > 300


@pytest.mark.parametrize("no_test, split", [(False, "test"), (True, "valid")])
def test_the_split_is_that_of_predictions_csv(tiny, tmp_path, capsys, no_test, split):
    """A run with a validation split is still evaluated on test, except under `no_test`."""
    run = tiny.train(tmp_path / "run", epochs=1, valid_pct=0.25, no_test=no_test, bs=4).folder
    rows = Predictions.from_csv(run / "predictions.csv")
    capsys.readouterr()
    explain_run(run, n=3)
    text = capsys.readouterr().out
    assert f"{len(rows.errors)} of {len(rows)} {split} images" in text
    assert [index for index, *_ in listed(text)] == rows.indices[rows.misclassified(3)].tolist()


def test_files_need_no_data_set(run, photo, tiny_folder, tmp_path, monkeypatch, capsys):
    """On a machine that has the run alone, and the same answer as with the data."""
    moved = shutil.move(run, tmp_path / "moved")
    capsys.readouterr()
    drawn = {}
    with monkeypatch.context() as patch:
        patch.setattr("cifar_fastai.runs.run.load_images", lambda *_, **__: pytest.fail("the images were read"))
        patch.setattr(
            explain, "plot_gradcam", lambda *args, **words: drawn.update(words) or plot_gradcam(*args, **words)
        )
        picture = explain_run(moved, [photo], layer="layer1", out=tmp_path / "why.png")
    assert drawn["names"] == ["photo.jpg"]
    text = capsys.readouterr().out
    assert picture.exists() and "photo.jpg" in text and "640 x 427, cropped" in text
    learn, _ = load_run(moved, data=str(tiny_folder))
    with learn.no_bar():
        (prediction,) = predict_files(learn, [photo])
    assert all(f"{name} {probability:.1%}" in text for name, probability in prediction.top3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(images=["missing.png"]), "No such file"),
        (dict(images=["notes.txt"]), "not an image"),
        (dict(method="GradCam+"), "did you mean GradCAM"),
        (dict(target="plane"), "no such name; choose from predicted, blue, green, red"),
        (dict(images=["photo.jpg"], target="true"), "the true class of a file is unknown"),
        (dict(layer="layer9"), "did you mean layer"),
        (dict(n=0), "must be from 1 to 100"),
        (dict(out="why.jpg"), "ends in .png"),
    ],
)
def test_a_wrong_word_ends_in_one_line_before_the_work(run, photo, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(photo.parent)
    (photo.parent / "notes.txt").write_text("no picture")
    words = [str(run)]
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr("sys.argv", ["explain.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXPLAIN), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")
