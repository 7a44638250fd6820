"""From an ImageSet to fastai DataLoaders: a DataBlock whose loader takes whole batches out of the decoded array."""

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.data import ImageBlock
from fasttransform import Transform

from cifar_fastai.data.augment import AlternatingFlip, CutOut, RandomCrop, RandomFlip, RandomRotate
from cifar_fastai.data.images import ImageSet, load_images
from cifar_fastai.errors import InputError
from cifar_fastai.hardware import choose_device
from cifar_fastai.names import FLIP_BY, check_name

__all__ = ["ArrayDL", "augmentations", "cifar_block", "cifar_dls", "default_bs", "reported_dl", "split_rows", "test_dl"]

MIN_STEPS = 20  # per epoch: a small set gets smaller batches


class Store:
    """The decoded images and labels, on every device that asked; a pickle carries none of them."""

    def __init__(self, images, labels):
        self.images, self.labels, self._on_device = images, labels, {}

    def tensors(self, device):
        """images uint8 (N, 3, H, W) and labels int64 (N,) on `device`, copied there once."""
        if device not in self._on_device:
            images = torch.from_numpy(np.ascontiguousarray(self.images))
            self._on_device[device] = images.to(device), torch.from_numpy(self.labels).to(device)
        return self._on_device[device]

    def __getstate__(self):
        return {"images": None, "labels": None, "_on_device": {}}


class Pixels(Transform):
    """Row of the store -> its image, uint8 (H, W, 3); a file or an image passes as it is."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def encodes(self, row: int):
        if self.store.images is None:
            raise InputError(f"row {row}: an exported learner holds no images; give it files or PIL images")
        return np.ascontiguousarray(self.store.images[row].transpose(1, 2, 0))


class ClassName(Transform):
    """Row of the store -> the name of its class."""

    def __init__(self, store, classes):
        super().__init__()
        self.store, self.classes = store, classes

    def encodes(self, row: int):
        return self.classes[self.store.labels[row]]


class ArrayDL(TfmdDL):
    """A `TfmdDL` that takes whole batches out of the array by index, where it holds rows of a store.

    With the array on the model's device nothing is decoded, collated or copied per item. Anything else (files, PIL
    images, item transforms of the user's own) goes the usual way, item by item, and gives the same tensors.
    No worker processes unless asked for: there is nothing for them to do.
    """

    whole_batches = True

    def __init__(self, dataset, bs=64, shuffle=False, num_workers=0, **kwargs):
        super().__init__(dataset, bs=bs, shuffle=shuffle, num_workers=num_workers, **kwargs)

    def create_batches(self, samps):
        rows = self._rows()
        if rows is None:
            yield from super().create_batches(samps)
            return
        device = torch.device("cpu") if self.device is None else self.device
        images, labels = self.dataset.tls[0].tfms.fs[0].store.tensors(device)
        order = torch.from_numpy(rows[np.fromiter(samps, np.int64)]).to(device)  # (n,), one copy per epoch
        for batch in order.split(self.bs):
            if len(batch) < self.bs and self.drop_last:
                return
            x = TensorImage(images[batch])  # (B, 3, H, W) uint8
            yield (x, TensorCategory(labels[batch])) if len(self.dataset.tls) == 2 else (x,)

    def _rows(self):
        """The dataset's rows of the store, or None where its items must be taken one by one."""
        dataset, fs = self.dataset, list(self.after_item.fs)
        plain = (
            self.whole_batches
            and self.bs is not None
            and self.fake_l.num_workers == 0
            and isinstance(dataset, Datasets)
            and all(type(f) is ToTensor for f in fs)
            and not list(self.before_batch.fs)
        )
        if not plain:
            return None
        if getattr(self, "_rows_of", None) is not dataset:
            getters = [tl.tfms.fs[0] if len(tl.tfms.fs) else None for tl in dataset.tls]
            items = list(dataset.items)
            rows = [type(getter) for getter in getters] in ([Pixels], [Pixels, ClassName])
            rows = rows and getters[0].store.images is not None and all(type(item) is int for item in items)
            self._rows_of, self._row_array = dataset, np.array(items, np.int64) if rows else None
        return self._row_array


class SplitRows:
    """fastai splitter for given rows: train and what is evaluated."""

    def __init__(self, train, valid):
        self.train, self.valid = train, valid

    def __call__(self, items):
        return self.train, self.valid


def split_rows(images, valid_pct=None, split_seed=42, subset=None):
    """Rows of `images` to train on and to evaluate: (train, valid), lists of int.

    `valid_pct` cuts a stratified fraction off train (else the test split is evaluated); `subset` then keeps a
    stratified part of so many of the rest. The same seed cuts the same rows. InputError where a split would be empty
    or could not hold every class.
    """
    rows, n_classes = np.arange(images.n_train), len(images.classes)
    test = list(range(images.n_train, len(images.labels)))
    if valid_pct is not None:
        n_valid = round(valid_pct * len(rows))
        if n_valid < n_classes or len(rows) - n_valid < n_classes:
            raise InputError(
                f"--valid-pct {valid_pct}: cuts {n_valid} of {len(rows)} train images, "
                f"too few on one side for {n_classes} classes"
            )
        rows, valid = _stratified(images, rows, len(rows) - n_valid, split_seed, f"--valid-pct {valid_pct}")
        _check_classes(images, valid, f"--valid-pct {valid_pct}")
    if subset is not None and subset > len(rows):
        raise InputError(f"--subset {subset}: there are {len(rows)} images to train on")
    if subset is not None and subset < n_classes:
        raise InputError(f"--subset {subset}: give at least one image for each of {n_classes} classes")
    if subset is not None and len(rows) - subset >= n_classes:
        rows, _ = _stratified(images, rows, subset, split_seed, f"--subset {subset}")
    elif subset is not None:  # too few would be left out for a stratified cut
        rows = np.sort(np.random.default_rng(split_seed).permutation(rows)[:subset])
    if valid_pct is not None or subset is not None:
        _check_classes(images, rows, f"--valid-pct {valid_pct}" if subset is None else f"--subset {subset}")
    return rows.tolist(), test if valid_pct is None else valid.tolist()


def _stratified(images, rows, n, seed, flag):
    """`rows` cut in two, each class in proportion: `n` of them and the rest, both in order."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    if counts.min() < 2:
        raise InputError(
            f"{flag}: class {images.classes[counts.argmin()]} has {counts.min()} of the images that are "
            "cut; every class needs 2"
        )
    part, rest = train_test_split(rows, train_size=n, stratify=images.labels[rows], random_state=seed)
    return np.sort(part), np.sort(rest)


def _check_classes(images, rows, flag):
    missing = np.setdiff1d(np.arange(len(images.classes)), images.labels[rows])
    if len(missing):  # a stratified cut leaves out a class that is rare enough
        raise InputError(f"{flag}: leaves no image of class {images.classes[missing[0]]} on one side; give another")


def default_bs(bs, n_train):
    """`bs`, lowered so that `n_train` images still give 20 steps an epoch."""
    return max(1, min(bs, n_train // MIN_STEPS))


def augmentations(
    padding=4,
    pad_mode="zeros",
    flip=0.5,
    flip_by="chance",
    vflip=0.0,
    rotate=0.0,
    cutout=16,
    n_holes=1,
    max_holes=None,
    cutout_p=1.0,
):
    """The train-time batch transforms for these settings, in order; what is 0 is left out.

    With `flip_by` "epoch" each image is mirrored in every other epoch, whatever probability above 0 `flip` is.
    """
    check_name("--flip-by", flip_by, FLIP_BY)
    tfms = []
    if padding:
        tfms.append(RandomCrop(padding=padding, pad_mode=pad_mode))
    if flip:
        tfms.append(AlternatingFlip() if flip_by == "epoch" else RandomFlip(flip))
    if vflip:
        tfms.append(RandomFlip(vflip, vertical=True))
    if rotate:
        tfms.append(RandomRotate(rotate))
    if cutout and cutout_p:
        tfms.append(CutOut(cutout, n_holes, cutout_p, max_holes))
    return tfms


def cifar_block(images, batch_tfms=(), splits=None):
    """A fastai `DataBlock` over the rows of `images`, an ImageSet; `splits` is (train rows, rows to evaluate).

    Its batches are (x, y): x (B, 3, 32, 32) float, normalised with the data set's mean and std; y (B,) class ids.
    """
    store, splits = Store(images.images, images.labels), splits or split_rows(images)
    return DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=list(images.classes), sort=False)),
        get_x=Pixels(store),
        get_y=ClassName(store, images.classes),
        splitter=SplitRows(*splits),
        batch_tfms=[*batch_tfms, Normalize.from_stats(images.mean, images.std, cuda=False)],
        dl_type=ArrayDL,
    )


def cifar_dls(
    images="auto", bs=128, valid_pct=None, split_seed=42, subset=None, flip=None, device=None, val_bs=512, **augment
):
    """DataLoaders over CIFAR-10 or what else `images` names: an ImageSet, or what `load_images` takes.

    `dls.train` is shuffled and augmented (the arguments of `augmentations` set how; `flip` is the data set's own by
    default); `dls.valid` is the test split, or with `valid_pct` a part of train. `dls.images` is the ImageSet,
    `dls.settings` what the loaders were made with. InputError for settings that do not fit the data.
    """
    from cifar_fastai.evaluation import learner_methods as interpret  # noqa: F401  (it gives DataLoaders plot_augmentations)

    images = images if isinstance(images, ImageSet) else load_images(images)
    splits = split_rows(images, valid_pct, split_seed, subset)
    if bs > len(splits[0]):
        raise InputError(f"--bs {bs}: there are {len(splits[0])} images to train on")
    flip = images.flip if flip is None else flip
    tfms = augmentations(flip=flip, **augment)
    items = list(range(len(images.labels)))
    block = cifar_block(images, tfms, splits)
    device = choose_device() if device is None else torch.device(device)
    dls = block.dataloaders(items, bs=bs, val_bs=val_bs, device=device)
    dls.images = images
    dls.settings = dict(bs=bs, valid_pct=valid_pct, split_seed=split_seed, subset=subset, flip=flip, **augment)
    return dls


def test_dl(dls):
    """A DataLoader over the test split, labels included, whatever `dls.valid` is."""
    images = dls.images
    return dls.test_dl(list(range(images.n_train, len(images.labels))), with_labels=True)


test_dl.__test__ = False  # pytest takes the name for a test


def reported_dl(dls, valid_pct=None, no_test=False):
    """(split, DataLoader) of what a run reports at its end: "test", or "valid" where it may not read the test split."""
    if no_test:
        return "valid", dls.valid
    return "test", dls.valid if valid_pct is None else test_dl(dls)
