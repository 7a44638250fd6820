"""Pictures made of images: arrays in, a matplotlib Figure out, every pixel of a 32 x 32 image a square."""

import numpy as np

from cifar_fastai.errors import InputError
from cifar_fastai.names import CLASSLESS
from cifar_fastai.plots.page import (
    BLUE,
    GAP,
    GREY,
    LARGE,
    MARGIN,
    NORMAL,
    SMALL,
    VERMILION,
    WIDTH,
    Page,
    percent,
    span,
    text_height,
    text_width,
    wrap,
)

__all__ = ["plot_augmentations", "plot_gradcam", "plot_tiles"]

HEAT = {"cmap": "inferno", "vmin": 0, "vmax": 1}


def plot_augmentations(columns):
    """The same images after each transform: one row per image, one column per transform.

    `columns`: {title: uint8 (K, H, W, 3)}, drawn in that order. Raises ValueError unless every column has the same
    number of images, at least one.
    """
    columns = {title: _pixels(images) for title, images in columns.items()}
    counts = {title: len(images) for title, images in columns.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"every column needs the same number of images, at least one; given: {counts}")
    tile = _tile(len(columns), largest=1.3, smallest=0.8)
    heads = [wrap(title, tile, NORMAL) for title in columns]
    n_rows = next(iter(counts.values()))
    top = 0.5 + _height(*heads, size=NORMAL)
    page = Page(max(span(len(columns), tile) + 2 * MARGIN, 4.2), top + span(n_rows, tile) + MARGIN)
    page.text(MARGIN, 0.13, "Augmentations", LARGE)
    for column, (head, images) in enumerate(zip(heads, columns.values(), strict=True)):
        x = MARGIN + column * (tile + GAP)
        page.text(x + tile / 2, top - 0.06, head, NORMAL, ha="center", va="bottom")
        for row, image in enumerate(images):
            page.image(x, top + row * (tile + GAP), tile, (image, {}))
    return page.figure


def plot_tiles(images, true, predicted, confidence, losses=None, n_cols=5, title=None, empty="no misclassified images"):
    """Images with their true class, the predicted one and how sure the model was.

    `images`: uint8 (K, H, W, 3); `true`, `predicted`: K class names; `confidence`: K fractions; `losses`: K numbers or
    None. With K = 0 the picture says `empty`. Raises InputError for `n_cols` below 1, ValueError on unequal lengths.
    """
    if n_cols < 1:
        raise InputError(f"{n_cols} columns of images: give at least 1")
    images = _pixels(images)
    _check_lengths(images=images, true=true, predicted=predicted, confidence=confidence, losses=losses)
    if not len(images):
        return _nothing(title, empty)
    n_cols = min(n_cols, len(images))
    tile = _tile(n_cols, largest=1.9, smallest=0.8)
    captions = []  # for each image its lines: lists of texts beside each other, in their colours
    for k in range(len(images)):
        sure = f"{percent(confidence[k])} sure" + ("" if losses is None else f", loss {losses[k]:.2f}")
        lines = *_verdict(true[k], predicted[k], predicted[k]), (sure, GREY)
        captions.append([[(wrap(text, tile, SMALL), color)] for text, color in lines])
    pitch = tile + 0.2 + max(map(_caption_height, captions))
    width = max(span(n_cols, tile) + 2 * MARGIN, 3.5)
    head = wrap(title or "", width - 2 * MARGIN, LARGE)
    top = MARGIN + (_height(head, size=LARGE) + 0.1 if head else 0)
    page = Page(width, top + -(-len(images) // n_cols) * pitch)
    page.text(MARGIN, 0.13, head, LARGE)
    for k, (image, lines) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + k % n_cols * (tile + GAP), top + k // n_cols * pitch
        page.image(x, y, tile, (image, {}))
        _caption(page, x, y + tile + 0.05, lines)
    return page.figure


def plot_gradcam(images, heatmaps, true, predicted, confidence, alpha=0.5, title=None, classes=None):
    """Grad-CAM: each image, and for every set of heatmaps the heatmap and the two laid over each other.

    `images`: uint8 (K, H, W, 3); `heatmaps`: one `Heatmaps` (maps (K, H, W) in 0..1), or a list of them: several
    layers, or classes, side by side; `true`, `predicted`: K class names; `confidence`: K fractions; `alpha`: weight of
    the heatmap in the overlay, 0..1; `classes`: the names that the heatmaps' targets count in. A negligible map is not
    drawn: words stand in its place. Raises InputError for a wrong `alpha`, ValueError on unequal lengths.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}: give a number from 0 (the image alone) to 1 (the heatmap alone)")
    images, sets = _pixels(images), list(heatmaps) if isinstance(heatmaps, (list, tuple)) else [heatmaps]
    if not sets:
        raise ValueError("no heatmaps to draw: give one Heatmaps or a list of them")
    _check_lengths(images=images, true=true, predicted=predicted, confidence=confidence)
    for maps in sets:
        _check_lengths(images=images, maps=maps.maps, targets=maps.targets, negligible=maps.negligible)
    if not len(images):
        return _nothing(title or "Grad-CAM", "no images to explain")

    n_tiles = 1 + 2 * len(sets)
    n_groups = 2 if n_tiles <= 5 and len(images) > 1 else 1  # images side by side on the page
    between = 0.3  # inches from one to the next
    room = (WIDTH - 2 * MARGIN - between * (n_groups - 1)) / n_groups
    tile = np.clip((room + GAP) / n_tiles - GAP, 0.75, 1.3)
    group = span(n_tiles, tile)
    width = max(2 * MARGIN + n_groups * group + between * (n_groups - 1), 5.5)

    common, apart, named = _facts(sets, true, predicted, classes)
    head = wrap(": ".join(filter(None, (title, common))), width - 2 * MARGIN, LARGE)
    heads = [wrap(text, 2 * tile, SMALL) for text in apart]
    key_y = 0.13 + _height(head, size=LARGE)
    heads_y = key_y + 0.3
    words_y = heads_y + (_height(*heads) if any(heads) else 0)
    top = words_y + 0.24

    captions = []  # for each image its lines: lists of texts beside each other, in their colours
    for k in range(len(images)):
        verdict = _verdict(true[k], predicted[k], f"{predicted[k]}, {percent(confidence[k])}")
        fits = sum(text_width(text, SMALL) for text, _ in verdict) + 0.15 <= group
        lines = [verdict] if fits else [[part] for part in verdict]
        lines += [[(f"explained: class {names[k]}", GREY)] for names in named]
        captions.append([[(wrap(text, group, SMALL), color) for text, color in line] for line in lines])
    rows = [range(k, min(k + n_groups, len(images))) for k in range(0, len(images), n_groups)]
    pitches = [max(_caption_height(captions[k]) for k in row) + 0.03 + tile + 0.17 for row in rows]

    page = Page(width, top + sum(pitches))
    page.text(MARGIN, 0.13, head, LARGE)
    _heat_key(page, MARGIN, key_y)
    for column in range(n_groups):
        x = MARGIN + column * (group + between)
        for k in range(n_tiles):
            word = ("heatmap", "overlay")[(k - 1) % 2] if k else "image"
            page.text(x + k * (tile + GAP) + tile / 2, words_y, word, SMALL, ha="center", color=GREY)
        for k, text in enumerate(heads):
            page.text(x + (2 * k + 1) * (tile + GAP), heads_y, text, SMALL)
    for row, pitch in zip(rows, pitches, strict=True):
        for column, k in enumerate(row):
            x = MARGIN + column * (group + between)
            _caption(page, x, top, captions[k])
            maps = [(one.maps[k], one.negligible[k]) for one in sets]
            _explanation(page, x, top + pitch - tile - 0.17, tile, images[k], maps, alpha)
        top += pitch
    return page.figure


def _caption(page, x, y, lines):
    """Lines of texts beside each other, as (text, colour)."""
    for line in lines:
        part_x = x
        for text, color in line:
            page.text(part_x, y, text, SMALL, color=color)
            part_x += text_width(text.split("\n")[0], SMALL) + 0.15
        y += _height(*(text for text, _ in line))


def _caption_height(lines):
    return sum(_height(*(text for text, _ in line)) for line in lines)


def _explanation(page, x, y, tile, image, maps, alpha):
    """An image and, for each of `maps` ((H, W), whether it is negligible), the heatmap and the overlay."""
    page.image(x, y, tile, (image, {}))
    for heat, negligible in maps:
        x += tile + GAP
        if negligible:
            page.image(x, y, tile).set_facecolor("#EEEEEE")
            text = wrap("negligible: nothing speaks for the class", 0.9 * tile, SMALL - 1)
            page.text(x + tile / 2, y + tile / 2, text, SMALL - 1, ha="center", va="center", color=GREY)
        else:
            page.image(x, y, tile, (heat, HEAT))
        x += tile + GAP
        page.image(x, y, tile, (image, {}), *([] if negligible else [(heat, HEAT | {"alpha": alpha})]))


def _facts(sets, true, predicted, classes):
    """Method, layer, map and class in words: what all sets share, what tells each from the others; and, for every set
    whose class differs from image to image in another way than the true and the predicted do, the K names."""
    facts, named = [], []
    for maps in sets:
        names = [str(target) if classes is None else classes[target] for target in maps.targets]
        if maps.method in CLASSLESS:
            which = "whatever the class"
        elif names == list(predicted):
            which = "for the predicted class"
        elif names == list(true):
            which = "for the true class"
        elif len(set(names)) == 1:
            which = f"for class {names[0]}"
        else:
            which = "for the class named above each"
            named.append(names)
        facts.append((maps.method, f"{maps.layer}, {maps.map_size[0]} x {maps.map_size[1]} map", which))
    shared = [len(set(column)) == 1 for column in zip(*facts, strict=True)]
    common = ", ".join(fact for fact, same in zip(facts[0], shared, strict=True) if same)
    apart = [", ".join(fact for fact, same in zip(row, shared, strict=True) if not same) for row in facts]
    return common, apart, named


def _heat_key(page, x, y):
    """What the heatmap's colours mean."""
    for text in "dark: no weight", None, "bright: most weight in this image":
        if text:
            page.text(x, y, text, SMALL, color=GREY)
            x += text_width(text, SMALL) + 0.1
        else:
            page.image(x, y + 0.02, 1.0, (np.linspace(0, 1, 256)[None], HEAT), height=0.12)  # (1, 256)
            x += 1.1


def _verdict(true, predicted, words):
    """The true class, None where nobody knows it, and the predicted one in words and colours."""
    if true is None:
        return [(words, BLUE)]
    return [(f"true: {true}", BLUE), (f"predicted: {words}", BLUE if true == predicted else VERMILION)]


def _nothing(title, words):
    """A small page that says that there is nothing to show."""
    page = Page(5.5, 1.3)
    page.text(MARGIN, 0.13, wrap(title or "", 5.2, LARGE), LARGE)
    page.text(2.75, 0.8, wrap(words, 5, NORMAL), NORMAL, ha="center", va="center", color=GREY)
    return page.figure


def _tile(n, largest, smallest):
    """Inches that an image can have where `n` stand beside each other."""
    return np.clip((WIDTH - 2 * MARGIN + GAP) / n - GAP, smallest, largest)


def _height(*texts, size=SMALL):
    return text_height(max(text.count("\n") + 1 for text in texts), size)


def _pixels(images):
    images = np.asarray(images)
    if images.size and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise ValueError(f"images are {images.dtype} {images.shape}: they must be uint8 (K, H, W, 3)")
    return images


def _check_lengths(**arrays):
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one of each per image is needed; given: {lengths}")
