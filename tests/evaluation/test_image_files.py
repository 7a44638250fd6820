"""Image files: any picture in one of six formats becomes what the network takes; everything else is refused."""

import os

import numpy as np
import pytest
import torch
from fastai.learner import load_learner
from PIL import Image, ImageOps

from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.image_files import image_batch, load_image, predict_files
from cifar_fastai.evaluation.predictions import predict


def test_files_as_the_split_itself(learn, tiny_images, tmp_path):
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file, image in zip(files, tiny_images.test_images, strict=False):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    results, expected = predict_files(learn, files), predict(learn)
    for k, item in enumerate(results):
        np.testing.assert_allclose(item.probs, expected.probs[k], rtol=1e-4)
        assert item.file == files[k] and item.note is None and item.image.shape == (32, 32, 3)
        assert [name for name, _ in item.top3] == [expected.classes[c] for c in np.argsort(-expected.probs[k])]
        assert item.top3[0][1] == pytest.approx(expected.confidence[k], rel=1e-4)
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])[:3]
    torch.testing.assert_close(image_batch(learn, [item.image for item in results]), x)


def test_files_with_an_exported_learner(learn, tiny_images, tmp_path):
    Image.fromarray(tiny_images.test_images[0].transpose(1, 2, 0)).resize((64, 48)).save(tmp_path / "a.png")
    (before,) = predict_files(learn, [tmp_path / "a.png"])
    learn.export(tmp_path / "learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    with loaded.no_bar():
        (after,) = predict_files(loaded, str(tmp_path / "a.png"))
        with pytest.raises(InputError, match="an exported learner holds none"):
            predict(loaded)
    np.testing.assert_allclose(after.probs, before.probs, rtol=1e-4)


@pytest.mark.parametrize(
    ("image", "name", "value"),
    [
        (Image.new("RGB", (32, 32), (10, 20, 30)), "a.png", [10, 20, 30]),
        (Image.new("L", (40, 40), 99), "a.png", 99),
        (Image.fromarray(np.full((40, 40), 40_000, np.uint16)), "a.png", 40_000 // 256),
        (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), "a.png", 255),  # transparent: white
        (Image.new("P", (32, 32)), "a.gif", 0),
        (Image.new("CMYK", (32, 32)), "a.jpg", 255),
        (Image.new("1", (3, 500)), "a.png", 0),
    ],
)
def test_any_picture_becomes_32_by_32(tmp_path, image, name, value):
    image.save(tmp_path / name)
    pixels, note = load_image(tmp_path / name)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and (pixels == value).all()
    assert (note is None) == (image.size == (32, 32))


def test_what_the_note_says(tmp_path):
    def load(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return load_image(tmp_path / name)

    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200
    pixels, note = load(Image.fromarray(wide))
    assert (pixels >= 180).all() and note == "300 x 100, cropped to its central square and resized to 32 x 32"
    assert load(Image.new("RGB", (7, 7)))[1] == "7 x 7, resized to 32 x 32"
    pixels, _ = load(Image.fromarray(np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)), "a.tif")
    assert pixels.min() == 0 and pixels.max() == 255, "not all of it black"
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    pixels, note = load(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert note == "the first of 3 pictures" and (pixels == [255, 0, 0]).all()


def test_exif_that_is_damaged_does_not_matter(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "a camera"
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg", exif=exif)
    before, _, after = (tmp_path / "a.jpg").read_bytes().partition(b"Exif\0\0")
    (tmp_path / "a.jpg").write_bytes(before + b"Exif\0\0" + after[:8] + b"\xff" * 24 + after[32:])
    assert load_image(tmp_path / "a.jpg")[0][0, 0, 0] > 200
    monkeypatch.setattr(Image.Image, "getexif", lambda image: 1 / 0)
    assert load_image(tmp_path / "a.jpg")[0].shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, orientation):
    pixels, exif = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), Image.Exif()
    exif[0x0112] = orientation
    for file in tmp_path / "a.png", tmp_path / "a.tif":
        Image.fromarray(pixels).save(file, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
        np.testing.assert_array_equal(load_image(file)[0], expected)
        assert (expected != pixels).any() == (orientation > 1)


def test_what_is_no_image(learn, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for name, message in {
        "text.png": r"cannot be read \(not an image\); use PNG, JPEG, WEBP, BMP, GIF, TIFF files",
        "empty.jpg": "not an image",
        "half.png": "cannot be read",
        "none.png": "No such file",
        "": "not a regular file",
        "pipe.png": "not a regular file",
        "page.eps": "not an image",
        "large.png": "more than 50,000,000 pixels",
        "bomb.png": "cannot be read .Image size",
    }.items():
        with pytest.raises(InputError, match=message) as e:
            predict_files(learn, [tmp_path / "whole.png", tmp_path / name])
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="no image files"):
        predict_files(learn, [])
