"""`load_images`: names, numbers, digits, and CIFAR-10 from wherever it is."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_data import CLASSES, TINY, encoded, random_pixels, tiny_files, write_folder, write_tar

from cifar_fastai.data import cifar10, download
from cifar_fastai.data import images as data
from cifar_fastai.data.images import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, load_images
from cifar_fastai.data.sources import open_source
from cifar_fastai.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_folder(tmp_path):
    images = load_images(write_folder(tmp_path / "pets", TINY))
    assert images.name == "pets" and images.classes == CLASSES
    assert images.images.shape == (10, 3, 32, 32) and images.images.dtype == np.uint8
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1] and images.labels.dtype == np.int64
    assert (images.n_train, images.n_test, images.flip, images.note) == (6, 4, 0.5, None)
    assert images.source == str(tmp_path / "pets")
    for seed in range(10):
        assert np.array_equal(images.images[seed], random_pixels(seed).transpose(2, 0, 1))  # (3, 32, 32)
    assert np.array_equal(images.train_images, images.images[:6])
    assert np.array_equal(images.test_images, images.images[6:])
    assert [*images.train_labels, *images.test_labels] == images.labels.tolist()
    assert repr(images) == "pets: 6 train and 4 test images of 2 classes, from pets"
    assert np.allclose(images.mean, images.train_images.mean((0, 2, 3)) / 255, atol=1e-6)
    assert np.allclose(images.std, images.train_images.std((0, 2, 3)) / 255, atol=1e-6)


def test_images_of_one_colour_have_a_deviation_to_divide_by(tmp_path):
    grey = encoded(np.full((32, 32, 3), 99, np.uint8))
    assert min(load_images(write_folder(tmp_path / "grey", dict.fromkeys(TINY, grey))).std) > 0.003


def count_as_cifar10(monkeypatch, splits=(20, 10), is_official=True):
    """Let data sets of this size, with CIFAR-10's classes, pass for CIFAR-10, or for one of other pixels."""
    monkeypatch.setattr(data, "CIFAR10_SPLITS", splits)
    monkeypatch.setattr(data, "in_official_order", lambda images, labels: (images, labels, is_official))


@pytest.mark.parametrize(
    "kind, is_official, name",
    [("PNG", True, "CIFAR-10"), ("PNG", False, "CIFAR-10 (other pixels)"), ("JPEG", False, "CIFAR-10 (JPEG copy)")],
)
def test_cifar10_is_named_by_its_content(tmp_path, monkeypatch, kind, is_official, name):
    count_as_cifar10(monkeypatch, is_official=is_official)
    files = tiny_files(CIFAR10_CLASSES, 2, 1)  # whose names say png: the content decides
    files = {name: encoded(random_pixels(seed), kind) for seed, name in enumerate(files)}
    images = load_images(write_folder(tmp_path / "anything", files))
    assert images.name == name
    comparison = {"CIFAR-10": "", "CIFAR-10 (JPEG copy)": "on this copy only"}.get(
        name, "cannot be compared with published"
    )
    assert comparison in (images.note or "") and bool(images.note) == bool(comparison)
    assert (images.mean, images.std, images.classes) == (CIFAR10_MEAN, CIFAR10_STD, CIFAR10_CLASSES)
    del files["train/cat/0000.png"]
    images = load_images(write_folder(tmp_path / "less", files))
    assert images.name == "less" and images.mean != CIFAR10_MEAN


def test_other_pixels_are_not_served_as_cifar10(network, tmp_path, monkeypatch):
    """Random images under CIFAR-10's class names and counts stay out of what `auto` and `cifar10` find."""
    count_as_cifar10(monkeypatch, is_official=False)
    fake = load_images(write_folder(tmp_path / "fake", tiny_files(CIFAR10_CLASSES, 2, 1)))
    assert fake.name == "CIFAR-10 (other pixels)"
    assert load_images("auto").name == "digits"
    with pytest.raises(InputError, match="Connection refused"):
        load_images("cifar10")


COPY = tiny_files(CIFAR10_CLASSES, 2, 1, top="cifar10/")
SIZES = [(20, 30), (45, 45), (32, 32), (64, 40)]  # width, height


def test_images_of_any_size(tmp_path):
    """The shorter side is resized, then the centre is cut, as Pillow does it; the cache does not mix sizes up."""
    blurs = [Image.fromarray(random_pixels(k, (4, 4))) for k in range(10)]
    photos = [blur.resize(SIZES[k % 4], Image.Resampling.BICUBIC) for k, blur in enumerate(blurs)]
    folder = write_folder(tmp_path / "a", {name: encoded(photos[k]) for k, name in enumerate(TINY)})
    for size in (48, 32, 48):
        images = load_images(folder, size=size)
        assert images.images.shape == (10, 3, size, size) and images.size == size
        for photo, pixels in zip(photos, images.images, strict=True):
            short = size / min(photo.size)
            near = photo.resize([round(short * side) for side in photo.size], Image.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in near.size)
            cut = np.asarray(near.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
            assert np.abs(cut.astype(int) - pixels).mean() < 5
        assert np.allclose(images.mean, images.train_images.mean((0, 2, 3)) / 255, atol=1e-6)
    refused_without_size = "20x30 pixels; every image must be 32x32, or `size` resizes them"
    with pytest.raises(InputError, match=refused_without_size):
        load_images(folder)
    with pytest.raises(InputError, match="size=8: must be at least 16"):
        load_images(folder, size=8)


def test_a_data_set_is_recognised_before_it_is_resized(tmp_path, monkeypatch):
    count_as_cifar10(monkeypatch)
    images = load_images(write_folder(tmp_path / "a", COPY), size=64)
    assert (images.name, images.size) == ("CIFAR-10", 64) and images.mean != CIFAR10_MEAN
    plain = load_images("cifar10")
    assert plain.size == 32 and load_images("cifar10", size=64).fingerprint == images.fingerprint
    enlarged = Image.fromarray(plain.images[7].transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(images.images[7], np.asarray(enlarged).transpose(2, 0, 1))
    assert load_images("digits", size=16).images.shape == (1797, 3, 16, 16)


@pytest.mark.parametrize("name", ["CIFAR-10", "digits"])
def test_a_folder_does_not_get_a_reserved_name(tmp_path, name):
    images = load_images(write_folder(tmp_path / name, TINY))
    assert images.name == f"folder {name}" and images.flip == 0.5
    write_folder(tmp_path / "outer", tiny_files(top=f"{name}/"))
    assert load_images(tmp_path / "outer").name == f"folder {name}"


def test_the_fingerprint_is_of_the_content(tiny_images):
    flipped, moved = tiny_images.images.copy(), tiny_images.labels.copy()
    flipped[0, 0, 0, 0] ^= 1
    moved[:2] = moved[1::-1]
    others = [dict(images=flipped), dict(labels=moved), dict(classes=("a", "b", "c")), dict(n_train=47)]
    fingerprints = {replace(tiny_images, **change).fingerprint for change in [{}, *others]}
    assert len(fingerprints) == 5
    assert replace(tiny_images, name="x", source="y", mean=(0, 0, 0), note="z").fingerprint in fingerprints
    # runs store it, so it is the same in every version
    assert tiny_images.fingerprint == "7a695e1974ba2cb80eaa2fc62d667f30723e1c3c0cd0578bde93f14502787afb"


def test_digits():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    assert (images.name, images.source, images.flip, images.note) == ("digits", "scikit-learn load_digits", 0.0, None)
    assert images.fingerprint.startswith("de57815fa921dc43")
    assert (images.n_train, images.n_test) == (1437, 360) and images.classes == tuple("0123456789")
    shares = [np.bincount(labels, minlength=10) / len(labels) for labels in (images.train_labels, images.test_labels)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005  # stratified
    small = images.images[:, 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)  # (1797, 64)
    grey, labels = load_digits(return_X_y=True)
    distance = (small**2).sum(1)[:, None] - 2 * small @ (grey.T * 255 / 16) + ((grey * 255 / 16) ** 2).sum(1)
    nearest = distance.argmin(1)  # each image is the digit of its label
    assert np.array_equal(labels[nearest], images.labels)
    assert len(set(nearest[:1437]) & set(nearest[1437:])) == 0  # no image in both splits


def test_environment_sets_the_path_of_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_PATH", str(write_folder(tmp_path / "pets", TINY)))
    assert load_images("auto").name == load_images(None).name == load_images().name == "pets"
    assert load_images("digits").name == "digits"
    monkeypatch.setenv("CIFAR10_PATH", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"gone: cannot be read .* \(the environment variable CIFAR10_PATH names it\)"):
        load_images()


@pytest.fixture
def network(tmp_path, monkeypatch):
    """fastai's folder, empty; CIFAR-10 has 30 images here. No mirror can be reached."""
    monkeypatch.setattr("fastai.data.external.fastai_path", lambda kind: tmp_path / "fastai" / kind)
    monkeypatch.setitem(download.MIRRORS, "cifar10", ("http://127.0.0.1:9/cifar10.tgz",))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "CIFAR10_URL"):
        monkeypatch.delenv(name, raising=False)
    count_as_cifar10(monkeypatch)
    return tmp_path / "fastai"


def test_fastai_copy(network, own_cache):
    write_folder(network / "data", COPY)
    images = load_images("cifar10")
    assert (images.name, images.source, images.note) == ("CIFAR-10", "fastai URLs.CIFAR", None)
    shutil.rmtree(network)
    assert load_images("auto").fingerprint == images.fingerprint  # from the cache
    assert load_images("auto").source == "fastai URLs.CIFAR"
    (own_cache.parent / "file").write_bytes(b"")
    write_folder(network / "data", COPY)
    assert "cannot be kept" in load_images("cifar10", cache_dir=own_cache.parent / "file" / "cache").note


def test_a_banner_names_each_place_and_how_to_go_on(network, own_cache):
    write_folder(network / "data", COPY | {"cifar10/test/cat/0001.png": TINY["test/dog/0000.png"]})
    refusal = f"CIFAR-10 is not available: {own_cache}: not in the cache; {network}/data/cifar10: 20 train and 11 test"
    with pytest.raises(
        InputError, match=f"{refusal}.*; http://127.0.0.1:9/cifar10.tgz: Connection refused; set `data` to its archive"
    ):
        load_images("cifar10")
    for name in ("auto", None):
        images = load_images(name)
        first, cache_line, copy_line, mirror_line, advice = images.note.split("\n")
        assert images.name == "digits" and "scikit-learn's digits are used instead" in first
        assert "127.0.0.1:9/cifar10.tgz: Connection refused" in mirror_line and "cifar10: 20 train and 11" in copy_line
        assert advice.endswith("set CIFAR10_PATH to its archive or folder, or CIFAR10_URL to an address.")


def test_a_folder_of_fastais_that_cannot_be_made_is_no_harm(network, monkeypatch):
    def fail(kind):
        raise PermissionError(13, "Permission denied", "/home/.fastai")

    monkeypatch.setattr("fastai.data.external.fastai_path", fail)
    assert "fastai's folder: no copy" in load_images("auto").note


def test_fastai_archive_where_the_folder_is_incomplete(network):
    write_folder(network / "data", dict(list(COPY.items())[:7]))
    with pytest.raises(InputError, match="no images in test.*Connection refused"):
        load_images("cifar10")
    assert load_images("auto").name == "digits"
    (network / "archive").mkdir()
    write_tar(network / "archive/cifar10.tgz", COPY)
    assert load_images("cifar10").name == "CIFAR-10"


def test_cifar10_that_was_read_from_a_path_serves_auto(tmp_path, network, monkeypatch):
    write_tar(tmp_path / "copy.tar.gz", COPY)
    monkeypatch.chdir(tmp_path)
    images = load_images("copy.tar.gz")
    assert load_images("auto").fingerprint == images.fingerprint
    assert load_images("cifar10").source == str(tmp_path / "copy.tar.gz")


def test_a_copy_in_the_cache_does_not_pass_for_cifar10(network, monkeypatch):
    """Not even where fastai's own folder holds it."""
    count_as_cifar10(monkeypatch, is_official=False)
    path = write_folder(network / "data", COPY) / "cifar10"
    images = load_images(path)
    assert images.name == "CIFAR-10 (other pixels)" and "cannot be compared with published" in repr(images)
    with pytest.raises(InputError, match="but not CIFAR-10's"):
        load_images("cifar10")


def test_progress_on_a_terminal_or_in_a_notebook_only(tmp_path, own_cache, monkeypatch, capsys):
    pets = write_folder(tmp_path / "pets", TINY)

    def progress(**options):
        shutil.rmtree(own_cache, ignore_errors=True)
        load_images(pets, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert progress() == ""
    for place in ("cifar_fastai.data.decode.in_notebook", "sys.stderr.isatty"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda: True)
            assert "decoding images" in progress() and progress(progress=False) == ""


def test_importing_it_is_light():
    heavy = "{'torch', 'fastai', 'sklearn', 'matplotlib'}"
    script = f"import sys, cifar_fastai.data.images; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, cwd=ROOT, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("\n", "", 0)


REAL = os.environ.get("CIFAR10_PATH")
PUBLISHED_MD5 = dict(
    data_batch_1="c99cafc152244af753f735de768cd75f",
    data_batch_2="d4bba439e000b95fd0a9bffe97cbabec",
    data_batch_3="54ebc095f3ab1f0389bbae665268c751",
    data_batch_4="634d18415352ddfa80567beed471001a",
    data_batch_5="482c414d41f54cd18b22e5b47cb7c3cb",
    test_batch="40351d587109b95175f43aff81a1287e",
)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="CIFAR10_PATH does not name a copy of CIFAR-10")
def test_real_cifar10():
    images = load_images(REAL)
    assert images.name == "CIFAR-10" and images.note is None or images.name == "CIFAR-10 (JPEG copy)"
    assert (images.n_train, images.n_test, images.classes) == (50_000, 10_000, CIFAR10_CLASSES)
    assert np.bincount(images.train_labels).tolist() == [5000] * 10
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    source = open_source(REAL)
    if ("test_batch",) in source.files:
        batches = {name: hashlib.md5(source.read((name,), 2**26)).hexdigest() for name in PUBLISHED_MD5}
        assert (batches == PUBLISHED_MD5) == (images.name == "CIFAR-10")
    if images.name == "CIFAR-10":  # in any order of its files, but not with another pixel
        rng = np.random.default_rng(0)
        order = np.concatenate([rng.permutation(50_000), 50_000 + rng.permutation(10_000)])
        shuffled = images.images[order], images.labels[order]
        pixels, labels, is_official = cifar10.in_official_order(*shuffled)
        assert is_official and np.array_equal(pixels, images.images) and np.array_equal(labels, images.labels)
        shuffled[0][0, 0, 0, 0] ^= 1
        assert not cifar10.in_official_order(*shuffled)[2]
    mean, std = data.channel_statistics(images.train_images)
    assert np.allclose(mean, CIFAR10_MEAN, atol=0.003) and np.allclose(std, CIFAR10_STD, atol=0.006)
    seconds = []
    for _ in range(5):  # the best of them: another process may have the disk or the cores
        began = time.monotonic()
        again = load_images(REAL)
        seconds.append(time.monotonic() - began)
    assert again.fingerprint == images.fingerprint and min(seconds) < 1
