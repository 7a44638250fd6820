"""Augmentation against plain loops over images; random numbers are read off the result, or drawn again from a seed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage

from cifar_fastai.data.augment import AlternatingFlip, CutOut, RandomCrop, RandomFlip, RandomRotate, RandomVerticalFlip
from cifar_fastai.data.loaders import augmentations, cifar_dls
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.range_test import range_test

CROPS = [RandomCrop(), RandomCrop(padding=5, pad_mode="reflect")]
ALL = [*CROPS, RandomFlip(), RandomVerticalFlip(), RandomRotate(15), CutOut(8), CutOut(8, 1, 0.8, 3)]


def images(n, channels=3, size=32):
    return TensorImage(torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) + 0.1)


def train(tfm, x, seed=0):
    torch.manual_seed(seed)
    return tfm(x, split_idx=0)


def plain(x):
    return x.as_subclass(torch.Tensor)


def name(tfm):
    return type(tfm).__name__


@pytest.mark.parametrize("tfm", ALL, ids=name)
def test_what_holds_for_all(tfm):
    """Evaluation is left as it is, a seed repeats, images of one batch are drawn one by one, none is written to."""
    x = images(1).expand(32, -1, -1, -1).contiguous()
    before = x.clone()
    first = train(tfm, x)
    assert type(first) is TensorImage and first.shape == x.shape and torch.equal(x, before)
    assert torch.equal(tfm(x, split_idx=1), x)
    assert torch.equal(train(tfm, x), first) and not torch.equal(train(tfm, x, seed=1), first)
    kinds = {image.numpy().tobytes() for image in first}
    assert len(kinds) == 2 if isinstance(tfm, RandomFlip) else len(kinds) > 15


@pytest.mark.parametrize("pad_mode, torch_mode", [("zeros", "constant"), ("reflect", "reflect")])
def test_every_crop_is_a_window_of_the_padded_image(pad_mode, torch_mode):
    x = images(20)
    out = train(RandomCrop(padding=4, pad_mode=pad_mode), x)
    places = []
    for image, crop in zip(plain(x), plain(out), strict=True):
        padded = F.pad(image[None], (4, 4, 4, 4), mode=torch_mode)[0]  # (3, 40, 40)
        windows = {(top, left): padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
        [place] = [place for place, window in windows.items() if torch.equal(window, crop)]
        places.append(place)
    assert len(set(places)) > 10


def test_all_places_are_equally_likely():
    where = torch.arange(8.0).repeat(8, 1)  # the pixel says in which column it lies
    where = torch.stack([where, where.T]) + 10  # (2, 8, 8), nothing of it is zero
    out = train(RandomCrop(size=8, padding=2), TensorImage(where.expand(5000, 2, 8, 8)))
    left, top = (14 - plain(out)[:, channel, 4, 4] for channel in (0, 1))  # from -2 to 2; the centre is never padding
    for shift in (left, top):
        counts = torch.bincount((shift + 2).long(), minlength=5)
        assert len(counts) == 5 and (counts - 1000).abs().max() < 150  # 5 sd
    assert abs(torch.corrcoef(torch.stack([left, top]))[0, 1]) < 0.08  # independent draws


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind, axis", [(RandomFlip, 3), (RandomVerticalFlip, 2)])
def test_flip_mirrors_whole_images_with_its_probability(kind, axis, p):
    x = TensorImage(torch.rand(4000, 1, 2, 2))
    out, mirrored = train(kind(p), x), x.flip(axis)
    is_flipped = (out == mirrored).all(3).all(2)[:, 0]  # (4000,)
    assert torch.equal(out[~is_flipped], x[~is_flipped])
    assert is_flipped.float().mean().item() == pytest.approx(p, abs=0.035 if 0 < p < 1 else 0)


def test_each_image_is_mirrored_in_every_other_epoch_and_half_of_them_in_each():
    tfm, x = AlternatingFlip(), TensorImage(torch.randint(256, (4000, 3, 8, 8), dtype=torch.uint8))
    seen = []
    for epoch in range(3):
        tfm.epoch = epoch
        out = train(tfm, x)
        mirrored = (out != x).any((1, 2, 3))  # (4000,)
        assert torch.equal(out[mirrored], x[mirrored].flip(3)) and torch.equal(out[~mirrored], x[~mirrored])
        seen.append(mirrored)
    assert torch.equal(seen[0], ~seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].float().mean().item() == pytest.approx(0.5, abs=0.035)


@pytest.fixture
def shown(tiny_images):
    """What training gets, by epoch: of each image the sums of its 32 columns, sorted. It takes the fits to do."""

    class Watch(Callback):
        def before_train(self):
            seen.append([])

        def before_batch(self):
            if self.training:
                seen[-1].extend(plain(self.x).sum((1, 2)).tolist())

    def fitted(*fits, whole_batches=True, bs=12):
        seen.clear()
        dls = cifar_dls(tiny_images, bs=bs, device="cpu", padding=0, cutout=0, flip_by="epoch")
        dls.train.whole_batches = whole_batches
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
        learn = cifar_learner(dls, network, cbs=Watch())
        with learn.no_logging(), learn.no_bar():
            for fit in fits:
                fit(learn)
        assert [tfm.epoch for tfm in dls.train.after_batch.fs if isinstance(tfm, AlternatingFlip)] == [0]
        return [torch.tensor(sorted(columns)) for columns in seen]

    seen = []
    return fitted


def test_training_mirrors_by_epoch(shown, tiny_images):
    epochs = shown(lambda learn: learn.fit(4))
    assert len(epochs[0]) == tiny_images.n_train and not torch.equal(epochs[0], epochs[1])
    torch.testing.assert_close(epochs[2], epochs[0])
    torch.testing.assert_close(epochs[3], epochs[1])
    torch.testing.assert_close(epochs[1], torch.tensor(sorted(epochs[0].flip(1).tolist())))


def test_fits_that_follow_and_fits_that_begin_later_go_on_mirroring_by_epoch(shown):
    """Also after a range test, and where items go one by one."""
    epochs = shown(lambda learn: learn.fit(2))
    later = shown(lambda learn: learn.fit(4, start_epoch=3), whole_batches=False, bs=4)
    torch.testing.assert_close(later, epochs[1:])
    fits = [lambda learn: learn.fit(1), lambda learn: range_test(learn, num_it=20), lambda learn: learn.fit(2)]
    apart = shown(*fits)
    torch.testing.assert_close([apart[0], *apart[-2:]], [epochs[0], epochs[1], epochs[0]])


@pytest.mark.parametrize("whole_batches", [True, False])
def test_a_plain_learner_mirrors_by_epoch(tiny_images, whole_batches):
    dls, seen = cifar_dls(tiny_images, bs=8, device="cpu", padding=0, cutout=0, flip_by="epoch"), []
    dls.train.whole_batches = whole_batches
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))

    class Watch(Callback):
        def before_train(self):
            seen.append([])
            self.dls.train.one_batch()  # a part of a pass is no epoch

        def before_batch(self):
            if self.training:
                seen[-1].extend(plain(self.x).sum((1, 2)).tolist())

    learn = Learner(dls, network, CrossEntropyLossFlat(), cbs=Watch())
    with learn.no_logging(), learn.no_bar():
        learn.fit(2)
        learn.fit(1)
    first, second, third = (torch.tensor(sorted(columns)) for columns in seen)
    torch.testing.assert_close(third, first)
    torch.testing.assert_close(second, torch.tensor(sorted(first.flip(1).tolist())))


def test_a_distributed_loader_is_looked_into(tiny_images):
    """fastai's `DistributedDL`, which needs accelerate, holds a loader, and its `after_batch` is a method."""
    learn = cifar_learner(cifar_dls(tiny_images, bs=12, device="cpu", flip_by="epoch"), "resnet18")
    (tfm,) = (tfm for tfm in learn.dls.train.after_batch.fs if isinstance(tfm, AlternatingFlip))
    learn.dls.loaders[0], learn.epoch = SimpleNamespace(dl=learn.dls.train, after_batch=lambda b: b), 5
    learn.tell_epoch.before_train()
    assert tfm.epoch == 5


def test_every_image_is_rotated_by_an_angle_of_its_own():
    ramp = torch.arange(32.0).repeat(32, 1)  # brighter to the right: its gradient points along the rows
    out = train(RandomRotate(15), TensorImage(ramp.expand(200, 1, 32, 32))).as_subclass(torch.Tensor)
    down, right = out[:, 0, 17, 16] - out[:, 0, 15, 16], out[:, 0, 16, 17] - out[:, 0, 16, 15]
    angles = torch.atan2(down, right) * 180 / math.pi  # (200,)
    assert angles.abs().max() < 15.1 and angles.max() > 12 and angles.min() < -12
    assert abs(angles.mean()) < 2.5 and angles.std() == pytest.approx(30 / math.sqrt(12), rel=0.15)  # uniform
    assert len(angles.unique()) > 190


def cut_by_hand(x, size, n_holes, p, max_holes, seed):
    """The transform as a loop over images and holes, from the numbers that the same seed draws."""
    torch.manual_seed(seed)
    n, _, height, width = x.shape
    rows = torch.randint(height, (n, max_holes, 1))
    cols = torch.randint(width, (n, max_holes, 1))
    used = torch.rand(n, 1)
    counts = torch.randint(n_holes, max_holes + 1, (n, 1)) if max_holes > n_holes else torch.full((n, 1), n_holes)
    out = x.clone()
    for i in range(n):
        for hole in range(counts[i].item() if used[i].item() < p else 0):
            centre, half = (rows[i, hole].item(), cols[i, hole].item()), size // 2
            (y1, x1), (y2, x2) = (np.clip(np.add(centre, shift), 0, (height, width)) for shift in (-half, half))
            out[i, :, y1:y2, x1:x2] = 0  # as in DeVries' code
    return out


HOLES = [(16, 1, 1.0, 1), (8, 1, 0.8, 3), (5, 4, 1.0, 4), (32, 1, 0.5, 1)]


@pytest.mark.parametrize("size, n_holes, p, max_holes", HOLES)
def test_holes_are_where_the_loop_cuts_them(size, n_holes, p, max_holes):
    x = images(100)
    out = train(CutOut(size, n_holes, p, max_holes), x, seed=3)
    assert torch.equal(out, cut_by_hand(x, size, n_holes, p, max_holes, seed=3))


def augmented(tiny_images, **settings):
    """What training sees of the first 16 images under these settings alone, and what evaluation sees of them."""
    settings = dict(padding=0, flip=0.0, cutout=0) | settings
    dls = cifar_dls(tiny_images, bs=16, device="cpu", **settings)
    raw = TensorImage(torch.from_numpy(tiny_images.images[:16])), TensorCategory(torch.zeros(16, dtype=torch.long))
    torch.manual_seed(0)
    for dl in (dls.train, dls.valid):
        dl.before_iter()  # it tells the transforms which split they see
    return plain(dls.train.after_batch(raw)[0]), plain(dls.valid.after_batch(raw)[0])


def test_evaluation_sees_normalised_images(tiny_images):
    _, seen = augmented(tiny_images, padding=4, flip=0.5, vflip=0.5, rotate=15, cutout=8)
    mean, std = (torch.tensor(value).float()[:, None, None] for value in (tiny_images.mean, tiny_images.std))
    torch.testing.assert_close(seen, (torch.from_numpy(tiny_images.images[:16]) / 255 - mean) / std)


def test_crop_pads_with_black_before_normalising(tiny_images):
    seen, evaluated = augmented(tiny_images, padding=31, pad_mode="zeros")
    black = (-torch.tensor(tiny_images.mean) / torch.tensor(tiny_images.std)).float()[:, None, None]
    is_black = torch.isclose(seen, black, atol=1e-5).all(1)  # (16, 32, 32)
    assert not torch.isclose(evaluated, black, atol=1e-5).all(1).any()
    for border in is_black:
        rows, cols = ~border.all(1), ~border.all(0)  # where the image still is
        assert rows.sum() < 32 or cols.sum() < 32  # one unshifted in 3969
        assert torch.equal(border, ~(rows[:, None] & cols))  # a complete rectangle of it, and black all around


def test_holes_are_the_mean_after_normalising(tiny_images):
    seen, evaluated = augmented(tiny_images, cutout=8)
    cut = (seen == 0).all(1)  # (16, 32, 32)
    assert 16 <= cut.sum((1, 2)).min() and cut.sum((1, 2)).max() <= 64
    keep = ~cut[:, None].expand_as(seen)
    assert torch.equal(seen[keep], evaluated[keep])


def test_what_is_zero_is_left_out():
    assert augmentations(padding=0, flip=0, cutout=0) == []
    assert augmentations(padding=0, flip=0, cutout=8, cutout_p=0) == []
    assert augmentations(padding=0, flip=0, flip_by="epoch", cutout=0) == []
    assert [name(tfm) for tfm in augmentations(padding=0, flip_by="epoch", cutout=0)] == ["AlternatingFlip"]
    kinds = [name(tfm) for tfm in augmentations(padding=2, flip_by="chance", vflip=0.1, rotate=5, cutout=8)]
    assert kinds == ["RandomCrop", "RandomFlip", "RandomVerticalFlip", "RandomRotate", "CutOut"]
