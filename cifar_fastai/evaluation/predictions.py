"""One pass of a learner over a split (`predict`), and the metrics and tables that follow from it (`Predictions`)."""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cifar_fastai.errors import InputError, check_choice, reason
from cifar_fastai.evaluation.tta import PLAIN, TTA, view
from cifar_fastai.files import atomic_write, check_regular
from cifar_fastai.hardware import n_processes, rank
from cifar_fastai.training.distributed import gathered

COLUMNS = dict(index=np.int64, target=object, predicted=object, confidence=np.float32, loss=np.float32)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a network for the N images of a split, in the split's order.

    A position is an index into these arrays. A fraction that would divide by zero, as of a class without images, is
    None. `from_csv` reads everything but `probs`.
    """

    probs: np.ndarray | None  # (N, C) float32
    targets: np.ndarray  # (N,) int64
    losses: np.ndarray  # (N,) float32, the learner's loss function for each image
    indices: np.ndarray  # (N,) int64, position in the split
    classes: tuple[str, ...]  # C names
    predicted: np.ndarray = None  # (N,) int64
    confidence: np.ndarray = None  # (N,) float32, the probability of `predicted`

    def __post_init__(self):
        if self.predicted is None:
            object.__setattr__(self, "predicted", self.probs.argmax(1))
            object.__setattr__(self, "confidence", self.probs.max(1))

    def __len__(self):
        return len(self.targets)

    def __repr__(self):
        images = f"{len(self):,} images of {len(self.classes)} classes"
        return f"{images}: accuracy {self.accuracy:.2%}, loss {self.loss:.4f}, {len(self.errors):,} misclassified"

    @property
    def accuracy(self):
        """Fraction of images that are classified correctly."""
        return float((self.predicted == self.targets).mean())

    @property
    def loss(self):
        """Mean loss over images."""
        return float(self.losses.mean(dtype=np.float64))

    @cached_property
    def confusion_matrix(self):
        """Numbers of images, int64 (C, C): true class by row, predicted class by column."""
        return confusion_matrix(self.targets, self.predicted, labels=range(len(self.classes)))

    @property
    def class_accuracy(self):
        """{class: fraction of its images that are classified correctly}, the recall."""
        return {row["class"]: row["accuracy"] for row in self.class_table}

    @cached_property
    def class_table(self):
        """One dict per class: class, images, correct, accuracy (the recall), precision, f1."""
        ids = range(len(self.classes))
        scores = precision_recall_fscore_support(self.targets, self.predicted, labels=ids, zero_division=np.nan)
        table = pd.DataFrame(scores, ["precision", "accuracy", "f1", "images"], dtype=object).T
        table = table.assign(**{"class": self.classes, "correct": self.confusion_matrix.diagonal().astype(object)})
        return table.where(table.notna(), None).to_dict("records")

    @cached_property
    def errors(self):
        """Positions of the misclassified images, worst loss first."""
        ranked = self.top_losses()
        return ranked[(self.predicted != self.targets)[ranked]]

    def misclassified(self, n=None, true=None, predicted=None):
        """Positions of the `n` (default: all) misclassified images with the worst losses, worst first.

        `true`, `predicted`: only images of this class, or predicted as this class, by name. Raises InputError for an
        unknown name and for `n` below 1.
        """
        if n is not None and n < 1:
            raise InputError("must be at least 1", n=n)
        positions = self.errors
        for argument, name, labels in ("true", true, self.targets), ("predicted", predicted, self.predicted):
            if name is not None:
                label = self.classes.index(check_choice(self.classes, **{argument: name}))
                positions = positions[labels[positions] == label]
        return positions[:n]

    def top_losses(self, k=None):
        """Positions of the `k` (default: all) images with the worst losses, worst first; NaN counts as worst."""
        return np.argsort(-np.nan_to_num(self.losses, nan=np.inf), kind="stable")[:k]

    def most_confused(self, min_val=1):
        """[(true class, predicted class, images)] of the pairs with at least `min_val` images, most images first."""
        matrix = self.confusion_matrix * ~np.eye(len(self.classes), dtype=bool)
        pairs = np.argwhere(matrix >= max(min_val, 1)).tolist()
        return sorted(((self.classes[i], self.classes[j], int(matrix[i, j])) for i, j in pairs), key=lambda p: -p[2])

    def names_at(self, positions):
        """(true, predicted) class names of the images at `positions`, two lists."""
        names = np.array(self.classes, dtype=object)
        return names[self.targets[positions]].tolist(), names[self.predicted[positions]].tolist()

    def to_csv(self, path):
        """Write one row per image: index, target and predicted (class names), confidence, loss. Atomic.

        Names are written by `as_cell`.
        """
        names = (map(as_cell, column) for column in self.names_at(slice(None)))
        # numpy writes a float32 as the shortest text that reads back as the same float32
        values = self.indices, *names, self.confidence.astype(str), self.losses.astype(str)
        with atomic_write(path) as file:
            pd.DataFrame(dict(zip(COLUMNS, values, strict=True))).to_csv(file, index=False, lineterminator="\n")

    @classmethod
    def from_csv(cls, path, classes=None):
        """Read a file that `to_csv` wrote. `classes`: the names in order, by default those in the file, sorted.

        Raises InputError for a file that is missing, damaged or another table.
        """
        missing = dict.fromkeys(("confidence", "loss"), ["nan"])  # elsewhere a text such as "NA" is the name of a class
        try:
            table = pd.read_csv(check_regular(path), dtype=COLUMNS, keep_default_na=False, na_values=missing)
            if list(table) != list(COLUMNS) or table.empty or not isinstance(table.index, pd.RangeIndex):
                raise ValueError(f"the columns must be {', '.join(COLUMNS)}, in one row for each image")
            for column in "target", "predicted":
                table[column] = table[column].str.replace(r"^'(?='*[=+\-@])", "", regex=True)
            names = {*table["target"], *table["predicted"]}
            classes = tuple(classes or sorted(names))
            if not names <= {*classes}:
                raise ValueError(f"it has classes that are not among {', '.join(classes)}")
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: cannot be read as predictions ({reason(error)})") from None
        index, target, predicted, confidence, loss = (table[name].to_numpy() for name in COLUMNS)
        target, predicted = (pd.Index(classes).get_indexer(names) for names in (target, predicted))
        return cls(None, target, loss, index, classes, predicted, confidence)


def as_cell(text):
    """`text` for a table, with an apostrophe in front if a spreadsheet would compute it, such as =1+1."""
    return re.sub(r"^(?='*[=+\-@])", "'", text)


class _Views(Callback):
    """Run the model on the views that the TTAs need, each once; keep the probabilities and losses of each TTA.

    It acts before a precision callback (order 10) leaves its autocast, so that all views have the image's precision.
    """

    order = 9

    def __init__(self, ttas):
        self.results = {tta: ([], []) for tta in ttas}
        self.views = dict.fromkeys(key for tta in ttas for key in TTA[tta])

    def after_pred(self):
        for key in self.views:
            logits = self.pred if key == PLAIN else self.model(view(self.xb[0], *key))  # (B, C)
            self.views[key] = logits.float()

    def after_loss(self):
        for tta, (probs, losses) in self.results.items():
            logits = sum(weight * self.views[key] for key, weight in TTA[tta].items())  # (B, C)
            probs.append(activation(self.learn)(logits))
            losses.append(self.learn.loss_func(logits, *self.yb))  # (B,), as get_preds sets no reduction


def predict(learn, dl=None, tta=None):
    """The learner's `Predictions` for the labelled images of `dl`, by default `learn.dls.valid`.

    `tta`: None; "flip", the mean of the logits of the image and its mirror image, which must mean the same (unlike
    those of digits); "shift", of these and the same two of the image moved by one pixel up-left and down-right over a
    reflected border, the original pair weighing 1/2 and each moved pair 1/4 (K. Jordan, arXiv:2404.00498). A tuple
    gives a tuple of Predictions from one pass: (None, "flip", "shift") share their views and run the model 6 times.

    The learner's callbacks, device, precision, compilation and loss function (label smoothing included) apply. For
    the train images without augmentation use `learn.dls.test_dl(items, with_labels=True)`. Raises InputError for an
    unknown `tta` and for a `dl` without images or labels. Several processes share the images, and all get the result.
    """
    ttas = tuple(tta) if isinstance(tta, (tuple, list)) else (tta,)
    for name in ttas:
        check_choice(tuple(TTA), tta=name)
    dl = learn.dls.valid if dl is None else dl
    if not len(dl.dataset):
        raise InputError("there are no images to predict: an exported learner holds none; pass a DataLoader as `dl`")
    if len(getattr(dl.dataset, "tls", "xy")) < 2:
        raise InputError("the images of `dl` have no labels: use dls.test_dl(items, with_labels=True)")
    views, dl, n = _Views(ttas), dl.new(shuffle=False, drop_last=False), n_processes()
    if n > 1:
        rows = list(dl.get_idxs())[rank() :: n]
        dl = dl.new(get_idxs=lambda: rows)
    _, targets, _ = learn.get_preds(dl=dl, with_preds=False, with_loss=True, reorder=False, cbs=views)

    def whole(tensor):
        parts = gathered(tensor.cpu().as_subclass(torch.Tensor).numpy())
        array = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        for k, part in enumerate(parts):
            array[k::n] = part
        return array

    targets, classes = whole(targets.long().reshape(-1)), tuple(map(str, learn.dls.vocab))
    results = []
    for arrays in map(views.results.get, ttas):
        probs, losses = (whole(torch.cat(batches)) for batches in arrays)
        results.append(Predictions(probs, targets, losses, np.arange(len(targets)), classes))
    return tuple(results) if isinstance(tta, (tuple, list)) else results[0]


def activation(learn):
    """The function that turns the model's outputs into probabilities: the loss's own, as fastai's have, or softmax."""
    return getattr(learn.loss_func, "activation", None) or (lambda logits: logits.softmax(-1))


def images_at(dl, positions):
    """The images at `positions` of the dataset of `dl`, a fastai image DataLoader, without augmentation.

    (x, images): the model's input, float (K, 3, H, W) on the device of `dl`, and pixels, uint8 (K, H, W, 3).
    """
    positions = [int(position) for position in positions]
    some = positions or [0]  # for the size of no images
    part = dl.new(shuffle=False, drop_last=False, num_workers=0, get_idxs=lambda: some)
    with dl.dataset.set_split_idx(1):
        x = torch.cat([batch[0].as_subclass(torch.Tensor) for batch in part])[: len(positions)]  # (K, 3, H, W)
    pixels = x
    for transform in reversed(part.after_batch.fs):
        if isinstance(transform, Normalize):
            pixels = pixels * transform.std.to(x.device) + transform.mean.to(x.device)
    images = (255 * pixels).round().clip(0, 255).byte().permute(0, 2, 3, 1)  # (K, H, W, 3)
    return x, images.cpu().numpy()
