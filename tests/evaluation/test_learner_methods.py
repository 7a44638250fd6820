"""The pictures that a Learner draws: what they show, on learners with and without errors."""

import numpy as np
import pytest
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from matplotlib.figure import Figure

from cifar_fastai.data.loaders import test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation import learner_methods
from cifar_fastai.evaluation.predictions import Predictions, predict
from cifar_fastai.plots import galleries
from cifar_fastai.training.recorder import History


@pytest.fixture
def drawn(monkeypatch):
    """The positional arguments that reach the drawing functions."""
    calls = {}

    def spy(name, draw):
        monkeypatch.setattr(galleries, name, lambda *args, **kw: calls.update({name: args}) or draw(*args, **kw))

    spy("plot_tiles", galleries.plot_tiles)
    spy("plot_gradcam", galleries.plot_gradcam)
    return calls


def title(figure):
    return " ".join(figure.get_suptitle().split())


def test_misclassified(learn, tiny_images, drawn):
    preds = predict(learn)
    worst, total = preds.errors[:4], len(preds.errors)
    assert title(learn.plot_misclassified(4)) == f"4 of {total} misclassified images, highest loss first" and total > 4
    images, true, predicted, confidence, losses = drawn["plot_tiles"]
    assert (images == tiny_images.test_images[worst].transpose(0, 2, 3, 1)).all()
    assert true == [tiny_images.classes[k] for k in preds.targets[worst]]
    assert predicted == [tiny_images.classes[k] for k in preds.predicted[worst]] and true != predicted
    assert (confidence == preds.confidence[worst]).all() and (losses == preds.losses[worst]).all()
    assert (np.diff(losses) <= 0).all()
    figure = learn.plot_misclassified(1, preds=preds, true=true[0], predicted=predicted[0])
    assert f"misclassified images of {true[0]} predicted as {predicted[0]}, highest" in title(figure)


def test_gradcam(learn, drawn):
    preds = predict(learn)
    worst = preds.errors[:3]
    cases = ("predicted", preds.predicted[worst]), ("true", preds.targets[worst]), ("blue", [2] * 3), (1, [1] * 3)
    for target, expected in cases:
        figure = learn.plot_gradcam(3, target=target)
        (heat,) = drawn["plot_gradcam"][1]
        assert (heat.targets == expected).all() and heat.layer == "bn" and heat.map_size == (15, 15)
        assert title(figure).startswith(f"3 of {len(preds.errors)} misclassified images, highest loss first GradCAM")
    learn.plot_gradcam(3, layer=["conv", "bn"], target="both", method="LayerCAM", preds=preds)
    heats = drawn["plot_gradcam"][1]
    assert [(heat.layer, heat.method) for heat in heats] == [("conv", "LayerCAM")] * 2 + [("bn", "LayerCAM")] * 2
    assert (heats[0].targets == preds.predicted[worst]).all() and (heats[1].targets == preds.targets[worst]).all()


def test_predictions_spare_the_pass_and_must_be_of_the_split(learn, monkeypatch):
    preds, train = predict(learn), learn.dls.test_dl(list(range(48)), with_labels=True)
    for dl in train, test_dl(learn.dls):
        assert isinstance(learn.plot_gradcam(2, dl=dl), Figure)
    monkeypatch.setattr(learner_methods, "predict", None)
    learn.plot_misclassified(2, preds=preds)
    learn.plot_gradcam(2, preds=preds)
    for plot in learn.plot_misclassified, learn.plot_gradcam, learn.plot_class_accuracy:
        with pytest.raises(InputError, match="predictions of 18 images, the split has 48"):
            plot(preds=preds, dl=train)


def test_without_errors(learn):
    preds = predict(learn)
    probs = np.eye(3, dtype=np.float32)[preds.targets]
    right = Predictions(probs, preds.targets, preds.losses, preds.indices, preds.classes)
    for plot, words in (learn.plot_misclassified, "no misclassified"), (learn.plot_gradcam, "no images to explain"):
        figure = plot(preds=right)
        assert not figure.axes and any(words in text.get_text() for text in figure.texts)


def test_a_plain_learner(learn):
    plain = Learner(learn.dls, learn.model, CrossEntropyLossFlat(), cbs=History())
    with plain.no_bar(), plain.no_logging():
        plain.fit(1, 1e-5)
        figures = plain.plot_misclassified(2), plain.plot_gradcam(2), plain.plot_class_accuracy(), plain.plot_curves()
    assert all(figure.axes for figure in figures) and plain.plot_schedule().axes


@pytest.mark.parametrize(
    ("plot", "options", "message"),
    [
        ("plot_misclassified", dict(n=0), "n=0: must be at least 1"),
        ("plot_misclassified", dict(true="grey"), "true='grey': no such name; did you mean green"),
        ("plot_gradcam", dict(n=-1), "n=-1"),
        ("plot_gradcam", dict(layer="7"), "layer='7': no such name"),
        ("plot_gradcam", dict(target="truth"), "target='truth': no such name"),
        ("plot_gradcam", dict(method="Grad-CAM"), "did you mean GradCAM"),
    ],
)
def test_wrong_arguments(learn, plot, options, message):
    with pytest.raises(InputError, match=message):
        getattr(learn, plot)(**options)
