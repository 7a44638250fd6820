"""One pass over a split, and everything that is asked about it later: `Predictions`. Also single image files."""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.vision.core import PILImage
from PIL import ExifTags, Image, ImageOps

from cifar_fastai.data.decode import rgb
from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write

__all__ = ["ImagePrediction", "Predictions", "image_batch", "load_image", "predict", "predict_files"]

SIZE = 32  # pixels, of what the networks were trained on
COLUMNS = ("index", "target", "predicted", "confidence", "loss")


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network said about the N images of a split, in the split's order, and what follows from it.

    A position is a row of these arrays. Classes without an image, or never predicted, have None where a fraction
    would divide by zero. After `from_csv` there are no `probs`, all else is there.
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
        """One line: what a notebook shows."""
        return (
            f"{len(self):,} images of {len(self.classes)} classes: accuracy {self.accuracy:.2%}, "
            f"loss {self.loss:.4f}, {len(self.errors):,} misclassified"
        )

    @property
    def accuracy(self):
        """The fraction of images that are classified right."""
        return float((self.predicted == self.targets).mean())

    @property
    def loss(self):
        """The mean loss over images."""
        return float(self.losses.mean(dtype=np.float64))

    @cached_property
    def confusion_matrix(self):
        """Numbers of images, int64 (C, C): true class by row, predicted class by column."""
        n = len(self.classes)
        return np.bincount(self.targets * n + self.predicted, minlength=n * n).reshape(n, n)

    @property
    def class_accuracy(self):
        """{class: fraction of its images that are classified right}, its recall."""
        return {row["class"]: row["accuracy"] for row in self.class_table}

    @cached_property
    def class_table(self):
        """One dict for each class: class, images, correct, accuracy (the class's recall), precision, f1."""
        matrix, rows = self.confusion_matrix, []
        for name, images, predicted, correct in zip(
            self.classes, matrix.sum(1).tolist(), matrix.sum(0).tolist(), matrix.diagonal().tolist(), strict=True
        ):
            rows.append(
                {
                    "class": name,
                    "images": images,
                    "correct": correct,
                    "accuracy": correct / images if images else None,
                    "precision": correct / predicted if predicted else None,
                    "f1": 2 * correct / (images + predicted) if images + predicted else None,
                }
            )
        return rows

    @cached_property
    def errors(self):
        """Positions of the misclassified images, the worst loss first."""
        ranked = self.top_losses()
        return ranked[(self.predicted != self.targets)[ranked]]

    def misclassified(self, n=None, true=None, predicted=None):
        """Positions of the `n` (all) misclassified images with the worst losses, worst first.

        `true`, `predicted`: only those of this class, taken for that one, by name. InputError for an unknown name.
        """
        chosen = self.errors
        for name, ids in ((true, self.targets), (predicted, self.predicted)):
            if name is not None:
                chosen = chosen[ids[chosen] == self._class_id(name)]
        return chosen[:n]

    def _class_id(self, name):
        if name not in self.classes:
            raise InputError(f"class {name}: no such class; choose from {', '.join(self.classes)}")
        return self.classes.index(name)

    def top_losses(self, k=None):
        """Positions of the `k` (all) images with the worst losses, worst first; a loss that is no number is worst."""
        return np.argsort(-np.nan_to_num(self.losses, nan=np.inf), kind="stable")[:k]

    def most_confused(self, min_val=1):
        """[(true class, predicted class, images)] where at least `min_val` images are, the most first."""
        matrix = self.confusion_matrix * ~np.eye(len(self.classes), dtype=bool)
        pairs = np.argwhere(matrix >= max(min_val, 1)).tolist()
        return sorted(((self.classes[i], self.classes[j], int(matrix[i, j])) for i, j in pairs), key=lambda p: -p[2])

    def to_csv(self, path):
        """Write one row per image: index, target and predicted (class names), confidence, loss. Atomic."""
        with atomic_write(path) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for index, target, predicted, confidence, loss in zip(
                self.indices, self.targets, self.predicted, self.confidence, self.losses, strict=True
            ):
                # a float32's str is the shortest text that reads back as the same float32
                writer.writerow([index, self.classes[target], self.classes[predicted], str(confidence), str(loss)])

    @classmethod
    def from_csv(cls, path, classes=None):
        """Read what `to_csv` wrote. `classes` are the names in order, by default those in the file, sorted.

        Raises InputError for a file that is missing or no such table, naming the line.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            reason = getattr(e, "strerror", None) or "it is no CSV text"
            raise InputError(f"{path}: cannot be read as predictions: {reason}") from None
        if len(rows) < 2 or tuple(rows[0]) != COLUMNS:
            raise InputError(f"{path}: is no table of predictions: its columns must be {', '.join(COLUMNS)}")
        names = tuple(classes or sorted({name for row in rows[1:] for name in row[1:3]}))
        ids, table = {name: k for k, name in enumerate(names)}, []
        for line, row in enumerate(rows[1:], start=2):
            try:
                index, target, predicted, confidence, loss = row
                table.append((int(index), ids[target], ids[predicted], float(confidence), float(loss)))
            except (ValueError, KeyError) as e:
                reason = f"{e} is no class" if isinstance(e, KeyError) else f"has {', '.join(row)!r}"
                raise InputError(f"{path}: line {line}: {reason}; expected {', '.join(COLUMNS)}") from None
        columns = list(zip(*table, strict=True))
        indices, targets, predicted = (np.array(column, np.int64) for column in columns[:3])
        confidence, losses = (np.array(column, np.float32) for column in columns[3:])
        return cls(None, targets, losses, indices, names, predicted, confidence)


# ------------------------------------------------------------------------------------------ one pass over a split


def _flip(x):
    return x.flip(-1)


def _shift(x, first):
    """x (B, C, H, W) moved by one pixel along both axes: the crop at `first` (0 or 2) of x reflected by one pixel."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")  # (B, C, H + 2, W + 2)
    return padded[..., first : first + height, first : first + width].contiguous()


VIEWS = {
    "flip": _flip,
    "down": lambda x: _shift(x, 0),
    "flip down": lambda x: _flip(_shift(x, 0)),
    "up": lambda x: _shift(x, 2),
    "flip up": lambda x: _flip(_shift(x, 2)),
}

# the weight of each view's logits; "plain" is the image as it is
TTA = {
    None: {"plain": 1},
    "flip": {"plain": 0.5, "flip": 0.5},
    "shift": {"plain": 0.25, "flip": 0.25, "down": 0.125, "flip down": 0.125, "up": 0.125, "flip up": 0.125},
}


class _Views(Callback):
    """Run the views that the TTAs need, each once, where the learner runs its model; keep what each TTA says.

    It acts in after_pred before a precision callback (order 10) leaves its autocast, so that every view is computed
    as the image itself is.
    """

    order = 9

    def __init__(self, ttas):
        self.ttas = list(dict.fromkeys(ttas))
        self.names = list(dict.fromkeys(name for tta in self.ttas for name in TTA[tta]))

    def before_validate(self):
        self.probs, self.losses = ({tta: [] for tta in self.ttas} for _ in range(2))
        self.act = _activation(self.learn)

    def after_pred(self):
        x = self.xb[0]  # (B, 3, H, W)
        outputs = {name: self.pred if name == "plain" else self.model(VIEWS[name](x)) for name in self.names}
        self.outputs = {name: logits.float() for name, logits in outputs.items()}  # (B, C) each

    def after_loss(self):
        for tta in self.ttas:
            logits = sum(weight * self.outputs[name] for name, weight in TTA[tta].items())  # (B, C)
            self.probs[tta].append(self.act(logits))
            self.losses[tta].append(self.learn.loss_func(logits, *self.yb))  # (B,), get_preds took the mean out


def predict(learn, dl=None, tta=None):
    """The learner's `Predictions` for the images of `dl` (with labels), by default those of `learn.dls.valid`.

    `tta`, test-time augmentation: None; "flip", the image and its mirror image; "shift", these and the same two of
    the image moved by one pixel up-left and down-right over a reflected border, the original pair weighing 1/2 and
    each moved pair 1/4 (K. Jordan, arXiv:2404.00498). It takes the mean of the logits, and the loss of that mean. A
    mirror image must mean the same: for digits it does not. A tuple of these gives a tuple of Predictions from one
    pass, in which they share their views: (None, "flip", "shift") runs the model 6 times, not 9.

    The learner's callbacks run as in `get_preds`, so its device, precision and compilation apply; losses are those
    of its loss function (label smoothing included), one per image. For the train images without augmentation give
    `learn.dls.test_dl(items, with_labels=True)`. Raises InputError for an unknown `tta` and for a `dl` without images
    or labels.
    """
    ttas = tuple(tta) if isinstance(tta, (tuple, list)) else (tta,)
    for name in ttas:
        if name not in TTA:
            raise InputError(f"tta {name}: no such name; choose from {', '.join(filter(None, TTA))} or None")
    dl = learn.dls.valid if dl is None else dl
    if not len(dl.dataset):
        raise InputError("there is no image to predict: an exported learner holds none; give it a DataLoader")
    if len(getattr(dl.dataset, "tls", "xy")) < 2:
        raise InputError("the images have no labels to compare with: use dls.test_dl(items, with_labels=True)")
    views = _Views(ttas)
    _, targets, _ = learn.get_preds(
        dl=dl.new(shuffle=False, drop_last=False), with_preds=False, with_loss=True, reorder=False, cbs=views
    )
    targets = targets.long().numpy().reshape(-1)
    indices, classes = np.arange(len(targets)), _class_names(learn)
    found = {t: Predictions(_array(views.probs[t]), targets, _array(views.losses[t]), indices, classes) for t in ttas}
    return tuple(found[t] for t in ttas) if isinstance(tta, (tuple, list)) else found[tta]


def _activation(learn):
    """What makes probabilities of the model's outputs; fastai's losses say it, others mean softmax."""
    return getattr(learn.loss_func, "activation", None) or (lambda logits: logits.softmax(-1))


def _array(batches):
    return torch.cat(batches).float().cpu().as_subclass(torch.Tensor).numpy()


def _class_names(learn):
    return tuple(str(name) for name in learn.dls.vocab)


# ---------------------------------------------------------------------------------------------------- image files


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """What a network said about one image file."""

    file: Path
    image: np.ndarray  # (32, 32, 3) uint8, what the network saw
    probs: np.ndarray  # (C,) float32
    classes: tuple[str, ...]  # C names
    note: str | None  # how the file became 32 x 32, if it was not

    @property
    def top3(self):
        """[(class, probability)], the three most probable first (fewer where there are fewer classes)."""
        return [(self.classes[k], float(self.probs[k])) for k in np.argsort(-self.probs, kind="stable")[:3]]


def load_image(file):
    """(image, note) of an image file of any size: uint8 (32, 32, 3), and how it came to that size or None.

    A photograph's orientation is heeded, what is transparent becomes white, and of an oblong picture the central
    square is taken. Raises InputError for what is missing, a folder, or no image.
    """
    file = Path(file)
    if file.is_dir():
        raise InputError(f"{file}: is a folder; give image files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are allowed, and of odd Exif
            with Image.open(file) as opened:
                frames = getattr(opened, "n_frames", 1)
                image = rgb(_upright(opened))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except PermissionError:
        raise InputError(f"{file}: may not be read; check its permissions") from None
    except Image.DecompressionBombError:
        raise InputError(f"{file}: has too many pixels; make it smaller") from None
    except Exception as e:  # Pillow raises many kinds for broken files of various formats
        reason = "is no image" if isinstance(e, Image.UnidentifiedImageError) else "is a broken image"
        raise InputError(f"{file}: {reason}; give a PNG, JPEG or other picture") from None
    (width, height), notes = image.size, [f"the first of {frames} pictures"] if frames > 1 else []
    if (width, height) != (SIZE, SIZE):
        how = "resized" if width == height else "cropped to its central square and resized"
        notes.append(f"{width} x {height}, {how} to {SIZE} x {SIZE}")
        image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image), ", ".join(notes) or None


_TURNED = {  # how to put upright what an Exif orientation describes
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image):
    image.load()  # by which Pillow turns a TIFF itself
    try:  # not ImageOps.exif_transpose, which writes all of the Exif anew and fails where any of it is odd
        turn = _TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def image_batch(learn, images):
    """Images uint8 (N, H, W, 3) as the learner's model gets them: normalised (N, 3, H, W), on its device."""
    return torch.cat([batch[0].as_subclass(torch.Tensor) for batch in _image_dl(learn, images)])


def _image_dl(learn, images):
    items = [PILImage.create(np.ascontiguousarray(image)) for image in images]
    return learn.dls.test_dl(items, num_workers=0)


def predict_files(learn, files: Sequence):
    """An `ImagePrediction` for each of the image files, which may have any size (see `load_image`).

    Works on a learner that was exported and loaded, too. Raises InputError for the first file that is no image, and
    where there is no file.
    """
    files = [Path(file) for file in files]
    if not files:
        raise InputError("no image file was given; give one or more")
    images, notes = zip(*(load_image(file) for file in files), strict=True)
    probs, _ = learn.get_preds(dl=_image_dl(learn, images), act=_activation(learn))  # (N, C)
    classes, probs = _class_names(learn), _array([probs])
    return [ImagePrediction(*row, classes, note) for *row, note in zip(files, images, probs, notes, strict=True)]
