"""The two pictures of a notebook: what they show, on learners with and without errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from matplotlib.figure import Figure
from torch import nn

from cifar_fastai.data.loaders import cifar_dls, test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation import learner_methods as interpret
from cifar_fastai.evaluation.learner_methods import split_batch
from cifar_fastai.evaluation.predictions import Predictions, predict
from cifar_fastai.training.history import History
from cifar_fastai.training.learner import cifar_learner

torch.set_num_threads(1)


@pytest.fixture
def learn(tiny_images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    learn = cifar_learner(cifar_dls(tiny_images, bs=8, val_bs=5, device="cpu"), net, precision="fp32")
    with learn.no_bar():
        yield learn


@pytest.fixture
def drawn(monkeypatch):
    """The arguments that reach the drawing functions."""
    calls = {}

    def spy(name):
        draw = getattr(interpret, name)
        monkeypatch.setattr(interpret, name, lambda *args, **kw: calls.update({name: args}) or draw(*args, **kw))

    spy("plot_tiles")
    spy("draw_gradcam")
    return calls


def test_split_batch_is_what_the_split_holds(learn, tiny_images):
    x, images = split_batch(learn, learn.dls.valid, [3, 17, 0])
    assert (images == tiny_images.test_images[[3, 17, 0]].transpose(0, 2, 3, 1)).all() and images.dtype == np.uint8
    whole = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])
    torch.testing.assert_close(x, whole[[3, 17, 0]])
    x, images = split_batch(learn, learn.dls.valid, [])
    assert x.shape == (0, 3, 32, 32) and images.shape == (0, 32, 32, 3)


def test_misclassified(learn, tiny_images, drawn):
    preds = predict(learn)
    assert len(preds.errors) > 4
    assert isinstance(learn.plot_misclassified(4), Figure)
    images, true, predicted, confidence, losses = drawn["plot_tiles"]
    worst = preds.errors[:4]
    assert (images == tiny_images.test_images[worst].transpose(0, 2, 3, 1)).all()
    assert true == [tiny_images.classes[k] for k in preds.targets[worst]]
    assert predicted == [tiny_images.classes[k] for k in preds.predicted[worst]] and true != predicted
    assert (confidence == preds.confidence[worst]).all() and (losses == preds.losses[worst]).all()
    assert (np.diff(losses) <= 0).all()


def test_gradcam(learn, drawn):
    preds = predict(learn)
    worst = preds.errors[:3]
    cases = ("predicted", preds.predicted[worst]), ("true", preds.targets[worst]), ("blue", [2] * 3), (1, [1] * 3)
    for target, expected in cases:
        assert isinstance(learn.plot_gradcam(3, target=target), Figure)
        (heat,) = drawn["draw_gradcam"][1]
        assert (heat.targets == expected).all() and heat.layer == "1" and heat.map_size == (8, 8)
    learn.plot_gradcam(3, layer=["0", "1"], target="both", method="LayerCAM", preds=preds)
    heats = drawn["draw_gradcam"][1]
    assert [heat.layer for heat in heats] == ["0", "0", "1", "1"] and {heat.method for heat in heats} == {"LayerCAM"}
    assert (heats[0].targets == preds.predicted[worst]).all() and (heats[1].targets == preds.targets[worst]).all()


def test_given_predictions_spare_the_pass(learn, monkeypatch):
    preds = predict(learn)
    monkeypatch.setattr(interpret, "predict", None)
    learn.plot_misclassified(2, preds=preds)
    learn.plot_gradcam(2, preds=preds)
    train = learn.dls.test_dl(list(range(48)), with_labels=True)
    monkeypatch.undo()
    for dl in train, test_dl(learn.dls):
        assert isinstance(learn.plot_gradcam(2, dl=dl), Figure)


def test_predictions_of_another_split_are_refused(learn):
    preds = predict(learn, learn.dls.test_dl(list(range(48)), with_labels=True))
    for plot in learn.plot_misclassified, learn.plot_gradcam, learn.plot_class_accuracy:
        with pytest.raises(InputError, match="predictions of 48 images, and the split has 18"):
            plot(preds=preds)


def test_without_errors(learn):
    preds = predict(learn)
    right = Predictions(
        np.eye(3, dtype=np.float32)[preds.targets], preds.targets, preds.losses, preds.indices, preds.classes
    )
    for figure, words in (
        (learn.plot_misclassified(preds=right), "no misclassified images"),
        (learn.plot_gradcam(preds=right), "no images to explain"),
    ):
        assert not figure.axes and words in [text.get_text() for text in figure.texts]


def test_a_plain_learner(learn):
    plain = Learner(learn.dls, learn.model, CrossEntropyLossFlat(), cbs=History())
    with plain.no_bar(), plain.no_logging():
        plain.fit(1, 0.01)
        figures = plain.plot_misclassified(2), plain.plot_gradcam(2), plain.plot_class_accuracy(), plain.plot_curves()
    assert all(figure.axes for figure in figures) and plain.plot_schedule().axes


SHOW = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support

shell = InteractiveShell.instance()
configure_inline_support(shell, "module://matplotlib_inline.backend_inline")
with capture_output() as shown:
    shell.run_cell("from cifar_fastai.plots.galleries import plot_tiles; import numpy as np")
    shell.run_cell("plot_tiles(np.zeros((5, 32, 32, 3), np.uint8), ['cat'] * 5, ['dog'] * 5, [0.9] * 5)")
    shell.run_cell("plot_tiles(np.zeros((0, 32, 32, 3), np.uint8), [], [], [])")
for output in shown.outputs:
    print(output.data["image/png"][:8], output.metadata["image/png"]["width"])
"""


def test_a_notebook_shows_each_figure_once_and_fine():
    """With `%matplotlib inline`, as on Colab; matplotlib's own formatter leaves out a figure without axes."""
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    (image, width), (words, narrow) = [line.split() for line in done.stdout.splitlines()]
    assert image == words == "iVBORw0K" and (width, narrow) == ("840", "550")


def test_errors_are_plain(learn):
    for call, said in (
        (lambda: learn.plot_misclassified(0), "n 0: give how many"),
        (lambda: learn.plot_gradcam(-1), "n -1"),
        (lambda: learn.plot_gradcam(layer="7"), "layer 7: no such layer"),
        (lambda: learn.plot_gradcam(target="truth"), "target truth: no such class"),
        (lambda: learn.plot_gradcam(method="Grad-CAM"), "did you mean GradCAM"),
    ):
        with pytest.raises(InputError, match=said):
            call()
