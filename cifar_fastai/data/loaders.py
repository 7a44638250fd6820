"""From an ImageSet to fastai DataLoaders: a DataBlock whose loader takes whole batches out of the decoded array."""

import copy
from contextlib import suppress
from inspect import signature
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage
from fastcore.meta import delegates
from fasttransform import Transform

from cifar_fastai.data.augment import AlternatingFlip, CutOut, RandomCrop, RandomFlip, RandomRotate, RandomVerticalFlip
from cifar_fastai.data.images import ImageSet, load_images, stratified_cut
from cifar_fastai.data.photos import FitImage
from cifar_fastai.errors import InputError, renamed
from cifar_fastai.hardware import choose_device
from cifar_fastai.recipes import RECIPES
from cifar_fastai.settings import check_values

_RECIPE = RECIPES["resnet18"]
MIN_STEPS = 20  # per epoch: a small set gets smaller batches
BATCHES_AT_ONCE = 64  # whose rows are copied to the device together
_ELSEWHERE = dict(  # arguments of fastai's DataLoaders, and where they belong
    batch_tfms="`cifar_block(images, batch_tfms=[...])` takes them",
    item_tfms="images are augmented in batches: see `batch_tfms` of `cifar_block`; `size` resizes them",
    num_workers="the images are in memory, and batches are made without workers",
)


class Store:
    """The decoded images and labels, copied once to each device that uses them.

    A deep copy is the store itself. A pickle carries the images, as tensors, which worker processes get in shared
    memory.
    """

    def __init__(self, images, labels):
        self.images, self.labels, self._on_device = images, labels, {}

    def tensors(self, device):
        """images uint8 (N, 3, H, W) and labels int64 (N,) on `device`."""
        if device not in self._on_device:
            arrays = np.ascontiguousarray(self.images), self.labels
            self._on_device[device] = [torch.from_numpy(array).to(device) for array in arrays]
        return self._on_device[device]

    def __deepcopy__(self, memo):
        return self

    def __getstate__(self):
        return {"tensors": [] if self.images is None else self.tensors(torch.device("cpu"))}

    def __setstate__(self, state):
        self.__init__(*([tensor.numpy() for tensor in state["tensors"]] or [None, None]))
        self._on_device[torch.device("cpu")] = state["tensors"]


class FromStore(Transform):
    """Row of the store -> its image, uint8 (H, W, 3), or with `classes` its class; files and images pass unchanged.

    The class of a file is the name of its folder, as in the folders that `load_images` reads.
    """

    input_types = int, Path

    def __init__(self, store, classes=None):
        super().__init__()
        self.store, self.classes = store, classes

    def encodes(self, row: int):
        if self.store.images is None:
            raise InputError("an exported learner holds no images; give it files or PIL images", row=row)
        if self.classes:
            return self.classes[self.store.labels[row]]
        return np.ascontiguousarray(self.store.images[row].transpose(1, 2, 0))

    def encodes(self, file: Path):  # noqa: F811  (a second type)
        return file.parent.name if self.classes else file


class ArrayDL(TfmdDL):
    """A `TfmdDL` that takes whole batches out of the array by index, where its items are rows of a store.

    With the array on the model's device nothing is decoded, collated or copied per item, and worker processes have
    nothing to do. Anything else (files, PIL images, the user's item transforms) goes the usual way, item by item.
    """

    whole_batches, part = True, slice(None)  # `part` of each batch: a process's share

    def __init__(self, dataset, bs=64, shuffle=False, num_workers=0, **kwargs):
        super().__init__(dataset, bs=bs, shuffle=shuffle, num_workers=num_workers, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is not None and not len(dataset):  # for `new_empty`, and so for an export: without pixels
            stores = [tfm.store for tl in getattr(dataset, "tls", ()) for tfm in tl.tfms.fs if hasattr(tfm, "store")]
            dataset = copy.deepcopy(dataset, {id(store): Store(None, None) for store in stores})
        return super().new(dataset, cls, **kwargs)

    def create_batches(self, samps):
        if (rows := self._rows()) is None:
            yield from super().create_batches(samps)
            return
        device = torch.device("cpu") if self.device is None else self.device
        images, labels = self.dataset.tls[0].tfms.fs[0].store.tensors(device)
        samps = iter(samps)  # endless in show_batch(unique=True): read in parts, one copy to the device for each
        while len(positions := np.fromiter(islice(samps, BATCHES_AT_ONCE * self.bs), np.int64)):
            for batch in torch.from_numpy(rows[positions]).to(device).split(self.bs):  # (B,)
                if len(batch) < self.bs and self.drop_last:
                    return
                if len(batch := batch[self.part]):
                    x = TensorImage(images[batch])  # (B, 3, H, W) uint8
                    yield (x, TensorCategory(labels[batch])) if len(self.dataset.tls) == 2 else (x,)

    def after_iter(self):
        for tfm in self.after_batch.fs if self.dataset.split_idx == 0 else ():
            if isinstance(tfm, AlternatingFlip):
                tfm.epoch += 1  # `TellEpoch` sets it, but a plain Learner has none

    def _rows(self):
        """The dataset's rows of the store, int64 (N,), or None where its items must be taken one by one."""
        dataset = self.dataset
        if not (self.whole_batches and self.bs and not self.fake_l.num_workers and isinstance(dataset, Datasets)):
            return None
        items, getters = list(dataset.items), [tfm for tl in dataset.tls for tfm in tl.tfms.fs[:1]]
        are_rows = (
            [type(tfm) for tfm in getters] == [FromStore, FromStore][: len(dataset.tls)]
            and getters[0].store.images is not None
            and all(type(item) is int for item in items)
            and all(type(tfm) is ToTensor for tfm in self.after_item.fs)
            and not list(self.before_batch.fs)
        )
        return np.array(items, np.int64) if are_rows else None


def split_rows(images, valid_pct=None, split_seed=42, subset=None):
    """Rows of `images` to train on and to evaluate: (train, valid), lists of int.

    `valid_pct` cuts a stratified fraction off train (else the test split is evaluated); `subset` then keeps a
    stratified part of that size of the rest, and of a split cut by `valid_pct` as large a share. The same seed cuts the
    same rows. InputError where a split would be empty or could not hold every class.
    """
    check_values(valid_pct=valid_pct, split_seed=split_seed, subset=subset)
    rows, valid = np.arange(images.n_train), np.arange(images.n_train, len(images.labels))
    if valid_pct is not None:
        n = len(rows) - round(valid_pct * len(rows))
        rows, valid = _cut(images, rows, n, split_seed, valid_pct=valid_pct)
    if subset is not None:
        n_valid = max(len(images.classes), round(len(valid) * subset / len(rows)))
        rows, _ = _cut(images, rows, subset, split_seed, subset=subset)
        if valid_pct is not None and n_valid < len(valid):  # a quick trial is quick; the test split is always whole
            with suppress(InputError):  # a class of too few images: all are kept
                valid, _ = _cut(images, valid, n_valid, split_seed, subset=subset)
    return rows.tolist(), valid.tolist()


def _cut(images, rows, n, seed, **argument):
    """`rows` in two parts, each class in proportion: `n` of them and the rest, both in order."""
    labels, n_classes, n_rest, parts = images.labels, len(images.classes), len(rows) - n, [rows[:0]]
    with suppress(ValueError):  # scikit-learn's, where a part or a class is too small
        if 0 <= n_rest < n_classes:  # too few are left out for a stratified cut
            parts = [np.sort(part) for part in np.split(np.random.default_rng(seed).permutation(rows), [n])]
        else:
            parts = stratified_cut(labels, rows, n, seed)
    needed = parts if "valid_pct" in argument else parts[:1]
    if any(len(np.unique(labels[part])) < n_classes for part in needed):
        problem = f"cutting them into {n} and {n_rest} would lose one of {n_classes} classes"
        raise InputError(f"there are {len(rows)} images to train on, and {problem}", **argument)
    return parts


def default_bs(bs, n_train):
    """`bs`, lowered so that `n_train` images still give 20 steps an epoch."""
    return max(1, min(bs, n_train // MIN_STEPS))


def augmentations(
    padding=_RECIPE.padding,
    pad_mode=_RECIPE.pad_mode,
    flip=0.5,
    flip_by=_RECIPE.flip_by,
    vflip=_RECIPE.vflip,
    rotate=_RECIPE.rotate,
    cutout=_RECIPE.cutout,
    n_holes=_RECIPE.n_holes,
    max_holes=_RECIPE.max_holes,
    cutout_p=_RECIPE.cutout_p,
    size=32,
):
    """The train-time batch transforms for these settings, in order; transforms with a value of 0 are left out.

    The defaults are those of ResNet18's recipe. `size`: pixels a side of the images. With `flip_by` "epoch" each image
    is mirrored in every other epoch, for any probability `flip` above 0. Raises InputError for values out of range.
    """
    check_values(**locals())
    if cutout > size:
        raise InputError(f"the images have {size} pixels a side", cutout=cutout)
    if pad_mode == "reflect" and padding >= size:
        raise InputError(f"more than a mirror image of {size} pixels a side", padding=padding)
    tfms = [
        padding and RandomCrop(size, padding, pad_mode),
        flip and (AlternatingFlip() if flip_by == "epoch" else RandomFlip(flip)),
        vflip and RandomVerticalFlip(vflip),
        rotate and RandomRotate(rotate),
        cutout and cutout_p and CutOut(cutout, n_holes, cutout_p, max_holes),
    ]
    return [tfm for tfm in tfms if tfm]


def cifar_block(images, batch_tfms=(), splits=None):
    """A fastai `DataBlock` over the rows of `images`, an ImageSet; `splits` is (train rows, rows to evaluate).

    Its batches are (x, y): x (B, 3, S, S) float, normalised with the data set's mean and std; y (B,) class ids.
    """
    store, splits = Store(images.images, images.labels), splits or split_rows(images)
    image_block = TransformBlock(type_tfms=FitImage(images.size), batch_tfms=IntToFloatTensor)
    return DataBlock(
        blocks=(image_block, CategoryBlock(vocab=list(images.classes), sort=False)),
        get_x=FromStore(store),
        get_y=FromStore(store, images.classes),
        splitter=lambda items: splits,
        batch_tfms=[*batch_tfms, Normalize.from_stats(images.mean, images.std, cuda=False)],
        dl_type=ArrayDL,
    )


@delegates(augmentations)
def cifar_dls(
    images="auto",
    bs=None,
    valid_pct=None,
    split_seed=42,
    subset=None,
    flip=None,
    device=None,
    val_bs=512,
    size=None,
    **kwargs,
):
    """DataLoaders over `images`: an ImageSet, or a name or path for `load_images`, which also takes `size`.

    `dls.train` is shuffled and augmented (by `augmentations`; `flip` is the data set's own by default); `dls.valid` is
    the test split, or with `valid_pct` a part of train. `bs` is by default that of ResNet18's recipe, lowered so that a
    small set gives 20 steps. `dls.images` is the ImageSet, `dls.settings` the values the loaders were made with.
    InputError for values out of range or too large for the data.
    """
    for name in _ELSEWHERE.keys() & kwargs.keys():
        raise InputError(_ELSEWHERE[name], **{name: kwargs[name]})
    values = dict(valid_pct=valid_pct, split_seed=split_seed, subset=subset, flip=flip)
    values |= check_values(**values, **({} if bs is None else {"bs": bs}))
    with renamed(bs="val_bs"):
        check_values(bs=val_bs)
    kwargs = kwargs if flip is None else {"flip_by": "chance"} | kwargs  # a probability is not for alternating flips
    augmentations(size=128, **kwargs)  # raises for wrong values before any image is loaded
    images = images if isinstance(images, ImageSet) else load_images(images, size=size)
    if size not in (None, images.size):
        raise InputError(f"the images have {images.size} pixels a side; `load_images` resizes them", size=size)
    splits, flip = split_rows(images, valid_pct, split_seed, subset), images.flip if flip is None else flip
    bs = default_bs(_RECIPE.bs, len(splits[0])) if bs is None else bs
    if bs > len(splits[0]):
        raise InputError(f"there are {len(splits[0])} images to train on", bs=bs)
    block = cifar_block(images, augmentations(flip=flip, size=images.size, **kwargs), splits)
    device = choose_device("auto" if device is None else device)
    dls = block.dataloaders(list(range(len(images.labels))), bs=bs, val_bs=val_bs, device=device)
    defaults = {name: parameter.default for name, parameter in signature(augmentations).parameters.items()}
    size = None if images.size == 32 else images.size
    dls.images, dls.settings = images, defaults | kwargs | values | dict(flip=flip, bs=bs, size=size)
    return dls


def test_dl(dls):
    """A DataLoader over the test split, labels included, whatever `dls.valid` is."""
    return dls.test_dl(list(range(dls.images.n_train, len(dls.images.labels))), with_labels=True)


test_dl.__test__ = False  # pytest takes the name for a test


def reported_dl(dls, valid_pct=None, no_test=False):
    """(split, DataLoader) that a run reports at its end: "test", or "valid" where it may not read the test split."""
    return ("valid" if no_test else "test"), dls.valid if no_test or valid_pct is None else test_dl(dls)


def augmentation_columns(dls, n=6):
    """The same `n` train images after each train-time transform alone and after all: {title: uint8 (n, H, W, 3)}."""
    dl = dls.train
    rows = list(dl.dataset.items)[:: max(1, len(dl.dataset) // n)][:n]
    original = dl.dataset.tls[0].tfms.fs[0].store.images[rows]  # (n, 3, H, W)
    tfms = list(dl.after_batch.fs)
    random = [tfm for tfm in tfms if getattr(tfm, "split_idx", None) == 0 or hasattr(tfm, "before_call")]

    def apply(drawn):
        x = TensorImage(torch.from_numpy(original).to(dl.device))
        used = [tfm for tfm in tfms if tfm in drawn or tfm not in random]
        for tfm in used:
            x = tfm(x, split_idx=0)
        for tfm in reversed(used):
            x = x if tfm in random else tfm.decode(x)
        return x.as_subclass(torch.Tensor).cpu().numpy().clip(0, 255).astype(np.uint8)

    columns = {"original": original} | {type(tfm).__name__: apply([tfm]) for tfm in random} | {"all": apply(random)}
    return {title: images.transpose(0, 2, 3, 1) for title, images in columns.items()}
