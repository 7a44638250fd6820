"""Pictures made of images: each pixel of a 32 x 32 image is a crisp square."""

import re

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable

from cifar_fastai.errors import InputError
from cifar_fastai.plots import style
from cifar_fastai.plots.style import GREY, SMALL, STYLE, Picture, check_lengths, percent, wrap

HEAT = dict(cmap="inferno", vmin=0, vmax=1)
GAP = 0.12  # inches between two images
LINE = 1.25 * SMALL / 72  # inches, of a caption


@rc_context(STYLE)
def plot_augmentations(columns):
    """The same images after each transform: one row per image, one column per transform.

    `columns`: {name: uint8 (K, H, W, 3)}, drawn in that order; "RandomCrop" is headed "Random Crop". Raises ValueError
    unless every column has the same number of images, at least one.
    """
    check_lengths(columns, at_least=1)
    n_rows = len(next(iter(columns.values())))
    heads = [re.sub("(?<=[a-z])(?=[A-Z])", " ", name) for name in columns]
    fig, axes = _grid([1] * len(columns), n_rows, "Augmentations", heads=heads, largest=1.05)
    for column, images in zip(axes.T, columns.values(), strict=True):
        for ax, image in zip(column, images, strict=True):
            ax.imshow(image)
    return fig


@rc_context(STYLE)
def plot_tiles(images, true, predicted, confidence, losses=None, n_cols=5, title=None):
    """Images with their true class, predicted class and confidence.

    `images`: uint8 (K, H, W, 3); `true`, `predicted`: K class names; `confidence`: K fractions; `losses`: K numbers or
    None. With K = 0 it holds a text. Raises InputError for `n_cols` below 1, ValueError on unequal lengths.
    """
    if n_cols < 1:
        raise InputError("must be at least 1", n_cols=n_cols)
    check_lengths(dict(images=images, true=true, predicted=predicted, confidence=confidence, losses=losses))
    if not len(images):
        return _message(title, "no misclassified images")
    notes = [f"{percent(sure)} sure" for sure in confidence]
    if losses is not None:
        notes = [f"{note}, loss {loss:.2f}" for note, loss in zip(notes, losses, strict=True)]
    n_cols, captions = min(n_cols, len(images)), list(zip([None] * len(images), true, predicted, notes, strict=True))
    fig, axes = _grid([1] * n_cols, -(-len(images) // n_cols), title, captions=captions, largest=1.9)
    for ax, image in zip(axes.flat, images, strict=False):
        ax.imshow(image)
    for ax in axes.flat[len(images) :]:
        ax.remove()
    return fig


@rc_context(STYLE)
def plot_gradcam(images, heatmaps, true, predicted, confidence, alpha=0.5, title=None, classes=None, names=None):
    """Grad-CAM: each image, and for every set of heatmaps the heatmap and its overlay on the image.

    `images`: uint8 (K, H, W, 3); `heatmaps`: one `Heatmaps` (maps (K, H, W) in 0..1), or a list of them: several
    layers, or classes, side by side; `true`, `predicted`: K class names (true[k] None where unknown); `confidence`: K
    fractions; `alpha`: weight of the heatmap in the overlay, 0..1; `classes`: the names of the heatmaps' targets;
    `names`: K texts to put over the classes, such as file names. A text replaces a negligible map. Raises InputError
    for a wrong `alpha`, ValueError on unequal lengths.
    """
    if not 0 <= alpha <= 1:
        raise InputError("must lie between 0 (the image alone) and 1 (the heatmap alone)", alpha=alpha)
    sets = heatmaps if isinstance(heatmaps, (list, tuple)) else [heatmaps]
    lengths = dict(images=images, true=true, predicted=predicted, confidence=confidence, names=names)
    check_lengths(lengths | {f"heatmaps {k}": maps.maps for k, maps in enumerate(sets)})
    if not len(images):
        return _message(title or "Grad-CAM", "no images to explain")

    n_tiles = 1 + 2 * len(sets)
    n_groups = 2 if n_tiles <= 5 and len(images) > 1 else 1  # images side by side
    ratios = [1] * n_tiles + ([0.2] + [1] * n_tiles) * (n_groups - 1)  # a narrow empty column between two groups
    shared, facts, notes = _describe(sets, true, predicted, classes)
    notes = [f"{percent(sure)} sure{note}" for sure, note in zip(confidence, notes, strict=True)]
    heads = ["image"] + [head for fact in facts for head in (f"{fact}\nheatmap".strip(), "overlay")]
    captions = list(zip(names or [None] * len(images), true, predicted, notes, strict=True))
    options = dict(heads=[*heads, "", *heads], captions=captions, span=n_tiles)
    title = "\n".join(filter(None, (title, shared)))
    fig, axes = _grid(ratios, -(-len(images) // n_groups), title, **options, extra=0.5)
    groups = [row[start : start + n_tiles] for row in axes for start in range(0, len(ratios), n_tiles + 1)]
    for k, group in enumerate(groups[: len(images)]):
        group[0].imshow(images[k])
        for maps, heat, overlay in zip(sets, group[1::2], group[2::2], strict=True):
            overlay.imshow(images[k])
            if maps.negligible[k]:
                heat.set(facecolor="#EEEEEE", box_aspect=1)
                text = wrap("negligible: nothing speaks for the class", 0.7, SMALL - 1)
                heat.text(0.5, 0.5, text, ha="center", va="center", color=GREY, fontsize=SMALL - 1)
            else:
                heat.imshow(maps.maps[k], **HEAT)
                overlay.imshow(maps.maps[k], alpha=alpha, **HEAT)
    for ax in [*np.ravel(groups[len(images) :]), *axes[:, n_tiles : n_tiles + 1].flat]:
        ax.remove()
    bar = fig.colorbar(ScalarMappable(cmap=HEAT["cmap"]), ax=fig.axes, location="bottom", shrink=0.4, aspect=30)
    bar.set_ticks([])
    bar.set_label("dark: no weight, bright: most weight in this image", fontsize=SMALL, color=GREY)
    return fig


def _describe(sets, true, predicted, classes):
    """(what all sets have in common, a head for each set with the rest, a note for each image).

    A note names the explained class where it is neither the same for all images nor always the true or predicted one.
    """
    facts, explained = [], [{} for _ in true]
    for maps in sets:
        names = [str(target) if classes is None else classes[target] for target in maps.targets]
        usual = {tuple(names[:1] * len(names)): f"for class {names[0]}", tuple(true): "for the true class"}
        usual[tuple(predicted)] = "for the predicted class"
        which = usual.get(tuple(names)) if maps.explains_class else "whatever the class"
        for k, name in enumerate(() if which else names):
            explained[k][name] = True
        size = f"{maps.map_size[0]} x {maps.map_size[1]} map".replace(" ", "\N{NO-BREAK SPACE}")
        facts.append((maps.method, f"{maps.layer}, {size}", which or "for the class named below each"))
    notes = [f", explained: class {' and '.join(names)}" if names else "" for names in explained]
    shared = [fact for fact in facts[0] if all(fact in row for row in facts)]
    return ", ".join(shared), [", ".join(fact for fact in row if fact not in shared) for row in facts], notes


def _grid(ratios, n_rows, title, heads=(), captions=(), span=1, largest=1.3, extra=0):
    """A Figure of square axes without ticks, and its axes as an array (rows, columns).

    `ratios`: relative widths of the columns; `heads`: a text over each column; `captions`: (name or None, true or
    None, predicted, note) under every `span` columns and a gap; `largest`: inches of an image; `extra`: inches under
    the grid.
    """
    tile = np.clip(style.WIDTH / sum(ratios) - GAP, 0.8, largest)
    width = max(sum(ratios) * (tile + GAP), 4.2)
    title = "\n".join(wrap(line, width - 2 * GAP, style.LARGE) for line in (title or "").split("\n"))
    heads = ["\n".join(wrap(line, tile) for line in head.split("\n")) for head in heads]
    captions = [_caption(*words, span * tile) for words in captions]
    above = max((0.1 + LINE * (head.count("\n") + 1) for head in heads), default=0)
    below = max((0.07 + LINE * len(lines) for lines in captions), default=0)
    height = 0.22 * len(title.splitlines()) + above + n_rows * (tile + GAP + below) + extra
    fig = Picture(figsize=(width, height), layout="compressed")
    fig.get_layout_engine().set(w_pad=GAP / 2, h_pad=GAP / 2, wspace=0, hspace=0)
    fig.suptitle(title, x=GAP / 2 / width, ha="left")
    axes = fig.subplots(n_rows, len(ratios), squeeze=False, width_ratios=ratios)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#BBBBBB", linewidth=0.6)
    for ax, head in zip(axes[0], heads, strict=False):
        ax.set_title(head, fontsize=SMALL, color=GREY)
    offset = dict(xycoords="axes fraction", textcoords="offset points", annotation_clip=False)
    for ax, lines in zip(axes[:, :: span + (span > 1)].flat, captions, strict=False):
        for k, (text, color) in enumerate(lines):  # they may be wider than the image
            line = ax.annotate(text, (0, 0), (0, -3 - 72 * LINE * k), va="top", color=color, fontsize=SMALL, **offset)
            line.set_in_layout(False)
        ax.set_xlabel("\n".join(" " for _ in lines), fontsize=SMALL)  # keeps the space free
    return fig, axes


def _caption(name, true, predicted, note, width):
    """[(line of at most `width` inches, colour)]; `name` and `true` are None where there is none."""
    color = style.BLUE if true in (None, predicted) else style.VERMILION
    texts = (name, "black"), (true and f"true: {true}", style.BLUE), (f"predicted: {predicted}", color), (note, GREY)
    return [(line, color) for text, color in texts if text for line in wrap(text, width).split("\n")]


def _message(title, text):
    """A small picture with a text in place of images."""
    fig = Picture(figsize=(5.5, 1.3))
    fig.text(0.03, 0.9, wrap(title or "", 5.2, style.LARGE), fontsize=style.LARGE, va="top")
    fig.text(0.5, 0.35, wrap(text, 5, style.NORMAL), ha="center", va="center", color=GREY)
    return fig
