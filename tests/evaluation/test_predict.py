"""One pass, checked against fastai's own answers and against views worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from PIL import Image, ImageOps
from torch import nn

from cifar_fastai.data.loaders import cifar_dls, test_dl
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import Predictions, image_batch, load_image, predict, predict_files
from cifar_fastai.training.learner import cifar_learner

torch.set_num_threads(1)


class TinyNet(nn.Module):
    """Sees colour and place, so that every view has a score of its own."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 15 * 15, n_classes)

    def forward(self, x):
        return self.linear(F.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def learn(tiny_images):
    torch.manual_seed(0)
    dls = cifar_dls(tiny_images, bs=8, val_bs=5, device="cpu")
    learn = cifar_learner(dls, TinyNet(), precision="fp32", label_smoothing=0.1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=5e-4)
        yield learn


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


def test_losses_are_the_learners_for_each_image(learn):
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])
    y = torch.cat([y.as_subclass(torch.Tensor) for _, y in learn.dls.valid])
    with torch.no_grad():
        expected = F.cross_entropy(learn.model.eval()(x), y, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(predict(learn).losses, expected, rtol=1e-5)
    assert learn.loss_func.reduction == "mean"


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


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_views_by_hand(learn, tta):
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid]).numpy()  # (N, 3, 32, 32)
    y = torch.cat([y.as_subclass(torch.Tensor) for _, y in learn.dls.valid])
    border = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    pairs = [(x, 1.0)]
    if tta == "shift":
        pairs = [(x, 0.5), (border[:, :, :-2, :-2], 0.25), (border[:, :, 2:, 2:], 0.25)]
    model = learn.model.eval()
    with torch.no_grad():
        logits = sum(w / 2 * (model(torch.tensor(v)) + model(torch.tensor(v[..., ::-1].copy()))) for v, w in pairs)
    preds = predict(learn, tta=tta)
    np.testing.assert_allclose(preds.probs, logits.softmax(1), rtol=1e-4, atol=1e-6)
    expected = F.cross_entropy(logits, y, label_smoothing=0.1, reduction="none")
    np.testing.assert_allclose(preds.losses, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(preds.probs, predict(learn).probs, atol=1e-4)


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


def test_every_view_runs_in_the_learners_precision(tiny_images):
    dls = cifar_dls(tiny_images, bs=8, val_bs=9, device="cpu")
    learn = cifar_learner(dls, TinyNet(), precision="bf16")
    types = []
    learn.model.register_forward_hook(lambda module, x, out: types.append(out.dtype))
    with learn.no_bar():
        preds = predict(learn, tta="shift")
    assert types == [torch.bfloat16] * 12
    assert preds.probs.dtype == preds.losses.dtype == np.float32
    np.testing.assert_allclose(preds.probs.sum(1), 1, rtol=1e-5)
    assert not torch.is_autocast_enabled("cpu")


def test_other_loaders(learn, tiny_images):
    train = learn.dls.test_dl(list(range(48)), with_labels=True)
    assert (predict(learn, train).targets == tiny_images.train_labels).all()
    shuffled = learn.dls.valid.new(shuffle=True, drop_last=True, bs=7)
    np.testing.assert_allclose(predict(learn, shuffled).probs, predict(learn, test_dl(learn.dls)).probs, rtol=1e-5)
    with pytest.raises(InputError, match="no labels"):
        predict(learn, learn.dls.test_dl([0, 1]))
    with pytest.raises(InputError, match="tta mirror: no such name; choose from flip, shift or None"):
        predict(learn, tta="mirror")


def test_a_plain_torch_loss_means_softmax(learn):
    learn.loss_func = nn.CrossEntropyLoss()
    np.testing.assert_allclose(predict(learn).probs.sum(1), 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- csv


def test_csv_and_back(learn, tmp_path):
    preds = predict(learn)
    preds.to_csv(tmp_path / "predictions.csv")
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "index,target,predicted,confidence,loss" and len(lines) == 19
    assert lines[1].startswith(f"0,red,{preds.classes[preds.predicted[0]]},")
    again = Predictions.from_csv(tmp_path / "predictions.csv", preds.classes)
    for name in ("targets", "predicted", "indices", "confidence", "losses", "confusion_matrix", "errors"):
        assert (getattr(again, name) == getattr(preds, name)).all(), name
        assert getattr(again, name).dtype == getattr(preds, name).dtype, name
    assert again.accuracy == preds.accuracy and again.class_table == preds.class_table
    assert Predictions.from_csv(tmp_path / "predictions.csv").classes == ("blue", "green", "red")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_csv_with_awkward_names(tmp_path):
    names = ('a, "b"', "ünï\nline")
    preds = Predictions(
        np.eye(2, dtype=np.float32), np.array([1, 0]), np.array([np.nan, 1e-9], np.float32), np.arange(2), names
    )
    preds.to_csv(tmp_path / "p.csv")
    again = Predictions.from_csv(tmp_path / "p.csv", names)
    assert again.predicted.tolist() == [0, 1] and np.isnan(again.losses[0]) and again.losses[1] == np.float32(1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no table"),
        ("index,target,predicted,confidence,loss\n", "is no table"),
        ("a,b\n1,2\n", "its columns must be index, target"),
        ("index,target,predicted,confidence,loss\n0,cat,dog,high,1\n", "line 2"),
        ("index,target,predicted,confidence,loss\n0,cat,cat,1,1\n1,cat,cat,1\n", "line 3"),
        ("index,target,predicted,confidence,loss\n0,cat,cow,1,1\n", "line 2: 'cow' is no class"),
    ],
)
def test_broken_csv(tmp_path, text, said):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=said) as e:
        Predictions.from_csv(tmp_path / "p.csv", ("cat", "dog"))
    assert "\n" not in str(e.value)


def test_missing_or_binary_csv(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Predictions.from_csv(tmp_path / "none.csv")
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no CSV text"):
        Predictions.from_csv(tmp_path / "p.csv")


# ----------------------------------------------------------------------------------------------------------- files


def test_files_as_the_split_itself(learn, tiny_images, tmp_path):
    files = []
    for k in range(3):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(tiny_images.test_images[k].transpose(1, 2, 0)).save(files[-1])
    found, expected = predict_files(learn, files), predict(learn)
    for k, one in enumerate(found):
        np.testing.assert_allclose(one.probs, expected.probs[k], rtol=1e-4)
        assert one.file == files[k] and one.note is None and one.image.shape == (32, 32, 3)
        assert [name for name, _ in one.top3] == [expected.classes[c] for c in np.argsort(-expected.probs[k])]
        assert one.top3[0][1] == pytest.approx(expected.confidence[k], rel=1e-4)
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])[:3]
    torch.testing.assert_close(image_batch(learn, [one.image for one in found]), x)


def test_files_with_an_exported_learner(learn, tiny_images, tmp_path):
    Image.fromarray(tiny_images.test_images[0].transpose(1, 2, 0)).resize((64, 48)).save(tmp_path / "a.png")
    (before,) = predict_files(learn, [tmp_path / "a.png"])
    learn.export(tmp_path / "learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    with loaded.no_bar():
        (after,) = predict_files(loaded, [str(tmp_path / "a.png")])
        with pytest.raises(InputError, match="an exported learner holds none"):
            predict(loaded)
    np.testing.assert_allclose(after.probs, before.probs, rtol=1e-4)
    assert after.note == "64 x 48, cropped to its central square and resized to 32 x 32"


def test_any_picture_becomes_32_by_32(tmp_path):
    def load(image, name="a.png", **kwargs):
        image.save(tmp_path / name, **kwargs)
        return load_image(tmp_path / name)

    image, note = load(Image.new("RGB", (32, 32), (10, 20, 30)))
    assert note is None and image.dtype == np.uint8 and (image == [10, 20, 30]).all()
    assert load(Image.new("RGB", (7, 7)))[1] == "7 x 7, resized to 32 x 32"
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200  # its central square alone is bright
    assert (load(Image.fromarray(wide))[0] >= 180).all()
    assert (load(Image.new("L", (40, 40), 99))[0] == 99).all()
    assert (load(Image.fromarray(np.full((40, 40), 40_000, np.uint16)))[0] == 40_000 // 256).all()
    assert (load(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))[0] == 255).all()  # transparent: white
    assert (load(Image.new("P", (32, 32)), "a.gif")[0] == 0).all()
    assert load(Image.new("CMYK", (32, 32)), "a.jpg")[0].shape == (32, 32, 3)
    assert load(Image.new("1", (3, 500)))[0].shape == (32, 32, 3)


def test_odd_pictures(tmp_path):
    floats = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(floats).save(tmp_path / "a.tif")
    image, note = load_image(tmp_path / "a.tif")
    assert note is None and image.min() == 0 and image.max() == 255, "not all of it black"
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image, note = load_image(tmp_path / "a.gif")
    assert note == "the first of 3 pictures" and (image == [255, 0, 0]).all()


def test_exif_that_is_damaged_does_not_matter(tmp_path, monkeypatch):
    """What cameras write is often odd; only the orientation in it counts."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "a camera"
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    at = content.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(content[: at + 8] + b"\xff" * 24 + content[at + 32 :])
    assert load_image(tmp_path / "a.jpg")[0][0, 0, 0] > 200
    monkeypatch.setattr(Image.Image, "getexif", lambda image: 1 / 0)
    assert load_image(tmp_path / "a.jpg")[0].shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, orientation, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{kind}"
    Image.fromarray(pixels).save(file, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(load_image(file)[0], expected)
    assert (expected != pixels).any() == (orientation > 1)


def test_orientation_is_heeded(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned right by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image, _ = load_image(tmp_path / "a.png")
    assert image[:, 24:].min() == 255 and image[:, :24].max() == 0


def test_what_is_no_image(learn, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for name, said in (
        ("text.png", "is no image"),
        ("empty.jpg", "is no image"),
        ("half.png", "is a broken image"),
        ("none.png", "no such file"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=said) as e:
            predict_files(learn, [tmp_path / "whole.png", tmp_path / name])
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="no image file was given"):
        predict_files(learn, [])
