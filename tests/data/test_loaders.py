"""The fast path gives what the usual path gives, and all that fastai does with a DataBlock goes on working."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from PIL import Image

from cifar_fastai.data.loaders import cifar_dls, default_bs, split_rows, test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.training.learner import cifar_learner


@pytest.fixture
def dls(tiny_images):
    return cifar_dls(tiny_images, bs=8, val_bs=5, device="cpu")


def item_by_item(dl):
    dl.whole_batches = False
    try:
        return list(dl)
    finally:
        dl.whole_batches = True


def test_both_paths_give_the_same_batches(dls):
    fast, slow = list(dls.valid), item_by_item(dls.valid)
    assert dls.valid._rows().tolist() == list(dls.valid.dataset.items)  # or the fast path was not taken
    assert len(fast) == len(slow) > 1
    for (x1, y1), (x2, y2) in zip(fast, slow, strict=True):
        assert type(x1) is type(x2) and type(y1) is type(y2)
        assert x1.dtype == x2.dtype and y1.dtype == y2.dtype
        assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_both_paths_draw_the_same_in_training(dls):
    state = dls.train.rng.getstate()
    batches = []
    for run in (list, item_by_item):
        dls.train.rng.setstate(state)
        torch.manual_seed(3)
        batches.append(run(dls.train))
    for (x1, y1), (x2, y2) in zip(*batches, strict=True):
        assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_values_are_the_pixels_normalised(dls, tiny_images):
    x, y = next(iter(dls.valid))
    mean, std = (np.array(v)[:, None, None] for v in (tiny_images.mean, tiny_images.std))
    expected = (tiny_images.test_images[0] / 255 - mean) / std
    np.testing.assert_allclose(x[0].numpy(), expected, atol=1e-5)
    assert y.tolist() == tiny_images.test_labels[:5].tolist()


def test_training_is_shuffled_complete_and_afresh_each_epoch(tiny_images):
    dls = cifar_dls(tiny_images, bs=6, device="cpu", padding=0, cutout=0, flip=0.0)

    def epoch():
        return torch.cat([x for x, _ in dls.train]).flatten(1).sum(1)

    one, two = epoch(), epoch()
    assert not torch.equal(one, two)
    every = torch.from_numpy(tiny_images.train_images).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny_images.mean, tiny_images.std))
    sums = ((every / 255 - mean) / std).flatten(1).sum(1)
    for seen in one, two:  # 8 batches of 6: each of the 48 images once
        torch.testing.assert_close(seen.as_subclass(torch.Tensor).sort()[0], sums.float().sort()[0], atol=1e-2, rtol=0)


def test_new_files_pil_images_and_rows_all_predict_alike(dls, tiny_images, tmp_path):
    torch.manual_seed(0)
    learn = cifar_learner(dls, _net(len(tiny_images.classes)))
    image = Image.fromarray(tiny_images.test_images[0].transpose(1, 2, 0))
    image.save(tmp_path / "one.png")
    with learn.no_bar():
        rows = learn.get_preds(dl=test_dl(dls))[0][0]
        files = learn.get_preds(dl=dls.test_dl([tmp_path / "one.png"]))[0][0]
        name, index, probs = learn.predict(image)
    torch.testing.assert_close(rows, files)
    torch.testing.assert_close(rows, torch.as_tensor(probs))
    assert name == tiny_images.classes[int(index)]


def test_get_preds_keeps_the_order_of_the_split(dls, tiny_images):
    learn = cifar_learner(dls, _net(len(tiny_images.classes)))
    with learn.no_bar():
        _, targets = learn.get_preds(dl=dls.valid.new(shuffle=True))
    assert targets.tolist() == tiny_images.test_labels.tolist()


def test_fastai_on_top(dls, tiny_images):
    learn = cifar_learner(dls, _net(len(tiny_images.classes)))
    with learn.no_bar():
        learn.fit_one_cycle(1, 0.1)
        learn.show_results()
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum() == tiny_images.n_test
        interp.plot_top_losses(4)
        dls.show_batch()
        assert "Total params" in str(learn.summary())
        assert dls.train.new(bs=3).one_batch()[0].shape == (3, 3, 32, 32)


def test_an_exported_learner_carries_no_pixels_and_predicts(dls, tiny_images, tmp_path):
    learn = cifar_learner(dls, _net(len(tiny_images.classes)), path=tmp_path)
    image = tiny_images.test_images[0].transpose(1, 2, 0)
    with learn.no_bar():
        before = learn.predict(Image.fromarray(image))[2]
        learn.export("learner.pkl")
    data = (tmp_path / "learner.pkl").read_bytes()
    assert tiny_images.test_images[0].tobytes() not in data
    assert len(data) < 100_000
    loaded = load_learner(tmp_path / "learner.pkl")
    with loaded.no_bar():
        torch.testing.assert_close(loaded.predict(Image.fromarray(image))[2], before)


def test_a_split_for_choosing_is_stratified_repeatable_and_apart_from_train(tiny_images):
    train, valid = split_rows(tiny_images, valid_pct=0.25, split_seed=7)
    again = split_rows(tiny_images, valid_pct=0.25, split_seed=7)
    other = split_rows(tiny_images, valid_pct=0.25, split_seed=8)
    assert (train, valid) == again != other
    assert not set(train) & set(valid) and max(train + valid) < tiny_images.n_train
    counts = np.bincount(tiny_images.labels[valid], minlength=len(tiny_images.classes))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    "n, given, says",
    [
        (1, dict(valid_pct=0.3), "class blue has 1 of the images"),
        (1, dict(subset=20), "class blue has 1 of the images"),
        (2, dict(valid_pct=0.1), "leaves no image of class blue"),
        (2, dict(valid_pct=0.5, subset=8), "--subset 8: class blue has 1 of"),
    ],
)
def test_a_class_that_is_too_rare_to_be_cut(tiny_images, n, given, says):
    """`n` blue images beside 32 others."""
    labels = tiny_images.labels.copy()
    labels[:48] = np.arange(48) % 2
    labels[:n] = 2
    with pytest.raises(InputError, match=says):
        split_rows(replace(tiny_images, labels=labels), **given)
    assert len(split_rows(replace(tiny_images, labels=labels))[0]) == 48


def test_subset_comes_out_of_what_the_split_left(tiny_images):
    train, valid = split_rows(tiny_images, valid_pct=0.25, subset=9)
    assert len(train) == 9 and not set(train) & set(valid)
    assert np.bincount(tiny_images.labels[train]).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(subset=1000), "--subset 1000: there are"),
        (dict(subset=1), "at least one image for each"),
        (dict(valid_pct=0.001), "too few"),
        (dict(bs=1000), "--bs 1000: there are"),
    ],
)
def test_settings_that_do_not_fit_the_data(tiny_images, kwargs, message):
    with pytest.raises(InputError, match=message):
        cifar_dls(tiny_images, device="cpu", **{"bs": 4, **kwargs})


def test_batches_shrink_for_a_small_set():
    assert default_bs(128, 50_000) == 128
    assert default_bs(128, 1437) == 71 and 1437 // 71 >= 20


def _net(n_classes):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 4),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, n_classes),
    )
