"""The fast path gives what the usual path gives, and all that fastai does with a DataBlock goes on working."""

import copy
import itertools
import multiprocessing
import pickle
from dataclasses import replace
from inspect import signature
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from PIL import Image

from cifar_fastai.data.loaders import augmentation_columns, cifar_block, cifar_dls, default_bs, split_rows, test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.image_files import predict_files
from cifar_fastai.recipes import RECIPES
from cifar_fastai.training.learner import cifar_learner

CPU = torch.device("cpu")


@pytest.fixture
def dls(tiny_images):
    return cifar_dls(tiny_images, bs=8, val_bs=5, device="cpu", flip_by="chance")


def batches(dl, whole, seed=3):
    dl.whole_batches = whole
    dl.rng.seed(seed)
    torch.manual_seed(seed)
    return list(dl)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_both_paths_give_the_same_batches(dls, split):
    dl = getattr(dls, split)
    assert dl._rows().tolist() == list(dl.dataset.items)  # or the fast path was not taken
    fast, slow = batches(dl, True), batches(dl, False)
    assert len(fast) == len(slow) > 1
    for a, b in zip(sum(fast, ()), sum(slow, ()), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)


def test_training_is_shuffled_complete_and_afresh_each_epoch(tiny_images):
    dls = cifar_dls(tiny_images, bs=6, device="cpu", padding=0, cutout=0, flip=0.0)
    one, two = (torch.cat([x for x, _ in dls.train]).flatten(1).sum(1).numpy() for _ in range(2))
    assert len(one) == 48 and not np.array_equal(one, two)
    mean, std = (np.array(value)[:, None, None] for value in (tiny_images.mean, tiny_images.std))
    sums = ((tiny_images.train_images / 255 - mean) / std).sum((1, 2, 3))
    for epoch in one, two:  # each of the 48 images once
        np.testing.assert_allclose(np.sort(epoch), np.sort(sums), atol=1e-2)


@pytest.fixture
def learn(dls, tiny_model, tmp_path):
    with cifar_learner(dls, tiny_model, path=tmp_path).no_bar() as learn:
        yield learn


def test_files_pil_images_and_rows_predict_alike_also_exported_without_pixels(learn, tiny_images, tmp_path):
    pixels = tiny_images.test_images[0]
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.save(tmp_path / "one.png")
    rows = learn.get_preds(dl=test_dl(learn.dls))[0][0]
    name, index, probs = learn.predict(image)
    torch.testing.assert_close(learn.get_preds(dl=learn.dls.test_dl([tmp_path / "one.png"]))[0][0], rows)
    torch.testing.assert_close(torch.as_tensor(probs), rows)
    assert name == tiny_images.classes[int(index)]
    learn.export("learner.pkl")
    content = (tmp_path / "learner.pkl").read_bytes()
    assert pixels.tobytes() not in content and len(content) < 100_000
    with load_learner(tmp_path / "learner.pkl").no_bar() as loaded:
        torch.testing.assert_close(torch.as_tensor(loaded.predict(image)[2]), rows)


def test_photos_of_any_size_predict_alike_however_they_come(learn, tmp_path):
    """As `predict_files` takes them, for the learner and for its export."""
    rng, exif, files = np.random.default_rng(0), Image.Exif(), [tmp_path / f"{k}.png" for k in range(3)]
    exif[0x0112] = 6  # turned
    Image.fromarray(rng.integers(0, 256, (80, 50, 3), np.uint8)).save(files[0], exif=exif)
    Image.fromarray(rng.integers(0, 256, (33, 33, 4), np.uint8)).save(files[1])  # transparent
    Image.fromarray(rng.integers(0, 256, (40, 90), np.uint8)).save(files[2])
    expected = np.stack([prediction.probs for prediction in predict_files(learn, files)])
    learn.export("learner.pkl")
    with load_learner(tmp_path / "learner.pkl").no_bar() as loaded:
        for each in learn, loaded:
            together = each.get_preds(dl=each.dls.test_dl(files, bs=2))[0]
            opened = [Image.open(file) for file in files]
            apart = [[each.predict(item)[2] for item in items] for items in (files, map(str, files), opened)]
            apart.append([each.predict(file.read_bytes())[2] for file in files])
            for probs in together, *map(torch.stack, apart):
                np.testing.assert_allclose(probs, expected, rtol=1e-5)
        with pytest.raises(InputError, match="none.png: cannot be read"):
            loaded.predict(tmp_path / "none.png")


def test_a_labelled_file_has_the_class_of_its_folder(dls, tiny_folder, tiny_images):
    files = sorted((tiny_folder / "test").glob("*/*"))
    labels = dls.test_dl(files, with_labels=True).one_batch()[1]
    assert [tiny_images.classes[k] for k in labels] == [file.parent.name for file in files][: len(labels)]


def test_copies_share_the_images_pickles_carry_them_and_exports_leave_them_out(learn, tiny_images):
    expected, labels = learn.validate(), [y.tolist() for _, y in learn.dls.valid]
    copied = copy.deepcopy(learn)
    assert copied.dls.images is learn.dls.images and copied.validate() == expected
    with pickle.loads(pickle.dumps(learn)).no_bar() as other:
        assert other.validate() == expected and other.dls.train.one_batch()[0].shape == (8, 3, 32, 32)
    sent = ForkingPickler.loads(ForkingPickler.dumps(learn.dls.valid))  # as a worker process gets it
    assert [y.tolist() for _, y in sent] == labels and sent.dataset.tls[0].tfms.fs[0].store.tensors(CPU)[0].is_shared()
    pixels = tiny_images.images.tobytes()
    assert pixels in pickle.dumps(learn.dls) and pixels not in pickle.dumps(learn.dls.new_empty())
    assert learn.validate() == expected


@pytest.mark.slow
def test_spawned_workers_have_the_images(tiny_images, monkeypatch):
    dls = cifar_block(tiny_images).dataloaders(range(66), bs=6, val_bs=9, device="cpu", num_workers=1)
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(type(dls.valid.fake_l), "multiprocessing_context", spawn)
    assert [label for _, y in dls.valid for label in y.tolist()] == tiny_images.test_labels.tolist()


def test_get_preds_keeps_the_order_of_the_split(learn, tiny_images):
    _, targets = learn.get_preds(dl=learn.dls.valid.new(shuffle=True))
    assert targets.tolist() == tiny_images.test_labels.tolist()


def test_fastai_on_top(learn, tiny_images):
    learn.fit_one_cycle(1, 0.1)
    learn.show_results()
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == tiny_images.n_test
    interp.plot_top_losses(4)
    learn.dls.show_batch()
    assert "Total params" in str(learn.summary())
    assert learn.dls.train.new(bs=3).one_batch()[0].shape == (3, 3, 32, 32)


def test_a_split_for_choosing_is_stratified_repeatable_and_apart_from_train(tiny_images):
    train, valid = split_rows(tiny_images, valid_pct=0.25, split_seed=7)
    again = split_rows(tiny_images, valid_pct=0.25, split_seed=7)
    other = split_rows(tiny_images, valid_pct=0.25, split_seed=8)
    assert (train, valid) == again != other
    assert not set(train) & set(valid) and max(train + valid) < tiny_images.n_train
    counts = np.bincount(tiny_images.labels[valid], minlength=len(tiny_images.classes))
    assert counts.max() - counts.min() <= 1


REFUSAL = "images to train on, and cutting them into {} would lose one of 3 classes"


@pytest.mark.parametrize(
    "n, options, parts",
    [
        (1, dict(valid_pct=0.3), "34 and 14"),
        (1, dict(subset=20), "20 and 28"),
        (2, dict(valid_pct=0.1), "43 and 5"),
        (2, dict(valid_pct=0.5, subset=8), "8 and 16"),
        (16, dict(subset=1000), "1000 and -952"),
        (16, dict(subset=1), "1 and 47"),
        (16, dict(valid_pct=0.001), "48 and 0"),
    ],
)
def test_cuts_that_would_lose_a_class(tiny_images, n, options, parts):
    """`n` blue images beside the others of 48."""
    labels = tiny_images.labels.copy()
    labels[:48] = np.arange(48) % 2
    labels[:n] = 2
    with pytest.raises(InputError, match=REFUSAL.format(parts)):
        split_rows(replace(tiny_images, labels=labels), **options)
    assert len(split_rows(replace(tiny_images, labels=labels))[0]) == 48


def test_subset_comes_out_of_what_the_split_left_and_cuts_validation_in_proportion(tiny_images):
    whole = split_rows(tiny_images, valid_pct=0.25)
    train, valid = split_rows(tiny_images, valid_pct=0.25, subset=18)  # of 36, with 12 for validation
    assert set(train) < set(whole[0]) and set(valid) < set(whole[1])
    assert np.bincount(tiny_images.labels[train]).tolist() == [6, 6, 6]
    assert np.bincount(tiny_images.labels[valid]).tolist() == [2, 2, 2]
    assert len(split_rows(tiny_images, valid_pct=0.25, subset=3)[1]) == 3  # each class is left
    assert len(split_rows(tiny_images, subset=9)[1]) == 18  # the test split is whole


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cutout=33), "cutout=33: the images have 32 pixels a side"),
        (dict(size=48), "size=48: the images have 32 pixels a side"),
    ],
)
def test_what_is_larger_than_the_images(tiny_images, options, message):
    with pytest.raises(InputError, match=message):
        cifar_dls(tiny_images, bs=8, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(valid_pct=2), r"valid_pct=2(\.0)?: must be above 0 and below 1"),
        (dict(bs=0), "bs=0: must be at least 1"),
        (dict(cutout=129), "cutout=129: must be at least 0 and at most 128"),
        (dict(flip_by="turns"), "flip_by='turns': no such name"),
        (dict(split_seed=-1), "split_seed=-1"),
        (dict(subset=2.5), "subset=2.5: must be a whole number"),
        (dict(val_bs=0), "val_bs=0: must be at least 1"),
        (dict(num_workers=4), "num_workers=4: the images are in memory"),
        (dict(batch_tfms=[]), r"batch_tfms=\[\]: `cifar_block\(images, batch_tfms="),
        (dict(item_tfms=[]), r"item_tfms=\[\]: .*; `size` resizes them"),
    ],
)
def test_values_out_of_range_are_refused_before_images_are_loaded(options, message):
    with pytest.raises(InputError, match=message):
        cifar_dls("no such folder", **options)


def test_other_wrong_arguments(tiny_images):
    with pytest.raises(TypeError, match="cutot"):
        cifar_dls(tiny_images, cutot=3)
    with pytest.raises(InputError, match="bs=1000: there are 48 images to train on"):
        cifar_dls(tiny_images, bs=1000)


def test_the_defaults_are_those_of_resnet18s_recipe(tiny_images):
    recipe, parameters = RECIPES["resnet18"], signature(cifar_dls).parameters
    augment = {name: p.default for name, p in parameters.items() if name not in "images bs device val_bs flip".split()}
    assert augment.items() <= recipe.to_dict().items() and augment["pad_mode"] == "reflect"
    many = replace(
        tiny_images, images=np.tile(tiny_images.images, (100, 1, 1, 1)), labels=np.tile(tiny_images.labels, 100)
    )
    dls = cifar_dls(replace(many, n_train=6000), device="cpu")
    assert dls.train.bs == recipe.bs == dls.settings["bs"] and dls.settings.items() >= augment.items()
    assert cifar_dls(tiny_images, device="cpu").train.bs == 2, "20 steps of a small set"
    kinds = [type(tfm).__name__ for tfm in cifar_dls(tiny_images, flip=0.3, device="cpu").train.after_batch.fs]
    assert "RandomFlip" in kinds and "AlternatingFlip" not in kinds


def test_unique_batches_show_one_image_augmented(dls, tiny_images):
    """fastai asks for an endless row of the same index."""
    dls.train.show_batch(unique=True)
    shown = next(dls.train.create_batches(itertools.repeat(5)))
    assert shown[1].tolist() == [tiny_images.labels[dls.train.dataset.items[5]]] * 8


def test_augmentation_columns(tiny_images):
    dls = cifar_dls(tiny_images, bs=8, device="cpu", padding=4, flip=1.0, vflip=1.0, cutout=8)
    columns = augmentation_columns(dls, n=4)
    assert list(columns) == ["original", "RandomCrop", "RandomFlip", "RandomVerticalFlip", "CutOut", "all"]
    original = tiny_images.train_images[::12].transpose(0, 2, 3, 1)
    assert all(images.shape == (4, 32, 32, 3) and images.dtype == np.uint8 for images in columns.values())
    assert np.array_equal(columns["original"], original)
    assert np.abs(columns["RandomFlip"].astype(int) - original[:, :, ::-1]).max() <= 1
    assert np.abs(columns["RandomVerticalFlip"].astype(int) - original[:, ::-1]).max() <= 1
    changed = (np.abs(columns["CutOut"].astype(int) - original) > 1).any(3).sum((1, 2))
    assert (changed > 10).all() and (changed <= 64).all()  # one hole, filled with the mean


def test_batches_shrink_for_a_small_set():
    assert default_bs(128, 50_000) == 128
    assert default_bs(128, 1437) == 71 and 1437 // 71 >= 20
