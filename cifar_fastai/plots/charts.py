"""Charts of a run: numbers in, a matplotlib Figure out."""

from itertools import cycle, product

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from cifar_fastai.plots import style
from cifar_fastai.plots.style import SMALL, STYLE, WIDTH, Picture, check_lengths, number, percent, text_width, wrap

LINES = style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.GREY  # of runs in one chart
NARROW = 5.8  # inches, of a chart that stands beside another on a page


@rc_context(STYLE)
def plot_curves(history, eval_split="test"):
    """Loss and metrics of train and of `eval_split` ("test" or "valid") by epoch, a panel for each.

    `history`: one dict per epoch with the keys epoch, train_loss, train_accuracy, valid_loss, valid_accuracy, or other
    metrics in place of the accuracies, which are fractions; None where not measured. Raises ValueError when there is no
    epoch.
    """
    check_lengths({"history": history}, at_least=1)
    epochs = [row["epoch"] for row in history]
    names = dict.fromkeys(name for row in history for name in row if name.startswith(("train_", "valid_")))
    quantities = list(dict.fromkeys(["loss", *(name[6:] for name in names)]))
    n_rows, looks = -(-len(quantities) // 2), {"accuracy": ("accuracy (%)", 100, "{:.1f} %")}
    fig = Picture(figsize=(WIDTH, 3.7 * n_rows), layout="constrained")
    axes = fig.subplots(n_rows, min(2, len(quantities)), squeeze=False).flat
    for ax in axes[len(quantities) :]:
        ax.remove()
    for ax, quantity in zip(axes, quantities, strict=False):
        name = quantity.replace("_", " ")
        label, scale, form = looks.get(quantity, (name, 1, "{:.3f}"))
        for split, key, look in ("train", "train", "o-"), (eval_split, "valid", "s-"):
            values = scale * np.array([row.get(f"{key}_{quantity}") for row in history], float)
            measured = values[np.isfinite(values)]
            last = form.format(measured[-1]) if len(measured) else "not measured"
            color, size = style.BLUE if key == "train" else style.VERMILION, 5 if len(epochs) <= 30 else 0
            ax.plot(epochs, values, look, color=color, markersize=size, label=f"{split}: {last}")
        ax.set(title=name.capitalize(), xlabel="epoch", ylabel=label, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        ax.legend(title="last value", alignment="left")
        _use_whole_numbers(ax.xaxis)
    losses = np.concatenate([line.get_ydata() for line in fig.axes[0].lines])
    losses = np.sort(losses[np.isfinite(losses)])[::-1]
    usual = losses <= 8 * losses[max(3, len(losses) // 10)] if len(losses) > 5 else [True]
    if not all(usual) and losses[usual][0] > 0:  # a few exploded losses would flatten all the others
        fig.axes[0].set_ylim(losses[-1] - 0.05 * losses[usual][0], 1.1 * losses[usual][0])
    return fig


@rc_context(STYLE)
def plot_together(histories):
    """The evaluated loss and accuracy by epoch, a line for each of `histories`, {name: history as in `plot_curves`}."""
    fig = Picture(figsize=(WIDTH, 3.7), layout="constrained")
    for ax, (quantity, scale) in zip(fig.subplots(1, 2), (("loss", 1), ("accuracy", 100)), strict=True):
        for (name, history), (line, color) in zip(histories.items(), product(("o-", "s:"), LINES), strict=False):
            values = scale * np.array([row.get(f"valid_{quantity}") for row in history], float)
            ax.plot([row["epoch"] for row in history], values, line, color=color, markersize=4, label=name)
        ax.set(title=quantity.capitalize(), xlabel="epoch", ylabel="accuracy (%)" if scale > 1 else "loss")
        ax.legend()
        _use_whole_numbers(ax.xaxis)
    return fig


@rc_context(STYLE)
def plot_schedule(lrs, moms, steps_per_epoch):
    """Learning rate and momentum by step, with the peak of the learning rate marked.

    `lrs`, `moms`: one value per step; `moms` is None where the optimizer has none. Raises ValueError when they are
    empty or differ in length.
    """
    check_lengths(dict(lrs=lrs, moms=moms), at_least=1)
    n_panels = 1 if moms is None else 2
    fig = Picture(figsize=(NARROW, 1.6 + 1.4 * n_panels), layout="constrained")
    axes = fig.subplots(n_panels, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:n_panels])[:, 0]
    panels = ("learning rate", lrs, style.BLUE), ("momentum", moms, style.PURPLE)
    for ax, (name, values, color) in zip(axes, panels, strict=False):
        values = np.asarray(values, float)
        high, constant = values.max(), np.ptp(values) <= 1e-6 * abs(values.max())
        course = f"constant at {number(high)}" if constant else f"from {number(values[0])} to {number(values[-1])}"
        ax.plot(values, color=color, linewidth=2, marker="o" if len(values) == 1 else None)
        ax.set_title(f"{name.capitalize()}, {course}", loc="left")
        ax.set_ylabel(name)
        ax.yaxis.set_major_formatter("{x:.4g}")  # no factor over the axis, where the epochs stand
        if constant:  # rounding noise must not look like a curve
            ax.set_ylim(0, 1.25 * high or 1)
        elif name == "learning rate":
            first, last = np.flatnonzero(values >= high * (1 - 1e-6))[[0, -1]]
            steps = f"step {first:,}" if last - first < steps_per_epoch / 2 else f"steps {first:,} to {last:,}"
            label = f"peak: {number(high)} at {steps} (epoch {first / steps_per_epoch:.1f})"
            ax.plot([first], [high], "o", color=style.VERMILION, label=label)
            ax.legend()
    top = axes[0].secondary_xaxis("top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch))
    top.set_xlabel("epoch")
    axes[-1].set_xlabel("step")
    _use_whole_numbers(top.xaxis)
    _use_whole_numbers(axes[-1].xaxis)
    return fig


@rc_context(STYLE)
def plot_lr_find(lrs, losses, suggestions):
    """The range test: loss by learning rate on a log axis, with every suggestion marked.

    `lrs`: above 0 and rising; `losses`: one for each; `suggestions`: {name: learning rate or None}.
    """
    lrs, losses = np.asarray(lrs, float), np.asarray(losses, float)
    fig = Picture(figsize=(NARROW, 3.8), layout="constrained")
    ax = fig.subplots()
    ax.plot(lrs, losses, color=style.GREY)
    lrs, losses = lrs[np.isfinite(losses)], losses[np.isfinite(losses)]
    looks = ("o", 18, style.BLUE), ("s", 14, style.ORANGE), ("D", 10, style.GREEN), ("^", 7.5, style.VERMILION)
    marks = []  # they shrink, so that several on one point all stay visible
    for (name, lr), (marker, size, color) in zip(suggestions.items(), cycle(looks), strict=False):
        x = [lr] if lr is not None and np.isfinite(lr) and len(losses) else []
        y = list(np.interp(np.log(x), np.log(lrs), losses)) if x else []
        label = f"{name}: {number(lr)}" if x else f"{name}: none"
        ax.plot(x, y, marker, markersize=size, color=color, markeredgecolor="white", label=label, zorder=3)
        ax.vlines(x, 0, 1, transform=ax.get_xaxis_transform(), color=color, linewidth=1, linestyle=":")
        marks += y
    if len(losses):  # leave out what explodes: it would flatten the part that matters
        best, start = losses.min(), np.percentile(losses[: losses.argmin() + 1], 90)
        top = max(best + 1.8 * (start - best), best + 0.1 * (losses.max() - best), *marks)
        room = 0.12 * (min(top, losses.max()) - best) or 1
        ax.set_ylim(best - room, min(top, losses.max()) + room)
    ax.set(title="Learning rate finder", xscale="log", xlabel="learning rate (log scale)", ylabel="loss (smoothed)")
    if suggestions:
        ax.legend(title="suggested learning rate", alignment="left", labelspacing=0.9, frameon=True, edgecolor="none")
    return fig


MANY_CLASSES, MOST_CONFUSED = 100, 40  # with more classes, charts show this many of the worst


@rc_context(STYLE)
def plot_class_accuracy(class_accuracy, accuracy):
    """A bar for every class, best first, and a line at the `accuracy` of all images.

    `class_accuracy`: {name: fraction, or None or NaN for a class without images}, at least one. Of more than 100
    classes, the 40 of the lowest accuracy are drawn.
    """
    values = np.array(list(class_accuracy.values()), float)
    order, which = np.argsort(-np.nan_to_num(values, nan=-1), kind="stable"), "best first"
    if len(values) > MANY_CLASSES:
        measured = order[np.isfinite(values[order])]
        order, which = measured[-MOST_CONFUSED:], f"the {MOST_CONFUSED} lowest of {len(values):,}"
    n_columns = 1 if len(order) <= 40 else 2
    n_rows = -(-len(order) // n_columns)
    names = {k: wrap(list(class_accuracy)[k], 2.6 / n_columns) for k in order}
    n_lines = max((len(name.splitlines()) for name in names.values()), default=1)
    height = max(0.27 if n_rows <= 20 else 0.19, 0.16 * n_lines)  # inches
    fig = Picture(figsize=(WIDTH, 1.6 + n_rows * height), layout="constrained")
    for ax, part in zip(fig.subplots(1, n_columns, squeeze=False)[0], np.array_split(order, n_columns), strict=True):
        ax.barh(range(len(part)), values[part], color=style.BLUE, alpha=0.75, height=0.7)
        line = ax.axvline(accuracy, color=style.VERMILION, linestyle="--")
        for row, value in enumerate(values[part]):
            ax.text(1.01, row, percent(value) if np.isfinite(value) else "no images", va="center", fontsize=SMALL)
        ax.set_yticks(range(len(part)), [names[k] for k in part], fontsize=SMALL, parse_math=False)
        ax.set(xlim=(0, 1), ylim=(n_rows - 0.4, -0.6), xlabel="accuracy")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        ax.grid(False, axis="y")
    fig.suptitle(f"Accuracy by class, {which}")
    fig.legend([line], [f"all images: {percent(accuracy)}"], loc="outside lower center", fontsize=style.NORMAL)
    return fig


@rc_context(STYLE)
def plot_confusion_matrix(matrix, classes):
    """Numbers of images by true class (rows) and predicted class (columns).

    `matrix`: int (C, C); `classes`: C names. Errors are coloured by their number, on a scale to 5 at least, right
    answers by their share of the true class; zeros stay white. Of more than 100 classes, the most confused pairs are
    drawn, as bars. Raises ValueError when the shapes disagree.
    """
    check_lengths(dict(matrix=matrix, classes=classes), at_least=1)
    matrix, n = np.asarray(matrix), len(classes)
    if n > MANY_CLASSES:
        return _plot_most_confused(matrix, classes)
    cell = np.clip(5.6 / n, 0.1, 1)  # inches
    size = min(9.5, 72 * 0.85 * cell)  # points
    names = [wrap(name, 2, size) for name in classes]
    widest = max(text_width(line, size) for name in names for line in name.split("\n"))
    turned = widest > 0.9 * cell
    sizes = max(n * cell + widest + 1.6, 5), max(n * cell + turned * widest + 1.2, 3.2)
    fig = Picture(figsize=sizes, layout="compressed")
    ax = fig.subplots()
    font = min(style.NORMAL, 72 * cell / (0.65 * len(str(matrix.max())) + 0.5))  # points
    right, share = np.eye(n, dtype=bool), matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # (C, C)
    scale = PowerNorm(0.7, 0, max(5, matrix[~right].max(initial=0)))
    layers = (right, share, Normalize(0, 1), style.BLUE), (~right & (matrix > 0), matrix, scale, style.VERMILION)
    for cells, values, norm, color in layers:
        colors = LinearSegmentedColormap.from_list(color, ["white", color])
        image = ax.imshow(np.ma.masked_where(~cells, values), cmap=colors, norm=norm)
        for row, column in np.argwhere(cells & (matrix > 0)) if font >= 5 else ():
            ink = "white" if norm(values[row, column]) > 0.85 else "black"
            ax.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=font, color=ink)
    if (matrix > 0)[~right].any():
        fig.colorbar(image, ax=ax, shrink=0.8, aspect=30, pad=0.02, label="errors: number of images")
    for axis, rotation in (ax.xaxis, 90 if turned else 0), (ax.yaxis, 0):
        axis.set_ticks(range(n), names, fontsize=size, parse_math=False, rotation=rotation)
        axis.set_ticks(np.arange(n + 1) - 0.5, minor=True)
    ax.grid(False)
    ax.grid(which="minor", linewidth=min(0.8, 2 * cell))
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(True)
    title = "Confusion matrix, numbers of images" if font >= 5 else "Confusion matrix"
    ax.set(title=title, xlabel="predicted class\nblue: right answers, by share of the true class", ylabel="true class")
    return fig


def _plot_most_confused(matrix, classes):
    """A bar for each of the pairs of classes that are confused most often."""
    errors = matrix * ~np.eye(len(classes), dtype=bool)
    cells = np.argsort(-errors, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [(t, p) for t, p in zip(*np.unravel_index(cells, errors.shape), strict=True) if errors[t, p]]
    names = [wrap(f"{classes[t]} taken for {classes[p]}", 3.6) for t, p in pairs]
    fig = Picture(figsize=(WIDTH, 1.4 + 0.19 * sum(len(name.splitlines()) for name in names)), layout="constrained")
    ax = fig.subplots()
    ax.barh(range(len(pairs)), [errors[pair] for pair in pairs], color=style.VERMILION, height=0.7)
    ax.set_yticks(range(len(pairs)), names, fontsize=SMALL, parse_math=False)
    ax.set(title=f"Most confused of {len(classes):,} classes", xlabel="number of images", ylim=(len(pairs) - 0.4, -0.6))
    _use_whole_numbers(ax.xaxis)
    ax.grid(False, axis="y")
    return fig


def _use_whole_numbers(axis):
    """Put the ticks at whole numbers, with a comma between thousands."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
