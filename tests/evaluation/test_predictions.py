"""One pass, checked against fastai's own answers and against views worked out by hand."""

import csv

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.interpret import ClassificationInterpretation
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn

from cifar_fastai.data.loaders import test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import Predictions, images_at, predict


def test_agrees_with_fastai(learn, tiny_images):
    ours, theirs = predict(learn), ClassificationInterpretation.from_learner(learn)
    assert ours.accuracy not in (0, 1)  # or there would be little to compare
    assert (ours.confusion_matrix == theirs.confusion_matrix()).all()
    assert ours.most_confused() == [(t, p, int(n)) for t, p, n in theirs.most_confused(min_val=1)]
    losses, order = theirs.top_losses()
    np.testing.assert_allclose(ours.losses[ours.top_losses()], losses, rtol=1e-6)
    assert set(ours.top_losses(4)) == set(order[:4].tolist())
    probs, targets = learn.get_preds()
    np.testing.assert_allclose(ours.probs, probs, rtol=1e-6)
    assert (ours.targets == targets.numpy()).all() and (ours.targets == tiny_images.test_labels).all()
    assert ours.accuracy == pytest.approx(learn.validate()[1]) and ours.loss == pytest.approx(learn.validate()[0])
    assert ours.classes == tiny_images.classes and (ours.indices == np.arange(18)).all()


def test_tables_by_hand():
    targets, predicted = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 1, 1])
    losses = np.array([0.1, 0.2, 5, 0.3, np.nan, 2, 2], np.float32)
    preds = Predictions(np.eye(4, dtype=np.float32)[predicted], targets, losses, np.arange(7), ("a", "b", "c", "d"))
    assert preds.confusion_matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert preds.class_accuracy == {"a": 2 / 3, "b": 1 / 2, "c": 0, "d": None}
    assert [row["precision"] for row in preds.class_table] == [2 / 3, 1 / 4, None, None]
    assert [row["f1"] for row in preds.class_table] == [2 / 3, 1 / 3, 0, None]
    assert [(row["images"], row["correct"]) for row in preds.class_table] == [(3, 2), (2, 1), (2, 0), (0, 0)]
    assert preds.most_confused() == [("c", "b", 2), ("a", "b", 1), ("b", "a", 1)]
    assert preds.most_confused(2) == [("c", "b", 2)]
    assert preds.errors.tolist() == [4, 2, 5, 6] and preds.misclassified(2).tolist() == [4, 2]  # NaN is worst
    assert preds.top_losses(3).tolist() == [4, 2, 5]
    assert preds.accuracy == 3 / 7 and len(preds) == 7


@pytest.mark.parametrize("tta", [None, "flip", "shift"])
def test_views_and_losses_by_hand(learn, tta):
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid]).numpy()  # (N, 3, 32, 32)
    y = torch.cat([y.as_subclass(torch.Tensor) for _, y in learn.dls.valid])
    border = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    up, down = border[:, :, 2:, 2:], border[:, :, :-2, :-2]
    views = {None: [(x, 1)], "flip": [(x, 0.5)], "shift": [(x, 0.25), (down, 0.125), (up, 0.125)]}[tta]
    views += [(view[..., ::-1].copy(), weight) for view, weight in views if tta]
    with torch.no_grad():
        logits = sum(weight * learn.model.eval()(torch.tensor(view)) for view, weight in views)
    preds = predict(learn, tta=tta)
    np.testing.assert_allclose(preds.probs, logits.softmax(1), rtol=1e-4, atol=1e-6)
    expected = F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(preds.losses, expected, rtol=1e-4, atol=1e-6)
    assert np.allclose(preds.probs, predict(learn).probs, atol=1e-4) == (tta is None)
    assert learn.loss_func.reduction == "mean"


def test_a_tuple_shares_one_pass(learn):
    runs = []
    handle = learn.model.register_forward_hook(lambda module, x, out: runs.append(len(x[0])))
    together = predict(learn, tta=(None, "flip", "shift"))
    handle.remove()
    assert len(runs) == 6 * len(learn.dls.valid) and sum(runs) == 6 * 18
    for tta, preds in zip((None, "flip", "shift"), together, strict=True):
        alone = predict(learn, tta=tta)
        np.testing.assert_allclose(preds.probs, alone.probs, rtol=1e-6)
        np.testing.assert_allclose(preds.losses, alone.losses, rtol=1e-6)


def test_every_view_runs_in_the_learners_precision(learner):
    learn, types = learner(precision="bf16"), []
    learn.model.register_forward_hook(lambda module, x, out: types.append(out.dtype))
    with learn.no_bar():
        preds = predict(learn, tta="shift")
    assert types == [torch.bfloat16] * 24 and preds.probs.dtype == preds.losses.dtype == np.float32
    assert not torch.is_autocast_enabled("cpu")


def test_other_loaders(learn, tiny_images):
    train = learn.dls.test_dl(list(range(48)), with_labels=True)
    assert (predict(learn, train).targets == tiny_images.train_labels).all()
    shuffled = learn.dls.valid.new(shuffle=True, drop_last=True, bs=7)
    np.testing.assert_allclose(predict(learn, shuffled).probs, predict(learn, test_dl(learn.dls)).probs, rtol=1e-5)
    with pytest.raises(InputError, match="no labels"):
        predict(learn, learn.dls.test_dl([0, 1]))
    with pytest.raises(InputError, match="tta='mirror': no such name; choose from None, flip, shift"):
        predict(learn, tta="mirror")
    learn.loss_func = nn.CrossEntropyLoss()  # of torch, without an activation: softmax
    np.testing.assert_allclose(predict(learn).probs.sum(1), 1, rtol=1e-5)


def test_a_loader_keeps_the_rows_that_it_names(learn):
    few = learn.dls.valid.new(get_idxs=lambda: [2, 0])
    np.testing.assert_allclose(predict(learn, few).probs, predict(learn).probs[[2, 0]], rtol=1e-5)


def test_images_at(learn, tiny_images):
    """Pixels are exact; of every loader, shuffled and augmented ones included, the images are as predict sees them."""
    x, images = images_at(learn.dls.valid, [3, 17, 0])
    assert (images == tiny_images.test_images[[3, 17, 0]].transpose(0, 2, 3, 1)).all() and images.dtype == np.uint8
    whole = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])
    torch.testing.assert_close(x, whole[[3, 17, 0]])
    train = learn.dls.test_dl(list(range(48)), with_labels=True)
    for dl in train, learn.dls.test_dl(list(range(48))), learn.dls.train:
        positions = range(47, -1, -1)
        rows = [int(dl.dataset.items[k]) for k in positions]
        assert (images_at(dl, positions)[1] == tiny_images.images[rows].transpose(0, 2, 3, 1)).all()
    x, images = images_at(learn.dls.valid, np.array([], np.int64))
    assert x.shape == (0, 3, 32, 32) and images.shape == (0, 32, 32, 3)


def test_images_of_fastais_own_loaders(tiny_folder):
    dls = ImageDataLoaders.from_folder(tiny_folder, "train", "test", bs=5, device="cpu", num_workers=0)
    x, images = images_at(dls.valid, [4, 1])
    assert x.shape == (2, 3, 32, 32)
    for k, image in zip([4, 1], images, strict=True):
        assert (image == np.asarray(Image.open(dls.valid_ds.items[k]))).all()


def test_csv_is_what_the_csv_module_writes(tmp_path):
    """Byte for byte, and every float32 comes back: class names in quotes, numbers as Python's str has them."""
    losses = np.random.default_rng(0).integers(0, 2**32, 7000, np.uint32).view(np.float32)
    losses[:4] = np.nan, np.inf, 1e-9, 0
    names, labels = ('a, "b"', "ünï\nline", "NA", "", "nan", "7", "true"), np.arange(7000) % 7
    preds = Predictions(None, labels, losses, np.arange(7000), names, labels[::-1], losses[::-1])
    preds.to_csv(tmp_path / "p.csv")
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("index", "target", "predicted", "confidence", "loss"))
        columns = preds.indices, *preds.names_at(slice(None)), preds.confidence, preds.losses
        writer.writerows([[str(value) for value in row] for row in zip(*columns, strict=True)])
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "q.csv").read_bytes()
    again = Predictions.from_csv(tmp_path / "p.csv", names)
    for name in ("targets", "predicted", "indices", "confidence", "losses"):
        np.testing.assert_array_equal(getattr(again, name), getattr(preds, name), strict=True)
    assert again.class_table == preds.class_table and Predictions.from_csv(tmp_path / "p.csv").classes == (
        *sorted(names),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "q.csv"]


HEAD = "index,target,predicted,confidence,loss\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as predictions"),
        (HEAD, "in one row for each image"),
        ("a,b\n1,2\n", "the columns must be index, target"),
        (HEAD + "0,7,5,7,1,1\n", "the columns must be|cannot be read as predictions"),
        (HEAD + "0,cat,dog,high,1\n", "could not convert string to float: 'high'"),
        (HEAD + "0,cat,cat,1,1\n1,cat,cat,1\n", "could not convert string to float: ''"),
        (HEAD + "0,cat,cat,1,1\n1,cat,cat,1,1,1\n", "line 3"),
        (HEAD + "0.5,cat,cat,1,1\n", "cannot be read"),
        (HEAD + "9999999999999999999999,cat,cat,1,1\n", "cannot be read"),
        (HEAD + '0,"cat,cat,1,1\n', "cannot be read"),
        (HEAD + "0,cat,cat,1,1\n0,cat,cow,1,1\n", "it has classes that are not among cat, dog"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "No such file"),
    ],
)
def test_broken_csv(tmp_path, content, message):
    file = tmp_path / "p.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as e:
        Predictions.from_csv(file, ("cat", "dog"))
    assert str(e.value).startswith(str(file)) and "\n" not in str(e.value)


def test_no_cell_of_the_table_is_a_formula(tmp_path):
    names = ("=HYPERLINK(1)", "+1", "-2", "@sum", "'=1", "''+2", "'plain", "cat", "a=b")
    n = np.arange(len(names))
    table = Predictions(np.eye(len(names), dtype=np.float32), n, np.float32(n), n, names)
    table.to_csv(tmp_path / "predictions.csv")
    cells = pd.read_csv(tmp_path / "predictions.csv", dtype=str)["target"].tolist()
    assert cells == ["'" + name if name in names[:6] else name for name in names]
    again = Predictions.from_csv(tmp_path / "predictions.csv", names)
    assert again.names_at(n) == table.names_at(n)
