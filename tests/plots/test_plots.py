"""What the pictures show: the data they were given, in words that are whole, and no trace in pyplot."""

import base64
import io
import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.text import Text
from PIL import Image

from cifar_fastai.errors import InputError
from cifar_fastai.plots import charts as plots
from cifar_fastai.plots.page import SMALL, text_width, wrap

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
AWKWARD = ["a_very_long_class_name_$with_math$_that_goes_on_and_on", "$x_i$", "Unbreakable" * 6, "two words", "^"]


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def tiles(n, classes=NAMES, **options):
    true = [classes[k % len(classes)] for k in range(n)]
    predicted = [classes[(k + 1) % len(classes)] for k in range(n)]
    return plots.plot_tiles(pixels(n), true, predicted, np.linspace(0.9, 0.5, n), **options)


def heatmaps(targets, layer="layer3", size=8, negligible=()):
    maps = np.random.default_rng(1).random((len(targets), 32, 32), dtype=np.float32)
    flags = np.isin(np.arange(len(targets)), negligible)
    return SimpleNamespace(
        maps=maps, targets=np.array(targets), layer=layer, method="GradCAM", map_size=(size, size), negligible=flags
    )


def gradcam(n, sets=None, classes=NAMES, **options):
    true = [classes[k % len(classes)] for k in range(n)]
    predicted = [classes[(k + 1) % len(classes)] for k in range(n)]
    sets = sets if sets is not None else heatmaps([(k + 1) % len(classes) for k in range(n)])
    return plots.plot_gradcam(pixels(n), sets, true, predicted, np.full(n, 0.75), classes=classes, **options)


def history(n, train_accuracy=0.75):
    return [
        {
            "epoch": e,
            "train_loss": 2 / e,
            "train_accuracy": train_accuracy,
            "valid_loss": 2.1 / e,
            "valid_accuracy": 1 - 0.5 / e,
        }
        for e in range(1, n + 1)
    ]


def one_cycle(n, peak):
    return np.r_[np.linspace(0.01, 0.1, peak + 1), np.linspace(0.1, 0.001, n - peak)[1:]]


def confusion(n):
    return np.random.default_rng(2).integers(0, 3, (n, n)) + 90 * np.eye(n, dtype=int)


def range_test():
    lrs = np.logspace(-7, 0, 50)
    return lrs, 2 - np.linspace(0, 1, 50) ** 2


PICTURES = {
    "curves": lambda: plots.plot_curves(history(20)),
    "curves of one epoch": lambda: plots.plot_curves(history(1)),
    "curves of 200 epochs": lambda: plots.plot_curves(history(200), "valid"),
    "curves, nothing measured": lambda: plots.plot_curves([dict.fromkeys(history(1)[0], None) | {"epoch": 1}]),
    "schedule": lambda: plots.plot_schedule(one_cycle(100, 30), 1 - one_cycle(100, 30), 10),
    "schedule, peak at the end": lambda: plots.plot_schedule(np.linspace(0.01, 0.1, 100), np.full(100, 0.9), 10),
    "schedule of one step": lambda: plots.plot_schedule([0.1], None, 1),
    "schedule of nothing": lambda: plots.plot_schedule([0.0, 0.0], [0.0, 0.0], 1),
    "lr_find": lambda: plots.plot_lr_find(*range_test(), dict(valley=1e-3, slide=1e-2, steep=1e-3)),
    "classes": lambda: plots.plot_class_accuracy(dict(zip(NAMES, np.linspace(0.8, 1, 10), strict=True)), 0.9),
    "2 classes": lambda: plots.plot_class_accuracy({"cat": 0.0, "dog": 1.0}),
    "100 classes": lambda: plots.plot_class_accuracy({f"class {k}": k / 99 for k in range(100)}),
    "awkward classes": lambda: plots.plot_class_accuracy(dict.fromkeys(AWKWARD, 0.5)),
    "confusion": lambda: plots.plot_confusion_matrix(confusion(10), NAMES),
    "confusion of 2": lambda: plots.plot_confusion_matrix(confusion(2), ["cat", "dog"]),
    "confusion of 100": lambda: plots.plot_confusion_matrix(confusion(100), [f"class {k}" for k in range(100)]),
    "confusion of awkward": lambda: plots.plot_confusion_matrix(confusion(5), AWKWARD),
    "tiles": lambda: tiles(10, title="Misclassified images", losses=np.arange(10)),
    "one tile": lambda: tiles(1, title="A title that is a good deal longer than one image is wide, and then some"),
    "no tile": lambda: tiles(0, title="Misclassified images"),
    "awkward tiles": lambda: tiles(5, AWKWARD),
    "many columns": lambda: tiles(12, n_cols=12),
    "gradcam": lambda: gradcam(10),
    "gradcam of one": lambda: gradcam(1),
    "gradcam of two layers": lambda: gradcam(3, [heatmaps([1, 2, 3]), heatmaps([1, 2, 3], "layer2", 16, [1])]),
    "gradcam of none": lambda: gradcam(0),
    "awkward gradcam": lambda: gradcam(5, classes=AWKWARD),
    "augmentations": lambda: plots.plot_augmentations({name: pixels(3) for name in ("original", "random crop", "all")}),
    "many augmentations": lambda: plots.plot_augmentations({f"the transform number {k}": pixels(1) for k in range(12)}),
}


def texts(fig):
    return [text for text in fig.findobj(Text) if text.get_visible() and text.get_text()]


def words(fig):
    """All that a reader can read, line breaks undone."""
    return [text.get_text().replace("\n", " ") for text in texts(fig)]


def images(fig):
    return [image for ax in fig.axes for image in ax.images]


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_whole(name):
    """Nothing drawn reaches over the figure's edge, whatever the names, numbers and sizes."""
    fig = PICTURES[name]()
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=50)
    box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()
    pixel = 1 / 50
    assert box.x0 >= -pixel and box.y0 >= -pixel and box.x1 <= width + pixel and box.y1 <= height + pixel


@pytest.mark.parametrize("name", [name for name in PICTURES if "tile" in name or "gradcam" in name or "augm" in name])
def test_texts_of_a_gallery_stay_apart(name):
    fig = PICTURES[name]()
    fig.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in fig.texts if text.get_text()]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []


def test_import_and_pictures_leave_pyplot_alone():
    code = (
        "import sys; from cifar_fastai import plots; fig = plots.plot_schedule([.1, .2], None, 1); "
        "fig.draw_without_rendering(); assert 'matplotlib.pyplot' not in sys.modules; "
        "import matplotlib.pyplot as plt; plots.plot_schedule([.1, .2], None, 1); assert plt.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_notebook_shows_a_picture_once(monkeypatch):
    """As an image that the figure sends itself, whatever matplotlib is set up for; formatters get nothing to show."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **options: shown.append((objects, options)))
    assert DisplayFormatter().format(plots.plot_schedule([0.1, 0.2], None, 1)) == ({}, {})
    (((data,), options),) = shown
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and set(data) == {"image/png", "text/plain"}
    assert options == {"raw": True, "metadata": {"image/png": {"width": 840, "height": 390}}}


# ---- charts


def test_curves_draw_what_they_were_given():
    fig = plots.plot_curves(history(3), "valid")
    losses, accuracies = fig.axes
    np.testing.assert_allclose(losses.lines[0].get_xydata(), [(1, 2), (2, 1), (3, 2 / 3)])
    np.testing.assert_allclose(losses.lines[1].get_ydata(), [2.1, 1.05, 0.7])
    np.testing.assert_allclose(accuracies.lines[1].get_ydata(), [50, 75, 100 - 50 / 3])
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train", "valid"]
    assert {"train 0.667", "valid 0.700", "valid 83.3 %", "train 75.0 %", "epoch", "accuracy (%)"} <= set(words(fig))


@pytest.mark.parametrize("n", [1, 2, 7, 200])
def test_epochs_are_whole_numbers(n):
    fig = plots.plot_curves(history(n))
    fig.draw_without_rendering()
    ticks = fig.axes[0].get_xticks()
    assert len(ticks) and (ticks == np.round(ticks)).all()
    if n == 1:
        assert list(ticks) == [1] and fig.axes[0].lines[0].get_marker() == "o"


def test_curves_name_what_was_not_measured():
    fig = plots.plot_curves(history(3, train_accuracy=None))
    assert "train: not measured" in words(fig) and "test 83.3 %" in words(fig)


def test_curves_take_the_strings_of_a_csv_file():
    rows = [{key: "" if key == "train_accuracy" else str(value) for key, value in row.items()} for row in history(2)]
    np.testing.assert_allclose(plots.plot_curves(rows).axes[0].lines[0].get_ydata(), [2, 1])


def test_last_values_close_to_each_other_stay_apart():
    rows = [row | {"valid_loss": row["train_loss"], "valid_accuracy": row["train_accuracy"]} for row in history(5)]
    fig = plots.plot_curves(rows)
    fig.draw_without_rendering()
    for ax in fig.axes:
        one, other = (text.get_window_extent() for text in ax.texts)
        assert not one.overlaps(other)


def test_schedule_marks_the_peak():
    lrs = one_cycle(100, 30)
    fig = plots.plot_schedule(lrs, 1 - lrs, steps_per_epoch=10)
    np.testing.assert_array_equal(fig.axes[0].lines[0].get_ydata(), lrs)
    np.testing.assert_array_equal(fig.axes[1].lines[0].get_ydata(), 1 - lrs)
    assert "peak 0.1 at step 30 (epoch 3.0)" in words(fig)
    assert any(line.get_marker() == "o" and list(line.get_xydata()[0]) == [30, 0.1] for line in fig.axes[0].lines)
    assert "Learning rate, from 0.01 to 0.001" in words(fig)


def test_schedule_of_steps_and_of_constants():
    fig = plots.plot_schedule(np.repeat([0.01, 0.001], 20), np.full(40, 0.9), steps_per_epoch=10)
    assert "peak 0.01 from step 0 to 19 (epoch 0.0 to 1.9)" in words(fig)
    assert "Momentum, constant at 0.9" in words(fig)
    low, high = fig.axes[1].get_ylim()
    assert 0.05 < high - low < 0.5  # rounding noise is not blown up into a curve
    assert not any("peak" in text for text in words(plots.plot_schedule(np.full(9, 0.1), None, 3)))
    assert len(plots.plot_schedule(np.full(9, 0.1), None, 3).axes) == 1


def test_lr_find_marks_every_suggestion():
    lrs, losses = range_test()
    fig = plots.plot_lr_find(lrs, losses, {"valley": 1e-3, "slide": None, "steep": 1e-3, "minimum": 0.25})
    ax = fig.axes[0]
    assert ax.get_xscale() == "log"
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.c_[lrs, losses])
    assert {"valley: 0.001", "slide: none", "steep: 0.001", "minimum: 0.25"} <= set(words(fig))
    marks = [line for line in ax.lines if line.get_linestyle() == "None" and np.isfinite(line.get_xdata()[0])]
    assert [line.get_xdata()[0] for line in marks] == [1e-3, 1e-3, 0.25]
    sizes = [line.get_markersize() for line in marks]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_lr_find_cuts_the_explosion_but_no_mark():
    lrs, losses = range_test()
    losses = np.r_[losses[:-2], 80, np.nan]
    ax = plots.plot_lr_find(lrs, losses, {"minimum": lrs[47]}).axes[0]
    assert ax.get_ylim()[1] < 30 and ax.get_ylim()[0] <= losses[:48].min()


def test_class_accuracy_draws_every_class_best_first():
    fig = plots.plot_class_accuracy({"cat": 0.5, "dog": 0.75, "emu": None})
    ax = fig.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["dog", "cat", "emu"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches[:2]], [75, 50])
    assert {"75.0 %", "50.0 %", "no images", "mean of the classes: 62.5 %"} <= set(words(fig))
    assert ax.yaxis_inverted() and list(ax.lines[0].get_xdata()) == [62.5, 62.5]
    assert "all images: 60.0 %" in words(plots.plot_class_accuracy({"cat": 0.5, "dog": 0.75}, accuracy=0.6))


def test_hundred_classes_stand_in_two_columns():
    fig = plots.plot_class_accuracy({f"class {k}": k / 99 for k in range(100)})
    assert len(fig.axes) == 2 and sum(len(ax.patches) for ax in fig.axes) == 100
    assert fig.get_size_inches()[1] < 12


def test_confusion_matrix_keeps_right_and_wrong_on_two_scales():
    matrix = np.array([[98, 2, 0], [0, 50, 0], [0, 0, 0]])
    fig = plots.plot_confusion_matrix(matrix, ["cat", "dog", "emu"])
    right, wrong = fig.axes[0].images
    np.testing.assert_allclose(np.diag(right.get_array()), [98, 100, 0])
    assert wrong.get_array().compressed() == pytest.approx([2]) and wrong.norm.vmax == pytest.approx(2)
    assert [text.get_text() for text in fig.axes[0].texts] == ["98", "2", "50"]  # zeros are left white
    assert {"true class", "predicted class"} <= set(words(fig))
    assert len(fig.axes) == 3  # the matrix and its two scales


def test_confusion_matrix_without_errors_and_with_a_hundred_classes():
    assert len(plots.plot_confusion_matrix(36 * np.eye(10, dtype=int), NAMES).axes) == 2
    assert len(plots.plot_confusion_matrix(np.zeros((2, 2), int), ["cat", "dog"]).axes) == 2
    crowd = plots.plot_confusion_matrix(confusion(100), [f"class {k}" for k in range(100)])
    assert not crowd.axes[0].texts  # numbers would not fit
    assert "class 99" in words(crowd)


# ---- galleries


def test_tiles_show_the_images_and_say_what_they_are():
    given = pixels(3)
    fig = plots.plot_tiles(given, ["cat", "dog", "frog"], ["dog", "dog", "ship"], [0.5, 0.625, 0.99], [4.5, 0.1, 1])
    drawn = images(fig)
    assert all((image.get_array() == pixel).all() for image, pixel in zip(drawn, given, strict=True))
    assert {image.get_interpolation() for image in drawn} == {"nearest"}
    assert {"true: cat", "predicted: ship", "50.0 % sure, loss 4.50"} <= set(words(fig))
    colors = [text.get_color() for text in fig.texts if text.get_text().startswith(("true", "predicted"))]
    assert colors[0] != colors[1] and colors[2] == colors[3] and colors[4:] == colors[:2]  # the second is right


@pytest.mark.parametrize("n, n_cols, shape", [(10, 5, (2, 5)), (7, 3, (3, 3)), (2, 5, (1, 2)), (4, 1, (4, 1))])
def test_columns_are_selectable(n, n_cols, shape):
    corners = np.array([ax.get_position().p0 for ax in tiles(n, n_cols=n_cols).axes]).round(6)  # (n, 2)
    assert len(corners) == n
    assert (len(set(corners[:, 1])), len(set(corners[:, 0]))) == shape


def test_no_tiles_is_said():
    fig = tiles(0, title="Misclassified images")
    assert words(fig) == ["Misclassified images", "no misclassified images"] and not fig.axes
    assert "nothing here" in words(tiles(0, empty="nothing here"))


def test_images_are_squares_of_a_good_size():
    for fig in (tiles(10), gradcam(10), plots.plot_augmentations({"original": pixels(2), "all": pixels(2)})):
        for ax in fig.axes:
            width, height = ax.get_position().size * fig.get_size_inches()
            if ax.images and ax.images[0].get_array().shape[0] == 32:
                assert width == pytest.approx(height) and width > 1


def test_names_are_literal_and_uncut():
    for fig in (
        tiles(5, AWKWARD),
        gradcam(5, classes=AWKWARD),
        plots.plot_confusion_matrix(confusion(5), AWKWARD),
        plots.plot_class_accuracy(dict.fromkeys(AWKWARD, 0.5)),
    ):
        shown = ["".join(text.get_text().split()) for text in texts(fig)]
        assert all(any("".join(name.split()) in text for text in shown) for name in AWKWARD)
        assert not any(text.get_parse_math() for text in texts(fig) if "$" in text.get_text())


def test_gradcam_shows_image_heatmap_and_overlay():
    maps = heatmaps([1, 2])
    fig = gradcam(2, maps, alpha=0.25)
    layers = [ax.images for ax in fig.axes if len(ax.images) and ax.images[0].get_array().shape[0] == 32]
    assert [len(one) for one in layers] == [1, 1, 2] * 2
    image, heatmap, overlay = layers[3:]
    np.testing.assert_array_equal(image[0].get_array(), pixels(2)[1])
    np.testing.assert_array_equal(heatmap[0].get_array(), maps.maps[1])
    np.testing.assert_array_equal(overlay[0].get_array(), pixels(2)[1])
    np.testing.assert_array_equal(overlay[1].get_array(), maps.maps[1])
    assert overlay[1].get_alpha() == 0.25 and heatmap[0].get_clim() == (0, 1)
    assert {"image", "heatmap", "overlay", "true: automobile", "predicted: bird, 75.0 %"} <= set(words(fig))


@pytest.mark.parametrize(
    "targets, classes, title, explained",
    [
        ([1, 2, 3], NAMES, "GradCAM, layer3, 8 x 8 map, for the predicted class", []),
        ([0, 1, 2], NAMES, "GradCAM, layer3, 8 x 8 map, for the true class", []),
        ([7, 7, 7], NAMES, "GradCAM, layer3, 8 x 8 map, for class horse", []),
        ([7, 8, 7], NAMES, "GradCAM, layer3, 8 x 8 map, for the class named above each", ["horse", "ship", "horse"]),
        ([7, 7, 7], None, "GradCAM, layer3, 8 x 8 map, for class 7", []),
    ],
)
def test_gradcam_title_names_layer_map_and_class(targets, classes, title, explained):
    fig = plots.plot_gradcam(pixels(3), heatmaps(targets), NAMES[:3], NAMES[1:4], [0.5] * 3, classes=classes)
    assert title in words(fig)
    assert [text for text in words(fig) if "explained" in text] == [f"explained: class {name}" for name in explained]


def test_gradcam_of_several_layers_heads_each():
    sets = [heatmaps([1, 2, 3], "layer2", 16), heatmaps([1, 2, 3], "layer3", 8)]
    fig = gradcam(3, sets, title="Misclassified")
    assert "Misclassified: GradCAM, for the predicted class" in words(fig)
    assert {"layer2, 16 x 16 map", "layer3, 8 x 8 map"} <= set(words(fig))
    assert sum(len(ax.images) for ax in fig.axes) == 3 * (1 + 3 + 3) + 1  # and the key


def test_negligible_heatmap_is_said_not_drawn():
    maps = heatmaps([1, 2, 3], negligible=[1])
    fig = gradcam(3, maps)
    drawn = [image.get_array() for image in images(fig)]
    assert sum(np.array_equal(array, maps.maps[0]) for array in drawn) == 2
    assert not any(np.array_equal(array, maps.maps[1]) for array in drawn)
    assert words(fig).count("negligible: nothing speaks for the class") == 1


def test_ten_gradcams_fit_a_page():
    for sets in (None, [heatmaps(range(10)), heatmaps(range(10), "layer2", 16)]):
        width, height = gradcam(10, sets).get_size_inches()
        assert width <= 9 and height <= 10


def test_augmentations_are_rows_of_images_and_columns_of_transforms():
    columns = {"original": pixels(2, 1), "crop": pixels(2, 2), "all": pixels(2, 3)}
    fig = plots.plot_augmentations(columns)
    drawn = [image.get_array() for image in images(fig)]
    given = [image for column in columns.values() for image in column]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, given, strict=True))
    assert set(columns) <= set(words(fig))
    corners = np.array([ax.get_position().p0 for ax in fig.axes]).round(6).reshape(3, 2, 2)  # (columns, rows, xy)
    assert (corners[:, 0, 0] == corners[:, 1, 0]).all() and (corners[0, :, 1] == corners[2, :, 1]).all()


def test_wrap_keeps_every_letter_within_the_width():
    for text in (*AWKWARD, "predicted: automobile, 93.1 %", "", "x", "two lines of\nits own"):
        lines = wrap(text, 0.9, SMALL).split("\n")
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(text_width(line, SMALL) <= 0.9 for line in lines)
    assert "\n%" not in wrap("predicted: automobile, 93.1 %", 1.75, SMALL)


# ---- mistakes and files


@pytest.mark.parametrize(
    "draw, error, says",
    [
        (lambda: plots.plot_curves([]), ValueError, "empty"),
        (lambda: plots.plot_curves([{"epoch": 1, "loss": 2.0}]), ValueError, "'train_loss'"),
        (lambda: plots.plot_curves(history(1), "tset"), ValueError, "'tset'"),
        (lambda: plots.plot_schedule([], None, 1), ValueError, "no step"),
        (lambda: plots.plot_schedule([0.1, 0.2], [0.9], 1), ValueError, "2 learning rates but 1 momenta"),
        (lambda: plots.plot_schedule([0.1, 0.2], None, 0), ValueError, "at least 1"),
        (lambda: plots.plot_lr_find([0.1], [], {}), ValueError, "1 learning rates and 0 losses"),
        (lambda: plots.plot_lr_find([0.1, 0.01], [1, 2], {}), ValueError, "rise"),
        (lambda: plots.plot_class_accuracy({}), ValueError, "empty"),
        (lambda: plots.plot_confusion_matrix(np.eye(3), ["cat", "dog"]), ValueError, r"\(3, 3\) and there are 2"),
        (lambda: tiles(3, n_cols=0), InputError, "0 columns"),
        (lambda: plots.plot_tiles(pixels(2), ["cat"], ["dog"], [0.5]), ValueError, "'images': 2, 'true': 1"),
        (lambda: plots.plot_tiles(np.zeros((2, 3, 32, 32)), [], [], []), ValueError, "uint8"),
        (lambda: gradcam(2, alpha=1.5), InputError, "alpha is 1.5"),
        (lambda: gradcam(2, []), ValueError, "no heatmaps"),
        (lambda: gradcam(2, heatmaps([1])), ValueError, "'maps': 1"),
        (lambda: plots.plot_augmentations({"original": pixels(2), "all": pixels(1)}), ValueError, "'all': 1"),
        (lambda: plots.plot_augmentations({}), ValueError, "at least one"),
    ],
)
def test_mistakes_are_answered_in_one_line(draw, error, says):
    with pytest.raises(error, match=says) as caught:
        draw()
    assert "\n" not in str(caught.value)


def test_save_figure_writes_a_png_that_fits_a_readme(tmp_path):
    plots.save_figure(tiles(5), tmp_path / "tiles.png")
    with Image.open(tmp_path / "tiles.png") as image:
        assert image.format == "PNG" and 900 <= image.width <= 1200
    assert os.listdir(tmp_path) == ["tiles.png"]
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        plots.save_figure(tiles(1), tmp_path / "tiles.jpg")


def test_save_figure_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    class Broken:
        def savefig(self, file, **_):
            file.write(b"half of a picture")
            raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError):
        plots.save_figure(Broken(), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["curves.png"]
