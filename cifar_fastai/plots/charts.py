"""Pictures of a run: arrays in, a matplotlib Figure out. Nothing is computed here but layout.

No figure passes through pyplot: a notebook that returns one shows it once, and nothing has to be closed. The charts
are here, the pictures made of images in `galleries`.
"""

from itertools import cycle

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from cifar_fastai.files import atomic_write
from cifar_fastai.plots.galleries import plot_augmentations, plot_gradcam, plot_tiles
from cifar_fastai.plots.page import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    LARGE,
    NORMAL,
    ORANGE,
    PURPLE,
    SMALL,
    VERMILION,
    WIDTH,
    Picture,
    percent,
    text_width,
    wrap,
)

__all__ = [
    "plot_augmentations",
    "plot_class_accuracy",
    "plot_confusion_matrix",
    "plot_curves",
    "plot_gradcam",
    "plot_lr_find",
    "plot_schedule",
    "plot_tiles",
    "save_figure",
]


def save_figure(fig, path):
    """Write `fig` to `path` as PNG; a reader finds the file whole or not at all. Raises ValueError and OSError."""
    if not str(path).lower().endswith(".png"):
        raise ValueError(f"pictures are written as PNG, and {str(path)!r} does not end in .png")
    with atomic_write(path, "wb") as file:
        fig.savefig(file, format="png", dpi=DPI)


def plot_curves(history, eval_split="test"):
    """Loss and accuracy of train and of `eval_split` ("test" or "valid") by epoch.

    `history`: one dict per epoch with the keys epoch, train_loss, train_accuracy, valid_loss, valid_accuracy;
    accuracies are fractions, None is what was not measured. Raises ValueError when there is no epoch.
    """
    if eval_split not in ("test", "valid"):
        raise ValueError(f"eval_split is {eval_split!r}: it must be 'test' or 'valid'")
    history = list(history)
    if not history:
        raise ValueError("no epoch to draw: the history is empty")
    epochs = _column(history, "epoch")
    fig = Picture(figsize=(WIDTH, 3.7), layout="constrained")
    losses, accuracies = fig.subplots(1, 2)
    _curves(losses, epochs, history, "loss", eval_split, 1, "{:.3f}")
    _curves(accuracies, epochs, history, "accuracy", eval_split, 100, "{:.1f} %")
    accuracies.set_ylabel("accuracy (%)")
    return fig


def _curves(ax, epochs, history, quantity, eval_split, scale, number):
    ends = []
    for split, key, color, marker in (("train", "train", BLUE, "o"), (eval_split, "valid", VERMILION, "s")):
        values = scale * _column(history, f"{key}_{quantity}")
        label = split if np.isfinite(values).any() else f"{split}: not measured"
        size = 5 if len(epochs) <= 30 else 0
        ax.plot(epochs, values, color=color, marker=marker, markersize=size, linewidth=1.8, label=label)
        if np.isfinite(values[-1]):
            ends.append((values[-1], f"{split}\n{number.format(values[-1])}", color))
    ax.set_title(f"{quantity.capitalize()} of train and {eval_split}", fontsize=LARGE)
    ax.set_xlabel("epoch")
    ax.set_ylabel(quantity)
    ax.legend(fontsize=SMALL)
    ax.margins(x=0.03, y=0.1)
    _integers(ax.xaxis)
    if len(epochs) == 1:
        ax.set_xlim(epochs[0] - 1, epochs[0] + 1)
        ax.set_xticks(epochs)
    _tidy(ax)
    # the last values stand beside their points, moved apart (in points) where those are close to each other
    low, high = ax.get_ylim()
    apart = (ends[0][0] - ends[-1][0]) / (high - low) * 190 if ends else 0  # a panel is about 190 points high
    up = max(27 - abs(apart), 0) / 2 * (1 if apart >= 0 else -1) if len(ends) == 2 else 0
    for (value, text, color), shift in zip(ends, (up, -up), strict=False):
        style = {"va": "center", "fontsize": SMALL, "color": color, "annotation_clip": False}
        ax.annotate(text, (epochs[-1], value), xytext=(8, shift), textcoords="offset points", **style)


def plot_schedule(lrs, moms, steps_per_epoch):
    """Learning rate and momentum by step, the peak of the learning rate marked.

    `lrs`, `moms`: one value per step; `moms` is None where the optimizer has none. Raises ValueError when they are
    empty or not of one length.
    """
    lrs, moms = np.asarray(lrs, float), None if moms is None else np.asarray(moms, float)
    if not len(lrs):
        raise ValueError("no step to draw: there are no learning rates")
    if moms is not None and len(moms) != len(lrs):
        raise ValueError(f"{len(lrs)} learning rates but {len(moms)} momenta: give one of each per step")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}: it must be at least 1")
    n_panels = 1 if moms is None else 2
    fig = Picture(figsize=(WIDTH, 2.2 + 1.7 * n_panels), layout="constrained")
    axes = fig.subplots(n_panels, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:n_panels])[:, 0]
    if not _steps(axes[0], lrs, "learning rate", BLUE, room=lrs.max()):
        _mark_peak(axes[0], lrs, steps_per_epoch)
    if moms is not None:
        _steps(axes[1], moms, "momentum", PURPLE, room=0.1)
    top = axes[0].secondary_xaxis("top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch))
    top.set_xlabel("epochs")
    _integers(top.xaxis)
    axes[-1].set_xlabel("step")
    _integers(axes[-1].xaxis)
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return fig


def _steps(ax, values, name, color, room):
    """One quantity by step; `room`: what to show around one that is constant. Returns whether it is."""
    low, high = values.min(), values.max()
    constant = high - low <= 1e-6 * abs(high)
    course = f"constant at {high:.3g}" if constant else f"from {values[0]:.3g} to {values[-1]:.3g}"
    ax.plot(values, color=color, linewidth=2, marker="o" if len(values) == 1 else None)
    ax.set_title(f"{name.capitalize()}, {course}", fontsize=LARGE, loc="left")
    ax.set_ylabel(name)
    margins = (room, room) if constant else (0.08 * (high - low), 0.22 * (high - low))  # space for the peak's label
    if any(margins):
        ax.set_ylim(low - margins[0], high + margins[1])
    ax.set_xlim(-max(0.02 * len(values), 0.5), max(1.02 * len(values), 1.5))
    _tidy(ax)
    return constant


def _mark_peak(ax, lrs, steps_per_epoch):
    step = int(lrs.argmax())
    lower = np.flatnonzero(lrs[step:] < lrs[step] * (1 - 1e-6))
    end = step + (lower[0] if len(lower) else len(lrs) - step) - 1  # the last step of the peak
    where = f"at step {step:,} (epoch {step / steps_per_epoch:.1f})"
    if end - step >= steps_per_epoch / 2:
        where = f"from step {step:,} to {end:,} (epoch {step / steps_per_epoch:.1f} to {end / steps_per_epoch:.1f})"
    side = "left" if step < len(lrs) / 3 else "right" if step > len(lrs) * 2 / 3 else "center"
    ax.plot([step] * 2, [ax.get_ylim()[0], lrs[step]], color=VERMILION, linewidth=1, linestyle=":", zorder=1)
    ax.plot([step], lrs[[step]], color=VERMILION, marker="o", linestyle="none", zorder=3)
    style = {"textcoords": "offset points", "ha": side, "va": "bottom", "color": VERMILION}
    ax.annotate(f"peak {lrs[step]:.3g} {where}", (step, lrs[step]), xytext=(0, 6), **style)


def plot_lr_find(lrs, losses, suggestions):
    """The range test: loss by learning rate on a log axis, every suggestion marked.

    `suggestions`: {name: learning rate, or None where there is none}. Raises ValueError unless there is one loss per
    learning rate and the learning rates are above 0 and rise.
    """
    lrs, losses = np.asarray(lrs, float), np.asarray(losses, float)
    if not len(lrs) or len(lrs) != len(losses):
        raise ValueError(f"{len(lrs)} learning rates and {len(losses)} losses: give one of each per step")
    if lrs[0] <= 0 or (np.diff(lrs) <= 0).any():
        raise ValueError("the learning rates of a range test must be above 0 and rise from step to step")
    fig = Picture(figsize=(WIDTH, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.plot(lrs, losses, color=GREY, linewidth=1.8)
    # marks shrink from one to the next: where several fall on one point, each still shows around the one above it
    looks = zip(cycle("osD^"), cycle((18, 14, 10, 7.5)), cycle((BLUE, ORANGE, GREEN, VERMILION)), strict=False)
    known = np.isfinite(losses)
    for (name, lr), (marker, size, color) in zip(suggestions.items(), looks, strict=False):
        found = lr is not None and np.isfinite(lr) and known.any()
        loss = np.interp(np.log(lr), np.log(lrs[known]), losses[known]) if found else np.nan
        mark = {"marker": marker, "markersize": size, "color": color, "markeredgecolor": "white", "linestyle": "none"}
        label = f"{name}: {lr:.3g}" if found else f"{name}: none"
        ax.plot([lr if found else np.nan], [loss], label=label, zorder=3, **mark)
        if found:
            ax.axvline(lr, color=color, linewidth=1, linestyle=":", zorder=1)
    if known.any():  # the rise at the end is cut where it would flatten all that comes before
        first, best, top = losses[known][0], losses[known].min(), losses[known].max()
        room = max(1.8 * (first - best), 0.25 * (top - best))
        ax.set_ylim(top=best + room if best + room < top else None)
    ax.set_xscale("log")
    ax.set_title("Learning rate finder", fontsize=LARGE)
    ax.set_xlabel("learning rate (log scale)")
    ax.set_ylabel("loss (smoothed)")
    if suggestions:
        ax.legend(title="suggested learning rate", alignment="left", labelspacing=0.9)
    _tidy(ax)
    return fig


def plot_class_accuracy(class_accuracy, accuracy=None):
    """A bar for every class, best first, and a line at `accuracy`, or else at the mean of the classes.

    `class_accuracy`: {name: fraction, or None or NaN for a class without images}. Raises ValueError when empty.
    """
    if not class_accuracy:
        raise ValueError("no class to draw: class_accuracy is empty")
    values = {name: np.nan if value is None else 100 * value for name, value in class_accuracy.items()}
    order = sorted(values, key=lambda name: -np.nan_to_num(values[name], nan=-1))
    known = [value for value in values.values() if np.isfinite(value)]
    mean = 100 * accuracy if accuracy is not None else np.mean(known) if known else np.nan
    n_columns = 1 if len(order) <= 40 else 2
    n_rows = -(-len(order) // n_columns)
    names = {name: wrap(name, 2.6 / n_columns, SMALL) for name in order}
    lines = max(text.count("\n") + 1 for text in names.values())
    height = max(0.27 if n_rows <= 20 else 0.19, 0.16 * lines)  # inches
    fig = Picture(figsize=(WIDTH, 1.3 + n_rows * height), layout="constrained")
    for column, ax in enumerate(fig.subplots(1, n_columns, squeeze=False)[0]):
        part = order[column * n_rows : (column + 1) * n_rows]
        ax.barh(range(len(part)), [values[name] for name in part], color=BLUE, alpha=0.75, height=0.7)
        line = ax.axvline(mean, color=VERMILION, linewidth=1.8, linestyle="--")
        for row, name in enumerate(part):
            text = f"{values[name]:.1f} %" if np.isfinite(values[name]) else "no images"
            ax.text(101, row, text, va="center", fontsize=SMALL)
        ax.set_yticks(range(len(part)), [names[name] for name in part], fontsize=SMALL, parse_math=False)
        ax.set_ylim(n_rows - 0.4, -0.6)
        ax.set_xlim(0, 100)
        ax.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
        ax.set_xlabel("accuracy")
        _tidy(ax, grid="x")
        ax.tick_params(axis="y", length=0)
    fig.suptitle("Accuracy by class, best first", fontsize=LARGE)
    label = f"{'mean of the classes' if accuracy is None else 'all images'}: {percent(mean / 100)}"
    fig.legend([line], [label], loc="outside lower center", frameon=False)
    return fig


def plot_confusion_matrix(matrix, classes):
    """Numbers of images by true class (rows) and predicted class (columns).

    `matrix`: int (C, C); `classes`: C names. A cell's colour is its share of the row's images, on one scale for what
    is right and on another for what is wrong, so that few errors show beside many right answers; zeros stay white.
    Raises ValueError when the shapes do not agree.
    """
    matrix, n = np.asarray(matrix), len(classes)
    if not n or matrix.shape != (n, n):
        raise ValueError(f"the matrix has shape {matrix.shape} and there are {n} classes: it must be (C, C)")
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # (C, C), percent of the true class
    right = np.eye(n, dtype=bool)
    wrong = ~right & (matrix > 0)
    worst = share[wrong].max(initial=0)

    cell = np.clip(5.6 / n, 0.1, 1)  # inches
    size = min(9.5, 72 * 0.85 * cell)  # points
    names = [wrap(name, 2, size) for name in classes]
    widest = max(text_width(line, size) for name in names for line in name.split("\n"))
    tilted = {"rotation": 90} if n > 12 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    turn = {} if widest < 0.9 * cell else tilted
    under = (widest if n > 12 else 0.65 * widest + 0.1) if turn else 0.3
    fig = Picture(figsize=(max(n * cell + widest + 2.2, 5), max(n * cell + under + 0.75, 3)), layout="constrained")
    ax = fig.subplots()
    layers = [_cells(fig, ax, np.ma.masked_where(~right, share), "Blues", (0.05, 0.5), "right", vmin=0, vmax=100)]
    if worst:
        scale = PowerNorm(0.7, 0, worst)
        layers.append(_cells(fig, ax, np.ma.masked_where(~wrong, share), "Oranges", (0.1, 0.9), "wrong", norm=scale))
    number = min(NORMAL, 72 * cell / (0.65 * len(f"{matrix.max():.0f}") + 0.5))  # points
    for row, column in zip(*np.nonzero(matrix), strict=True) if number >= 5 else ():
        red, green, blue, _ = layers[int(row != column)].to_rgba(share[row, column])
        color = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.55 else "black"
        ax.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", fontsize=number, color=color)
    ax.set_xticks(range(n), names, fontsize=size, parse_math=False, **turn)
    ax.set_yticks(range(n), names, fontsize=size, parse_math=False)
    edges = np.arange(n + 1) - 0.5
    ax.set_xticks(edges, minor=True)
    ax.set_yticks(edges, minor=True)
    ax.grid(which="minor", color="#DDDDDD", linewidth=min(0.8, 2 * cell))
    ax.tick_params(which="both", length=0)
    ax.set_title("Confusion matrix, numbers of images" if number >= 5 else "Confusion matrix", fontsize=LARGE)
    ax.set_xlabel("predicted class", fontsize=NORMAL)
    ax.set_ylabel("true class", fontsize=NORMAL)
    return fig


def _cells(fig, ax, share, cmap, part, words, **scale):
    """The cells of `share` that are not masked, in a part of a colour map, and the scale beside them."""
    cmap = ListedColormap(colormaps[cmap](np.linspace(*part, 256)))
    image = ax.imshow(share, cmap=cmap, interpolation="nearest", **scale)
    bar = fig.colorbar(image, ax=ax, shrink=0.8, aspect=30, pad=0.01)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(decimals=0 if image.norm.vmax > 5 else 1, symbol=" %"))
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(f"{words}, share of the true class", fontsize=SMALL)
    return image


def _column(history, key):
    """One float per epoch; NaN where it was not measured. Raises ValueError for a key that no epoch has."""
    if not any(key in row for row in history):
        raise ValueError(f"the history has no {key!r}; it has {', '.join(history[0])}")
    return np.array([np.nan if row.get(key) in (None, "") else float(row[key]) for row in history])


def _integers(axis):
    """Ticks at whole numbers, at round ones where there are many."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _tidy(ax, grid="both"):
    ax.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
