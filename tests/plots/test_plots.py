"""What the pictures show: their data, every text whole and apart from the others, and no trace in pyplot."""

import io
import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from cifar_fastai.errors import InputError
from cifar_fastai.plots.charts import (
    plot_class_accuracy,
    plot_confusion_matrix,
    plot_curves,
    plot_lr_find,
    plot_schedule,
)
from cifar_fastai.plots.galleries import plot_augmentations, plot_gradcam, plot_tiles
from cifar_fastai.plots.style import save_figure

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
AWKWARD = ["a_very_long_class_name_$with_math$_that_goes_on_and_on", "$x_i$", "Unbreakable" * 6, "two words", "^"]


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def labels(n, classes):
    return [classes[k % len(classes)] for k in range(n)], [classes[(k + 1) % len(classes)] for k in range(n)]


def tiles(n, classes=NAMES, **options):
    return plot_tiles(pixels(n), *labels(n, classes), np.linspace(0.9, 0.5, n), **options)


def heatmaps(targets, layer="layer3", size=8, negligible=(), method="GradCAM", explains_class=True):
    maps = np.random.default_rng(1).random((len(targets), 32, 32), dtype=np.float32)
    flags = np.isin(np.arange(len(targets)), negligible)
    facts = dict(layer=layer, method=method, map_size=(size, size), explains_class=explains_class)
    return SimpleNamespace(maps=maps, targets=np.array(targets), negligible=flags, **facts)


def gradcam(n, sets=None, classes=NAMES, **options):
    sets = sets if sets is not None else heatmaps([(k + 1) % len(classes) for k in range(n)])
    return plot_gradcam(pixels(n), sets, *labels(n, classes), np.full(n, 0.75), classes=classes, **options)


def history(n, **values):
    """`n` epochs with falling losses; `values` replace some in every epoch."""
    falling = [dict(epoch=e, train_loss=2 / e, valid_loss=2.1 / e, valid_accuracy=1 - 0.5 / e) for e in range(1, n + 1)]
    return [{"train_accuracy": 0.75} | row | values for row in falling]


def one_cycle(n, peak):
    return np.r_[np.linspace(0.01, 0.1, peak + 1), np.linspace(0.1, 0.001, n - peak)[1:]]


def confusion(n):
    return np.random.default_rng(2).integers(0, 3, (n, n)) + 90 * np.eye(n, dtype=int)


def range_test():
    lrs = np.logspace(-7, 0, 50)
    return lrs, 2 - np.linspace(0, 1, 50) ** 2


CHARTS = {
    "curves": lambda: plot_curves(history(20)),
    "curves of one epoch": lambda: plot_curves(history(1)),
    "curves, nothing measured": lambda: plot_curves([dict.fromkeys(history(1)[0], None) | {"epoch": 1}]),
    "schedule": lambda: plot_schedule(one_cycle(100, 30), 1 - one_cycle(100, 30), 10),
    "schedule of one step": lambda: plot_schedule([0.1], None, 1),
    "schedule of zeros": lambda: plot_schedule([0.0, 0.0], [0.0, 0.0], 1),
    "lr_find": lambda: plot_lr_find(*range_test(), dict(valley=1e-3, slide=1e-2, steep=1e-3)),
    "classes": lambda: plot_class_accuracy(dict(zip(NAMES, np.linspace(0.8, 1, 10), strict=True)), 0.9),
    "100 classes": lambda: plot_class_accuracy({f"class {k}": k / 99 for k in range(100)}, 0.5),
    "awkward classes": lambda: plot_class_accuracy(dict.fromkeys(AWKWARD, 0.5), 0.5),
    "confusion": lambda: plot_confusion_matrix(confusion(10), NAMES),
    "confusion of 2": lambda: plot_confusion_matrix(confusion(2), ["cat", "dog"]),
    "confusion of 100": lambda: plot_confusion_matrix(confusion(100), [f"class {k}" for k in range(100)]),
    "awkward confusion": lambda: plot_confusion_matrix(confusion(5), AWKWARD),
}
GALLERIES = {
    "tiles": lambda: tiles(10, title="10 of 412 misclassified images, worst loss first", losses=np.arange(10)),
    "one tile": lambda: tiles(1, title="A title that is a good deal longer than one image is wide, and then some"),
    "no tile": lambda: tiles(0, title="Misclassified images"),
    "awkward tiles": lambda: tiles(5, AWKWARD),
    "many columns": lambda: tiles(12, n_cols=12),
    "gradcam": lambda: gradcam(10),
    "gradcam of one": lambda: gradcam(1),
    "gradcam of two layers": lambda: gradcam(3, [heatmaps([1, 2, 3]), heatmaps([1, 2, 3], "layer2", 16, [1])]),
    "gradcam of none": lambda: gradcam(0),
    "awkward gradcam": lambda: gradcam(5, classes=AWKWARD),
    "augmentations": lambda: plot_augmentations({name: pixels(3) for name in ("original", "random crop", "all")}),
    "many augmentations": lambda: plot_augmentations({f"the transform number {k}": pixels(1) for k in range(12)}),
}


def texts(fig):
    return [text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]


def words(fig):
    """All that a reader can read, without line breaks."""
    return [" ".join(text.get_text().split()) for text in texts(fig)]


def images(fig):
    """The images of a gallery, the key of the heatmaps left out."""
    return [image.get_array() for ax in fig.axes for image in ax.images]


@pytest.mark.parametrize("name", [*CHARTS, *GALLERIES])
def test_picture_is_whole_and_texts_of_a_gallery_stay_apart(name):
    """Nothing drawn reaches over the figure's edge, whatever the names, numbers and sizes."""
    fig = (CHARTS | GALLERIES)[name]()
    fig.savefig(io.BytesIO(), format="png", dpi=100)
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in texts(fig)]
    width, height = fig.get_size_inches()
    box = fig.get_tightbbox().padded(-0.02)
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    if name in GALLERIES:  # whose captions take no part in the layout
        assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
        for _, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 100 * width and box.y1 <= 100 * height


@pytest.mark.parametrize("name", ["awkward classes", "awkward confusion", "awkward tiles", "awkward gradcam"])
def test_names_are_literal_and_uncut(name):
    fig = (CHARTS | GALLERIES)[name]()
    fig.draw_without_rendering()
    shown = ["".join(text.get_text().split()) for text in texts(fig)]
    if name in GALLERIES:  # where each line of a caption is a text of its own
        shown = ["".join(shown)]
    assert all(any("".join(name.split()) in text for text in shown) for name in AWKWARD)
    assert not any(text.get_parse_math() for text in texts(fig) if "$" in text.get_text())


def test_numbers_stay_whole():
    assert all("\n%" not in text.get_text() for text in texts(tiles(12, n_cols=12)))


def test_import_and_pictures_leave_pyplot_alone():
    code = (
        "import sys; from cifar_fastai.plots import charts; charts.plot_schedule([.1, .2], None, 1).canvas.draw(); "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "import matplotlib.pyplot as plt; charts.plot_schedule([.1, .2], None, 1); assert plt.get_fignums() == []; "
        "assert plt.rcParams['axes.spines.top']"  # the user's settings are as before
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
    assert [line.split() for line in done.stdout.splitlines()] == [["iVBORw0K", "840"], ["iVBORw0K", "550"]]


# ---- charts


def test_curves_draw_the_history():
    fig = plot_curves(history(3, train_accuracy=None), "valid")
    losses, accuracies = fig.axes
    np.testing.assert_allclose(losses.lines[0].get_xydata(), [(1, 2), (2, 1), (3, 2 / 3)])
    np.testing.assert_allclose(losses.lines[1].get_ydata(), [2.1, 1.05, 0.7])
    np.testing.assert_allclose(accuracies.lines[1].get_ydata(), [50, 75, 100 - 50 / 3])
    expected = {"train: 0.667", "valid: 0.700", "valid: 83.3 %", "train: not measured", "epoch", "accuracy (%)"}
    assert expected <= set(words(fig))
    for n in 1, 2, 7, 200:
        fig = plot_curves(history(n))
        fig.draw_without_rendering()
        ticks = fig.axes[0].get_xticks()
        assert len(ticks) and (ticks == np.round(ticks)).all()


def test_exploded_losses_do_not_flatten_the_others():
    rows = history(10)
    assert plot_curves(rows).axes[0].get_ylim()[1] > 2.1  # an ordinary first epoch is not cut
    rows[0]["train_loss"] = rows[0]["valid_loss"] = 500
    low, high = plot_curves(rows).axes[0].get_ylim()
    assert low < 0.2 and 1.05 < high < 2


def test_schedule_marks_the_peak():
    lrs = one_cycle(100, 30)
    fig = plot_schedule(lrs, 1 - lrs, steps_per_epoch=10)
    np.testing.assert_array_equal(fig.axes[0].lines[0].get_ydata(), lrs)
    np.testing.assert_array_equal(fig.axes[1].lines[0].get_ydata(), 1 - lrs)
    assert {"peak: 0.1 at step 30 (epoch 3.0)", "Learning rate, from 0.01 to 0.001"} <= set(words(fig))
    assert fig.axes[0].lines[1].get_xydata().tolist() == [[30, 0.1]]
    fig = plot_schedule(np.repeat([0.01, 0.001], 20), np.full(40, 0.9) + 1e-9 * np.arange(40), steps_per_epoch=10)
    assert {"peak: 0.01 at steps 0 to 19 (epoch 0.0)", "Momentum, constant at 0.9"} <= set(words(fig))
    assert np.ptp(fig.axes[1].get_ylim()) > 0.05, "rounding noise is not drawn as a curve"
    constant = plot_schedule(np.full(9, 0.1), None, 3)
    assert len(constant.axes) == 1 and not any("peak" in text for text in words(constant))


def test_lr_find_marks_every_suggestion():
    lrs, losses = range_test()
    fig = plot_lr_find(lrs, losses, {"valley": 1e-3, "slide": None, "steep": 1e-3, "minimum": 0.25})
    ax = fig.axes[0]
    assert ax.get_xscale() == "log"
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.c_[lrs, losses])
    assert {"valley: 0.001", "slide: none", "steep: 0.001", "minimum: 0.25"} <= set(words(fig))
    marks = [line for line in ax.lines[1:] if len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in marks] == [1e-3, 1e-3, 0.25]
    sizes = [line.get_markersize() for line in marks]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize("at", [47, 48])
def test_lr_find_cuts_the_explosion_but_no_mark(at):
    lrs, losses = range_test()
    losses = np.r_[losses[:-2], 20, np.nan]
    ax = plot_lr_find(lrs, losses, {"minimum": lrs[at]}).axes[0]
    low, high = ax.get_ylim()
    assert low < losses[:48].min() and 2 < high and (high < 5 or losses[at] > 5)
    assert low < ax.lines[1].get_ydata()[0] < high


def test_class_accuracy_draws_every_class_best_first():
    fig = plot_class_accuracy({"cat": 0.5, "dog": 0.75, "emu": None}, 0.6)
    ax = fig.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["dog", "cat", "emu"] and ax.yaxis_inverted()
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches[:2]], [0.75, 0.5])
    assert {"75.0 %", "50.0 %", "no images", "all images: 60.0 %"} <= set(words(fig))
    fig = CHARTS["100 classes"]()
    assert len(fig.axes) == 2 and sum(len(ax.patches) for ax in fig.axes) == 100 and fig.get_size_inches()[1] < 12


def test_confusion_matrix_keeps_right_and_wrong_on_two_scales():
    matrix = np.array([[98, 2, 0], [0, 50, 0], [0, 0, 0]])
    fig = plot_confusion_matrix(matrix, ["cat", "dog", "emu"])
    right, wrong = fig.axes[0].images
    np.testing.assert_allclose(np.diag(right.get_array()), [0.98, 1, 0])
    assert wrong.get_array().compressed() == pytest.approx([2])
    assert wrong.norm(1) < 0.5, "a single error is pale"
    assert sorted(text.get_text() for text in fig.axes[0].texts) == ["2", "50", "98"]  # zeros are left white
    assert {"true class", "errors: number of images"} <= set(words(fig)) and len(fig.axes) == 2
    assert len(plot_confusion_matrix(36 * np.eye(10, dtype=int), NAMES).axes) == 1  # no errors, no scale of theirs
    crowd = CHARTS["confusion of 100"]()
    assert not crowd.axes[0].texts and "class 99" in words(crowd)  # no room for numbers


def test_a_thousand_classes_are_drawn_as_the_worst_of_them():
    names, matrix = [f"class {k}" for k in range(1000)], np.diag(np.full(1000, 9))
    matrix[range(100), range(900, 1000)] = np.arange(100, 0, -1)
    bars = plot_confusion_matrix(matrix, names).axes[0]
    assert [tick.get_text() for tick in bars.get_yticklabels()][:2] == [
        f"class {k} taken for class 90{k}" for k in (0, 1)
    ]
    assert [bar.get_width() for bar in bars.patches] == list(range(100, 60, -1)) and bars.yaxis_inverted()
    fig = plot_class_accuracy({name: k / 999 if k else None for k, name in enumerate(names)}, 0.5)
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == names[40:0:-1]
    assert "Accuracy by class, the 40 lowest of 1,000" in words(fig)


# ---- galleries


def test_tiles_show_the_images_and_their_labels():
    shown = pixels(3)
    fig = plot_tiles(shown, ["cat", "dog", "frog"], ["dog", "dog", "ship"], [0.5, 0.625, 0.99], [4.5, 0.1, 1])
    assert all((image == pixel).all() for image, pixel in zip(images(fig), shown, strict=True))
    assert {image.get_interpolation() for ax in fig.axes for image in ax.images} == {"nearest"}
    assert {"true: cat", "predicted: ship", "50.0 % sure, loss 4.50"} <= set(words(fig))
    colors = [text.get_color() for text in texts(fig) if text.get_text().startswith(("true", "predicted"))]
    assert colors[0] != colors[1] and colors[2] == colors[3] and colors[4:] == colors[:2]  # the second is right


@pytest.mark.parametrize("n, n_cols, shape", [(10, 5, (2, 5)), (7, 3, (3, 3)), (2, 5, (1, 2)), (4, 1, (4, 1))])
def test_columns_are_selectable(n, n_cols, shape):
    fig = tiles(n, n_cols=n_cols)
    fig.draw_without_rendering()
    corners = np.array([ax.get_position().p0 for ax in fig.axes]).round(3)  # (n, 2)
    assert len(corners) == n and (len(set(corners[:, 1])), len(set(corners[:, 0]))) == shape


def test_images_are_missing():
    for fig, text in (tiles(0, title="Title"), "no misclassified images"), (gradcam(0), "no images to explain"):
        assert words(fig)[1:] == [text] and not fig.axes


def test_images_are_squares_of_a_good_size():
    for fig in (tiles(10), gradcam(10), plot_augmentations({"original": pixels(2), "all": pixels(2)})):
        fig.draw_without_rendering()
        for ax in fig.axes:
            width, height = ax.get_position().size * fig.get_size_inches()
            assert not ax.images or (width == pytest.approx(height) and width > 1)


def test_gradcam_shows_image_heatmap_and_overlay():
    maps = heatmaps([1, 2])
    fig = gradcam(2, maps, alpha=0.25)
    layers = [ax.images for ax in fig.axes if ax.images]
    assert [len(one) for one in layers] == [1, 1, 2] * 2
    for image, expected in zip([*layers[3], *layers[4], *layers[5]], [pixels(2), maps.maps] * 2, strict=True):
        np.testing.assert_array_equal(image.get_array(), expected[1])
    assert layers[5][1].get_alpha() == 0.25 and layers[4][0].get_clim() == (0, 1)
    assert {"image", "heatmap", "overlay", "true: automobile", "predicted: bird", "75.0 % sure"} <= set(words(fig))
    assert {"one.png", "$two$.png"} <= set(words(gradcam(2, names=["one.png", "$two$.png"])))


@pytest.mark.parametrize(
    "targets, classes, explains_class, which, explained",
    [
        ([1, 2, 3], NAMES, True, "for the predicted class", []),
        ([0, 1, 2], NAMES, True, "for the true class", []),
        ([7, 7, 7], NAMES, True, "for class horse", []),
        ([7, 8, 7], NAMES, True, "for the class named below each", ["horse", "ship", "horse"]),
        ([7, 7, 7], None, True, "for class 7", []),
        ([1, 2, 3], NAMES, False, "whatever the class", []),
    ],
)
def test_gradcam_title_names_layer_map_and_class(targets, classes, explains_class, which, explained):
    maps = heatmaps(targets, explains_class=explains_class)
    fig = plot_gradcam(pixels(3), maps, NAMES[:3], NAMES[1:4], [0.5] * 3, classes=classes)
    assert f"GradCAM, layer3, 8 x 8 map, {which}" in words(fig)
    notes = [text for text in words(fig) if "explained" in text]
    assert notes == [f"50.0 % sure, explained: class {name}" for name in explained]


def test_gradcam_of_several_layers_heads_each_and_draws_no_negligible_map():
    sets = [heatmaps([1, 2, 3], "layer2", 16), heatmaps([1, 2, 3], "layer3", 8, negligible=[1])]
    fig = gradcam(3, sets, title="Misclassified")
    assert "Misclassified GradCAM, for the predicted class" in words(fig)
    assert {"layer2, 16 x 16 map heatmap", "layer3, 8 x 8 map heatmap"} <= set(words(fig))
    assert len(images(fig)) == 3 * (1 + 3 + 3) - 2
    assert words(fig).count("negligible: nothing speaks for the class") == 1


def test_augmentations_are_rows_of_images_and_columns_of_transforms():
    columns = {"original": pixels(2, 1), "RandomCrop": pixels(2, 2), "all": pixels(2, 3)}
    fig = plot_augmentations(columns)
    expected = np.stack(list(columns.values()), axis=1)  # (rows, columns, H, W, 3)
    np.testing.assert_array_equal(images(fig), expected.reshape(6, 32, 32, 3))
    assert {"original", "Random Crop", "all"} <= set(words(fig))


# ---- mistakes and files


@pytest.mark.parametrize(
    "draw, error, message",
    [
        (lambda: plot_curves([]), ValueError, "at least 1 are needed: {'history': 0}"),
        (lambda: plot_schedule([0.1, 0.2], [0.9], 1), ValueError, "'lrs': 2, 'moms': 1"),
        (lambda: plot_confusion_matrix(np.eye(3), ["cat", "dog"]), ValueError, "'matrix': 3, 'classes': 2"),
        (lambda: tiles(3, n_cols=0), InputError, "n_cols=0: must be at least 1"),
        (lambda: plot_tiles(pixels(2), ["cat"], ["dog"], [0.5]), ValueError, "'images': 2, 'true': 1"),
        (lambda: gradcam(2, alpha=1.5), InputError, "alpha=1.5: must lie between 0"),
        (lambda: gradcam(2, heatmaps([1])), ValueError, "'heatmaps 0': 1"),
        (lambda: plot_augmentations({"original": pixels(2), "all": pixels(1)}), ValueError, "'all': 1"),
        (lambda: plot_augmentations({}), ValueError, "at least 1"),
    ],
)
def test_mistakes_are_answered_in_one_line(draw, error, message):
    with pytest.raises(error, match=message) as raised:
        draw()
    assert "\n" not in str(raised.value)


def test_save_figure(tmp_path):
    save_figure(tiles(5), tmp_path / "tiles.png")
    with Image.open(tmp_path / "tiles.png") as image:
        assert image.format == "PNG" and 900 <= image.width <= 1200, "it fits a README"
    save_figure(tiles(1), tmp_path / "tiles.svg")
    assert "<svg" in (tmp_path / "tiles.svg").read_text()
    with pytest.raises(ValueError, match="not supported"):
        save_figure(tiles(1), tmp_path / "tiles.doc")
    assert sorted(os.listdir(tmp_path)) == ["tiles.png", "tiles.svg"]
