"""Finding, verifying, decoding and caching images."""

import gzip
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_fastai.data import cache, decode
from cifar_fastai.data import images as data
from cifar_fastai.data import official as batches
from cifar_fastai.data import sources as archives
from cifar_fastai.data.images import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, load_images
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.predictions import load_image

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path / "cache"))
    if "CIFAR10_PATH" in os.environ:
        monkeypatch.delenv("CIFAR10_PATH")
    return tmp_path / "cache"


def no_fastai_copy():
    raise InputError("download of the test: no network")


# Tiny data sets -----------------------------------------------------------------------------------------------------


def png(pixels):
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(seed, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def tiny_files(classes=CLASSES, n_train=3, n_test=2, top=""):
    """{name: content} of an image folder, with a picture of its own in each file."""
    files, seed = {}, 0
    for split, n in (("train", n_train), ("test", n_test)):
        for name in classes:
            for i in range(n):
                files[f"{top}{split}/{name}/{i:04}.png"] = png(pixels_of(seed))
                seed += 1
    return files


def write_folder(path, files):
    for name, content in files.items():
        file = path / name
        if name.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return path


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    if name.endswith("/"):
        info.type = tarfile.DIRTYPE
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_tar(path, files, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for info, content in [*(member(*file) for file in files.items()), *extra]:
            tar.addfile(info, io.BytesIO(content))
    return path


def batch_files(n=4, top="", protocol=2, names=CIFAR10_CLASSES, **changes):
    """The official batches with `n` rows each; `changes` replaces what a file holds."""
    rng = np.random.default_rng(0)
    content = {"batches.meta": {b"label_names": [name.encode() for name in names], b"num_vis": 3072}}
    for name in (*batches.TRAIN_BATCHES, batches.TEST_BATCH):
        content[name] = {
            b"batch_label": name.encode(),
            b"labels": rng.integers(0, len(names), n).tolist(),
            b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"filenames": [f"{i}.png".encode() for i in range(n)],
        }
    content |= changes
    return {
        top + name: value if isinstance(value, bytes) else pickle.dumps(value, protocol)
        for name, value in content.items()
    }


def python2_batch(pixels, labels):
    """A batch as Python 2's cPickle wrote the official ones (protocol 2, 8-bit strings)."""

    def string(text):
        return b"U" + bytes([len(text)]) + text

    data = pixels.tobytes()
    rows = struct.pack("<H", len(pixels))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85" + string(b"b") + b"\x87R"
        b"(K\x01M" + rows + b"M\x00\x0c\x86cnumpy\ndtype\nq\x03" + string(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + string(b"data") + array + string(b"labels") + listed + b"u."


# What is found ------------------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    files = tiny_files()
    images = load_images(write_folder(tmp_path / "pets", files))
    assert images.name == "pets" and images.classes == CLASSES
    assert images.images.shape == (10, 3, 32, 32) and images.images.dtype == np.uint8
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1] and images.labels.dtype == np.int64
    assert (images.n_train, images.n_test, images.flip, images.note) == (6, 4, 0.5, None)
    assert images.source == str(tmp_path / "pets")
    for i, content in enumerate(files.values()):
        expected = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)  # (3, 32, 32)
        assert np.array_equal(images.images[i], expected)
    assert np.array_equal(images.train_images, images.images[:6])
    assert np.array_equal(images.test_images, images.images[6:])
    assert images.train_labels.tolist() + images.test_labels.tolist() == images.labels.tolist()


def test_mean_and_std_are_of_the_train_images(tmp_path):
    images = load_images(write_folder(tmp_path / "pets", tiny_files()))
    assert np.allclose(images.mean, images.train_images.mean((0, 2, 3)) / 255, atol=1e-6)
    assert np.allclose(images.std, images.train_images.std((0, 2, 3)) / 255, atol=1e-6)


def test_images_of_one_colour_leave_something_to_divide_by(tmp_path):
    grey = png(np.full((32, 32, 3), 99, np.uint8))
    files = {name: grey for name in tiny_files()}
    assert min(load_images(write_folder(tmp_path / "grey", files)).std) > 0.003


@pytest.mark.parametrize("top", ["", "./", "pets/"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tgz", "w:gz"), (".tar.gz", "w:gz"), (".tar", "w")])
def test_archives_give_what_the_folder_gives(tmp_path, suffix, mode, top):
    folder = load_images(write_folder(tmp_path / "pets", tiny_files()))
    packed = load_images(write_tar(tmp_path / f"pets{suffix}", tiny_files(top=top), mode=mode))
    assert packed.name == folder.name == "pets"
    assert packed.fingerprint == folder.fingerprint
    assert np.array_equal(packed.images, folder.images) and np.array_equal(packed.labels, folder.labels)


def test_order_is_the_same_for_a_shuffled_archive(tmp_path):
    files = tiny_files()
    backwards = load_images(write_tar(tmp_path / "b.tgz", dict(reversed(files.items()))))
    assert backwards.fingerprint == load_images(write_tar(tmp_path / "a.tgz", files)).fingerprint


def test_a_folder_on_top_of_a_folder(tmp_path):
    write_folder(tmp_path / "outer", tiny_files(top="pets/") | {"readme.txt": b"hello"})
    assert load_images(tmp_path / "outer").name == "pets"


def test_hidden_and_foreign_files_are_passed_by(tmp_path):
    junk = {
        ".DS_Store": b"x",
        "__MACOSX/train/cat/._0000.png": b"x",
        "labels.txt": b"cat\ndog",
        "train/.DS_Store": b"x",
        "train/cat/._0000.png": b"x",
        "train/.ipynb_checkpoints/0.png": b"x",
        "test/dog/Thumbs.db": b"x",
        "models/x/y/z/0.png": b"x",
    }
    plain = load_images(write_folder(tmp_path / "plain", tiny_files()))
    assert load_images(write_folder(tmp_path / "junk", tiny_files() | junk)).fingerprint == plain.fingerprint
    packed = {f"pets/{name}": content for name, content in (tiny_files() | junk).items()}
    packed["._pets"] = b"x"
    assert load_images(write_tar(tmp_path / "junk.tgz", packed)).fingerprint == plain.fingerprint


def test_grey_transparent_and_capital_names(tmp_path):
    files = tiny_files()
    file = io.BytesIO()
    Image.new("L", (32, 32), 7).save(file, "PNG")
    files["train/cat/GREY.PNG"] = file.getvalue()
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (1, 2, 3, 4)).save(file, "PNG")
    files["train/cat/rgba.png"] = file.getvalue()
    folder = write_folder(tmp_path / "pets", files)
    images = load_images(folder).images
    assert images[3].reshape(3, -1).T.tolist() == [[7, 7, 7]] * 1024
    assert images[4].reshape(3, -1).T.tolist() == [[251, 251, 251]] * 1024  # 4 / 255 of the colour, the rest is white
    for k, name in (3, "GREY.PNG"), (4, "rgba.png"):  # a network must see what it was trained on
        assert (load_image(folder / "train" / "cat" / name)[0].transpose(2, 0, 1) == images[k]).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_cifar10_is_named_by_its_content(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(data, "CIFAR10_SPLITS", (20, 10))
    files = {}
    for name, content in tiny_files(CIFAR10_CLASSES, 2, 1).items():
        file = io.BytesIO()
        Image.open(io.BytesIO(content)).save(file, "JPEG" if suffix == "jpg" else "PNG")
        files[name] = file.getvalue()  # the names say png: the content decides
    images = load_images(write_folder(tmp_path / "anything", files))
    assert images.name == ("CIFAR-10 (JPEG copy)" if suffix == "jpg" else "CIFAR-10")
    assert (images.mean, images.std, images.classes) == (CIFAR10_MEAN, CIFAR10_STD, CIFAR10_CLASSES)
    del files["train/cat/0000.png"]
    images = load_images(write_folder(tmp_path / "less", files))
    assert images.name == "less" and images.mean != CIFAR10_MEAN


@pytest.mark.parametrize("name", ["CIFAR-10", "digits"])
def test_a_folder_cannot_pass_for_what_it_is_not(tmp_path, name):
    images = load_images(write_folder(tmp_path / name, tiny_files()))
    assert images.name == f"folder {name}" and images.flip == 0.5


def test_fingerprint_tells_contents_apart(tmp_path):
    files = tiny_files()
    prints = {load_images(write_folder(tmp_path / "a", files)).fingerprint}
    repainted = files | {"train/cat/0000.png": png(pixels_of(99))}
    prints.add(load_images(write_folder(tmp_path / "b", repainted)).fingerprint)
    renamed = {name.replace("cat", "cow"): content for name, content in files.items()}
    prints.add(load_images(write_folder(tmp_path / "c", renamed)).fingerprint)
    moved = {
        {"train": "test", "test": "train"}[name.split("/")[0]] + name[name.index("/") :]: content
        for name, content in files.items()
    }
    prints.add(load_images(write_folder(tmp_path / "d", moved)).fingerprint)
    assert len(prints) == 4


# Official batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_batches(tmp_path, protocol):
    files = batch_files(protocol=protocol)
    images = load_images(write_folder(tmp_path / "cifar-10-batches-py", files))
    assert images.name == "cifar-10-batches-py" and images.classes == CIFAR10_CLASSES and images.n_train == 20
    plain = [pickle.loads(files[name], encoding="bytes") for name in (*batches.TRAIN_BATCHES, batches.TEST_BATCH)]
    assert np.array_equal(images.images.reshape(-1, 3072), np.concatenate([part[b"data"] for part in plain]))
    assert images.labels.tolist() == sum((part[b"labels"] for part in plain), [])
    packed = write_tar(tmp_path / "cifar-10-python.tar.gz", batch_files(protocol=protocol, top="cifar-10-batches-py/"))
    assert load_images(packed).fingerprint == images.fingerprint


def test_batches_by_python_2():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (300, 3072), dtype=np.uint8), rng.integers(0, 10, 300).tolist()
    content = python2_batch(pixels, labels)
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels)  # the test's own batch is a pickle
    images, read_labels = batches.read_batch(content, 10, "data_batch_1")
    assert np.array_equal(images, pixels.reshape(-1, 3, 32, 32)) and read_labels.tolist() == labels


def test_batches_name_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_SPLITS", (20, 4))
    assert load_images(write_folder(tmp_path / "any", batch_files())).name == "CIFAR-10"


def test_batches_with_classes_in_another_order(tmp_path):
    files = batch_files(names=CIFAR10_CLASSES[::-1])
    images = load_images(write_folder(tmp_path / "b", files))
    first = pickle.loads(files["data_batch_1"])[b"labels"]
    assert images.classes == CIFAR10_CLASSES
    assert images.labels[:4].tolist() == [9 - label for label in first]


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo ran > '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("file", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_planted_pickle_is_refused_and_not_run(tmp_path, protocol, file):
    marker = tmp_path / "ran"
    content = pickle.dumps({b"data": Planted(marker), b"labels": [1], b"label_names": Planted(marker)}, protocol)
    folder = write_folder(tmp_path / "b", batch_files(**{file: content}))
    with pytest.raises(InputError, match=rf"{file}: not one of CIFAR-10's batches \(it asks for \S+ system"):
        load_images(folder)
    assert not marker.exists()
    pickle.loads(content)  # it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        "__builtin__ eval",
        "builtins exec",
        "numpy.core.multiarray scalar",
        "numpy load",
        "numpy.lib.npyio load",
        "cifar_fastai.data.cache store",
    ],
)
def test_nothing_but_arrays_can_be_asked_for(call):
    module, name = call.split()
    content = f"c{module}\n{name}\n(S'1'\ntR.".encode()
    with pytest.raises(ValueError, match=f"it asks for {call}"):
        batches.load_plain(content)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(np.zeros(3, np.int64)),
        pickle.dumps(np.array([None])),
        pickle.dumps(1.5),
        pickle.dumps({1, 2}),
        pickle.dumps({(1, 2): 3}),
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"N}b.",
        b"]]b.",
        b"(cnumpy\nndarray\n(tR.",
        b"\x85.",
        b"e.",
        b"N(u.",
        b"}(K\x01u.",
        b"h\x05.",
        b"\x80\x05\x96" + b"\xff" * 8 + b".",
    ],
)
def test_what_is_no_plain_data_is_refused(content):
    with pytest.raises(InputError, match="^b: not one of CIFAR-10's batches"):
        batches.read_batch(content, 10, "b")


BATCH = pickle.loads(batch_files()["data_batch_1"])
BAD_BATCHES = {
    "columns": (
        BATCH | {b"data": np.zeros((4, 3000), np.uint8)},
        r"must be uint8 of shape \(N, 3072\), and is shape "
        r"\(4, 3000\)",
    ),
    "dimensions": (BATCH | {b"data": np.zeros((4, 3, 32, 32), np.uint8)}, r"is shape \(4, 3, 32, 32\)"),
    "no rows": (
        pickle.dumps(BATCH | {b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, 4),
        r"is shape \(0, 3072\)",
    ),
    "dtype": (BATCH | {b"data": np.zeros((4, 3072), np.float32)}, "an array of something else than uint8"),
    "no data": ({b"labels": [1]}, "is missing or no array"),
    "data a list": (BATCH | {b"data": [1, 2]}, "is missing or no array"),
    "labels short": (BATCH | {b"labels": [1, 2, 3]}, "there must be 4 labels, and there is 3 of them"),
    "no labels": ({b"data": BATCH[b"data"]}, "there must be 4 labels, and there is no list"),
    "label 10": (BATCH | {b"labels": [1, 2, 10, 3]}, r"label 2 must be in 0\.\.9, and is 10"),
    "label -1": (BATCH | {b"labels": [-1, 2, 1, 3]}, r"label 0 must be in 0\.\.9, and is -1"),
    "label text": (BATCH | {b"labels": [1, 2, 1, "cat"]}, r"label 3 must be in 0\.\.9, and is no small number \(str\)"),
    "label huge": (BATCH | {b"labels": [1, 2, 1, 10**300]}, "is no small number"),
    "a list": ([1, 2], "must be a dictionary, and is a list"),
    "text": (b"hello", "not one of CIFAR-10's batches"),
    "cut": (batch_files()["data_batch_1"][:-500], "not one of CIFAR-10's batches"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(tmp_path, case):
    content, message = BAD_BATCHES[case]
    refused(write_folder(tmp_path / "b", batch_files(data_batch_2=content)), f"data_batch_2: .*{message}")


BAD_META = {
    "one": ([b"cat"], "must name two classes at least, and names 1"),
    "twice": ([b"cat", b"cat"], "each there once"),
    "control": ([b"cat\n", b"dog"], "printable"),
    "numbers": ([1, 2], "must be a list of names"),
    "none": (None, "must be a list of names"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_bad_label_names(tmp_path, case):
    names, message = BAD_META[case]
    changes = {"batches.meta": {b"label_names": names}}
    refused(write_folder(tmp_path / "b", batch_files(**changes)), f"batches.meta: .*{message}")


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_1", "data_batch_5", "test_batch"])
def test_a_missing_batch(tmp_path, name):
    files = batch_files()
    del files[name]
    refused(write_folder(tmp_path / "b", files), f"b: no {name} beside the other batches")


# Bad input ----------------------------------------------------------------------------------------------------------


def refused(path, message):
    """Assert that `path` is refused with one line that matches, and nothing cached."""
    with pytest.raises(InputError, match=message) as refusal:
        load_images(path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 700
    assert refusal.value.status == 2
    cached = Path(os.environ["CIFAR_FASTAI_CACHE"])
    assert not cached.exists() or not list(cached.iterdir())


def without(files, part):
    return {name: content for name, content in files.items() if part not in name}


TINY = tiny_files()
SMALL = png(pixels_of(0, (28, 30)))
CORRUPT = bytearray(TINY["train/cat/0001.png"])
CORRUPT[1000] ^= 1
JPEG = io.BytesIO()
Image.fromarray(pixels_of(0)).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()

BAD_FILES = {  # of a folder and of an archive alike
    "no test": (without(TINY, "test/"), "no test folder; the images belong in test/<class>/"),
    "no train": (without(TINY, "train/"), "no train folder"),
    "test a file": (without(TINY, "test/") | {"test": b"x"}, "no test folder"),
    "test empty": (without(TINY, "test/") | {"test/": b""}, "no class folders in test"),
    "only in train": (without(TINY, "test/dog"), "class dog is in train and not in test"),
    "only in test": (without(TINY, "train/cat"), "class cat is in test and not in train"),
    "empty class": (without(TINY, "test/dog") | {"test/dog/": b""}, "no png or jpg image in test/dog"),
    "class of text": (without(TINY, "test/dog") | {"test/dog/a.txt": b"x"}, "no png or jpg image in test/dog"),
    "class of hidden": (
        without(TINY, "test/dog") | {"test/dog/": b"", "test/dog/._1.png": b"x"},
        "no png or jpg image",
    ),
    "one class": (without(TINY, "dog"), "only one class, cat; there must be two at least"),
    "no image": (
        TINY | {"train/cat/0001.png": b"not an image"},
        "train/cat/0001.png: cannot be read as an image "
        r"\(neither png nor jpg\)",
    ),
    "empty image": (TINY | {"train/cat/0001.png": b""}, "train/cat/0001.png: cannot be read as an image"),
    "cut png": (
        TINY | {"train/cat/0001.png": TINY["train/cat/0001.png"][:1500]},
        "train/cat/0001.png: cannot be read as an image",
    ),
    "altered png": (TINY | {"train/cat/0001.png": bytes(CORRUPT)}, "train/cat/0001.png: cannot be read as an image"),
    "cut jpeg": (TINY | {"train/cat/a.jpg": JPEG[: len(JPEG) // 2]}, "train/cat/a.jpg: cannot be read as an image"),
    "size": (TINY | {"test/cat/small.png": SMALL}, "test/cat/small.png: 30x28 pixels; every image must be 32x32"),
    "big file": (TINY | {"test/cat/big.png": b"x" * (2**20 + 1)}, r"test/cat/big.png: 1,048,577 bytes, more than"),
    "gif": (TINY | {"test/cat/a.gif": b"x"}, "test/cat/a.gif: neither png nor jpg; convert or remove it"),
    "no class folder": (TINY | {"test/a.png": SMALL}, "test/a.png: images belong in test/<class>/"),
    "deeper": (TINY | {"test/cat/more/a.png": SMALL}, "test/cat/more.*: images belong in test/<class>/"),
    "class name": (TINY | {"train/a\nb/0.png": SMALL}, r"a\\nb.*: a name of control characters"),
    "nothing of use": (
        {"images/a.png": SMALL, "b.txt": b"x"},
        r"neither train and test folders nor CIFAR-10's batches "
        r"\(found: b.txt, images\)",
    ),
    "nothing": ({}, r"\(found: nothing\)"),
    "several": ({**tiny_files(top="a/"), **tiny_files(top="b/")}, r"holds several data sets \(a, b\)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_folder(tmp_path, case):
    files, message = BAD_FILES[case]
    folder = tmp_path / "pets"
    folder.mkdir()
    refused(write_folder(folder, files), message)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_archive(tmp_path, case):
    files, message = BAD_FILES[case]
    refused(write_tar(tmp_path / "pets.tgz", files), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing: not found; give a folder, a .tgz or .tar archive, or auto, cifar10 or digits"),
        ("", "^'': not found"),
        ("a\0b", r"a\\x00b: cannot be read \(embedded null byte\)"),
        ("x" * 5000, r"xxx\.\.\.xxx+: cannot be read \(File name too long\)"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x: not found"),
    ],
)
def test_not_found(name, message):
    refused(name, message)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"hello" * 1000, TINY["train/cat/0000.png"], gzip.compress(b"hello" * 1000), gzip.compress(b"")],
)
def test_not_an_archive(tmp_path, content):
    (tmp_path / "pets.tgz").write_bytes(content)
    refused(tmp_path / "pets.tgz", "pets.tgz: not a tar archive; give a folder, or a .tgz or .tar archive")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("left", [0.3, 0.6, 0.9])
def test_truncated_archive(tmp_path, mode, left):
    content = write_tar(tmp_path / "whole.tar", tiny_files(top="pets/"), mode=mode).read_bytes()
    cut = int(len(content.rstrip(b"\0")) * left)
    (tmp_path / "pets.tar").write_bytes(content[:cut])
    refused(tmp_path / "pets.tar", r"pets.tar: a truncated or damaged archive \(.+\); download or pack it again")


def test_archive_cut_between_two_files(tmp_path):
    write_tar(tmp_path / "whole.tar", TINY, mode="w")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    (tmp_path / "pets.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[: last.offset])
    refused(tmp_path / "pets.tar", r"truncated or damaged archive \(no end marker\)")


def test_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "pets.tar", TINY, mode="w")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content = bytearray(path.read_bytes())
    content[last.offset] ^= 1
    path.write_bytes(content)
    refused(path, r"truncated or damaged archive \(a damaged header\)")


def test_gzip_checksum(tmp_path):
    path = write_tar(tmp_path / "pets.tgz", TINY)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    refused(path, "truncated or damaged archive")


HOSTILE = {
    "absolute": (member("/etc/cron.d/x", b"x"), "/etc/cron.d/x: a name that leads outside the archive"),
    "parent": (member("../../x.png", b"x"), "../../x.png: a name that leads outside"),
    "inner parent": (member("train/cat/../../../x.png", b"x"), "a name that leads outside"),
    "backslash": (member("train\\..\\..\\x.png", b"x"), "a name that leads outside"),
    "drive": (member("C:/x.png", b"x"), "a name that leads outside"),
    "hidden": (member(".hidden/../../x", b"x"), "a name that leads outside"),
    "symlink": (member("train/cat/x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link or special file"),
    "hard link": (member("train/cat/x.png", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "a link or special"),
    "folder link": (member("train/cow", type=tarfile.SYMTYPE, linkname="../.."), "a link or special file"),
    "device": (member("train/cat/x.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a link or special file"),
    "pipe": (member("train/cat/x.png", type=tarfile.FIFOTYPE), "a link or special file"),
    "twice": (member("train/cat/0000.png", TINY["train/cat/0001.png"]), "holds train/cat/0000.png twice"),
    "long name": (member("train/" + "x" * 300 + "/a.png", b"x"), "more than 255"),
    "very long name": (member("train/" + "x" * 100_000, b"x"), "pets.tgz: a header of 100,352 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(tmp_path, case):
    extra, message = HOSTILE[case]
    before = sorted(tmp_path.rglob("*"))
    refused(write_tar(tmp_path / "pets.tgz", TINY, [extra]), message)
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "pets.tgz"]


@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_negative_size_does_not_loop(tmp_path, type_):
    info, _ = member("train/cat/x.png", type=type_)
    info.size = -2048
    hostile = info.tobuf(tarfile.GNU_FORMAT)
    content = write_tar(tmp_path / "a.tar", TINY, mode="w").read_bytes().rstrip(b"\0")
    content += b"\0" * (-len(content) % 512)
    (tmp_path / "pets.tar").write_bytes(content + hostile + b"\0" * 1024)
    refused(tmp_path / "pets.tar", "pets.tar: ")


def test_limits_of_an_archive(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "pets.tgz", TINY)
    monkeypatch.setattr(archives, "MAX_FILES", 9)
    refused(path, "pets.tgz: holds more than 9 files")
    refused(write_folder(tmp_path / "pets", TINY), "pets: holds more than 9 files")
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 3000)
    refused(path, r"train/cat/0000.png: 3,\d+ bytes is more than any file of a data set")


def test_an_archive_that_unpacks_into_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 10 * 2**20)
    bomb = [member(f"zeros{i}", b"\0" * 2**20) for i in range(12)]
    path = write_tar(tmp_path / "pets.tgz", TINY, bomb)
    assert path.stat().st_size < 100_000
    refused(path, "pets.tgz: unpacks into more than")


@pytest.mark.parametrize("side", [10_000, 60_000])
@pytest.mark.filterwarnings("error")
def test_pixel_bomb(tmp_path, side):
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    refused(write_folder(tmp_path / "pets", TINY | {"train/cat/a.png": bomb}), "train/cat/a.png: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_special_files_in_a_folder(tmp_path):
    folder = write_folder(tmp_path / "pets", TINY)
    os.mkfifo(folder / "train/cat/pipe.png")  # reading it would wait for ever
    refused(folder, "pipe.png: not a regular file; remove it")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe: neither a folder nor a file")


def test_links_in_a_folder(tmp_path):
    files = tiny_files()
    plain = load_images(write_folder(tmp_path / "plain", files))
    folder = write_folder(tmp_path / "pets", without(files, "test/"))
    (folder / "test").symlink_to(tmp_path / "plain/test")
    assert load_images(folder).fingerprint == plain.fingerprint
    shutil.rmtree(os.environ["CIFAR_FASTAI_CACHE"])
    (folder / "train/cat/gone.png").symlink_to(tmp_path / "gone")
    refused(folder, r"gone.png: cannot be read \(No such file or directory\); remove it")


def test_half_images_are_refused_whatever_another_library_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(decode.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    refused(write_folder(tmp_path / "pets", BAD_FILES["cut jpeg"][0]), "train/cat/a.jpg: cannot be read as an image")


# Digits, auto, cifar10 ----------------------------------------------------------------------------------------------


def test_digits():
    images = load_images("digits")
    assert (images.name, images.source, images.flip, images.note) == ("digits", "scikit-learn load_digits", 0.0, None)
    assert images.images.shape == (1797, 3, 32, 32) and images.images.dtype == np.uint8
    assert (images.n_train, images.n_test) == (1437, 360) and images.classes == tuple("0123456789")
    assert images.images.max() == 255 and images.images.min() == 0
    shares = [np.bincount(labels, minlength=10) / len(labels) for labels in (images.train_labels, images.test_labels)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005  # stratified
    assert images.fingerprint == load_images("digits").fingerprint
    assert len(set(map(bytes, images.images))) > 1700 and images.labels.dtype == np.int64


def test_digits_are_the_digits_of_their_labels():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    small = images.images[:, 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)  # (1797, 64)
    grey, labels = load_digits(return_X_y=True)
    distance = (small**2).sum(1)[:, None] - 2 * small @ (grey.T * 255 / 16) + ((grey * 255 / 16) ** 2).sum(1)
    nearest = distance.argmin(1)
    assert np.array_equal(labels[nearest], images.labels)
    assert len(set(nearest[:1437]) & set(nearest[1437:])) == 0  # no image in both splits


def test_auto_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(data, "_fastai_copies", no_fastai_copy)
    for name in ("auto", None):
        images = load_images(name)
        assert images.name == "digits"
        assert images.note == (
            "CIFAR-10 cannot be had (download of the test: no network); this is scikit-learn's digits in its place"
        )


def test_cifar10_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(data, "_fastai_copies", no_fastai_copy)
    refused("cifar10", "download of the test: no network")


def test_environment_sets_what_auto_means(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pets", TINY)
    monkeypatch.setenv("CIFAR10_PATH", str(folder))
    assert load_images("auto").name == load_images(None).name == load_images().name == "pets"
    assert load_images("digits").name == "digits"
    monkeypatch.setenv("CIFAR10_PATH", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"gone: not found; .* \(the environment variable CIFAR10_PATH names it\)"):
        load_images()


@pytest.fixture
def fastai_home(tmp_path, monkeypatch):
    """fastai's folders, empty, with a network that is not there; CIFAR-10 has 30 images."""
    external = pytest.importorskip("fastai.data.external")
    monkeypatch.setattr(external, "fastai_path", lambda kind: tmp_path / "fastai" / kind)
    monkeypatch.setattr(external, "untar_data", lambda url: pytest.fail("downloaded"))
    monkeypatch.setattr(data, "_probe", lambda url: "no network")
    monkeypatch.setattr(data, "CIFAR10_SPLITS", (20, 10))
    return tmp_path / "fastai"


def test_fastai_copy(fastai_home, monkeypatch):
    files = tiny_files(CIFAR10_CLASSES, 2, 1, top="cifar10/")
    with pytest.raises(InputError, match="download of https://.*/cifar10.tgz: no network"):
        load_images("cifar10")
    write_folder(fastai_home / "data", files)
    images = load_images("cifar10")
    assert (images.name, images.source, images.note) == ("CIFAR-10", "fastai URLs.CIFAR", None)
    shutil.rmtree(fastai_home)
    assert load_images("auto").fingerprint == images.fingerprint  # out of the cache
    assert load_images("auto").source == "fastai URLs.CIFAR"


def test_fastai_archive_where_the_folder_is_half(fastai_home):
    files = tiny_files(CIFAR10_CLASSES, 2, 1, top="cifar10/")
    write_folder(fastai_home / "data", dict(list(files.items())[:7]))
    with pytest.raises(InputError, match=r"fastai's copy is not the whole of it \(.*no test folder.*\); delete it"):
        load_images("cifar10")
    assert load_images("auto").name == "digits"
    (fastai_home / "archive").mkdir()
    write_tar(fastai_home / "archive/cifar10.tgz", files)
    assert load_images("cifar10").name == "CIFAR-10"


def test_fastai_copy_with_images_missing(fastai_home):
    files = tiny_files(CIFAR10_CLASSES, 2, 1, top="cifar10/")
    files["cifar10/test/cat/0001.png"] = files["cifar10/test/dog/0000.png"]
    write_folder(fastai_home / "data", files)
    for _ in range(2):  # the second time there is something in the cache
        with pytest.raises(InputError, match="cifar10: 20 train and 11 test images"):
            load_images("cifar10")


def test_download(fastai_home, monkeypatch, capsys):
    from fastai.data import external

    def untar_data(url):
        print("a bar that floods a log")
        return write_folder(fastai_home / "data", tiny_files(CIFAR10_CLASSES, 2, 1, top="cifar10/")) / "cifar10"

    monkeypatch.setattr(external, "untar_data", untar_data)
    monkeypatch.setattr(data, "_probe", lambda url: None)
    assert load_images("auto").name == "CIFAR-10"
    assert capsys.readouterr().out == ""


def test_download_that_breaks(fastai_home, monkeypatch):
    from fastai.data import external

    def untar_data(url):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(external, "untar_data", untar_data)
    monkeypatch.setattr(data, "_probe", lambda url: None)
    assert "No space left on device" in load_images("auto").note
    with pytest.raises(InputError, match="No space left on device"):
        load_images("cifar10")


def test_cifar10_that_was_read_from_a_path_serves_auto(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_SPLITS", (20, 4))
    monkeypatch.setattr(data, "_fastai_copies", no_fastai_copy)
    images = load_images(write_tar(tmp_path / "cifar-10-python.tar.gz", batch_files()))
    assert load_images("auto").fingerprint == images.fingerprint
    assert load_images("cifar10").source == str(tmp_path / "cifar-10-python.tar.gz")


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_probe_of_a_host_that_answers(no_proxy):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/there" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert data._probe(f"{url}/there", 5) is None
        assert data._probe(f"{url}/elsewhere", 5) == "Not Found"
        server.shutdown()


def test_probe_of_a_host_that_does_not(no_proxy, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        assert data._probe(url, 0.3) in ("no answer within 0.3 s", "timed out")
        assert time.monotonic() - began < 3
    assert data._probe(url, 5) == "Connection refused"
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *args, **kwargs: time.sleep(5))  # a silent name server
    assert data._probe(url, 0.1) == "no answer within 0.1 s"


# Cache --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", TINY)


@pytest.fixture
def decodings(monkeypatch):
    """A list that grows by each decoding."""
    done = []

    def counted(source, progress):
        done.append(source.path)
        return decode.decode(source, progress)

    monkeypatch.setattr(data, "decode", counted)
    return done


def same(a, b):
    return (
        np.array_equal(a.images, b.images)
        and np.array_equal(a.labels, b.labels)
        and all(
            getattr(a, name) == getattr(b, name)
            for name in ("name", "classes", "n_train", "mean", "std", "fingerprint", "note")
        )
    )


def test_second_start_decodes_nothing(tmp_path, pets, decodings):
    packed = write_tar(tmp_path / "pets.tgz", TINY), write_tar(tmp_path / "top.tgz", tiny_files(top="cats/"))
    for path in (pets, *packed):
        first = load_images(path)
        n = len(decodings)
        assert same(load_images(path), first) and len(decodings) == n


def test_a_renamed_archive_has_its_new_name(tmp_path, decodings):
    path = write_tar(tmp_path / "pets.tgz", TINY)
    assert load_images(path).name == "pets"
    assert load_images(path.rename(tmp_path / "my.cows.tar.gz")).name == "my.cows"
    assert len(decodings) == 1


def test_changed_source_is_decoded_again(tmp_path, pets, decodings):
    load_images(pets)
    file = pets / "train/cat/0000.png"
    times = file.stat()
    changed = bytearray(file.read_bytes())
    changed[:] = png(pixels_of(77))
    assert len(changed) == times.st_size
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same date
    assert np.array_equal(load_images(pets).images[0], pixels_of(77).transpose(2, 0, 1)) and len(decodings) == 2
    (pets / "train/cat/0000.png").unlink()
    assert load_images(pets).n_train == 5 and len(decodings) == 3
    archive = write_tar(tmp_path / "pets.tgz", TINY)
    assert load_images(archive).n_train == 6
    assert load_images(write_tar(archive, without(TINY, "0002"))).n_train == 4


def edit(name, change):
    def damage(home):
        file = home / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def flip(at):
    def change(content):
        content = bytearray(content)
        content[at] ^= 0x10
        return content

    return change


def save_other(name, array):
    return lambda home: np.save(home / name, array)


def altered_about(home):
    wrapped = json.loads((home / "about.json").read_text())
    about = json.loads(wrapped["about"]) | {"mean": [0.1, 0.2, 0.3]}
    (home / "about.json").write_text(json.dumps(wrapped | {"about": json.dumps(about)}))


def in_place_of_the_folder(home):
    shutil.rmtree(home)
    home.write_bytes(b"x")


DAMAGES = {
    "images cut": edit("images.npy", lambda content: content[:5000]),
    "images empty": edit("images.npy", lambda content: b""),
    "images byte": edit("images.npy", flip(9000)),
    "images header": edit("images.npy", flip(20)),
    "images wrong shape": save_other("images.npy", np.zeros((10, 3, 16, 64), np.uint8)),
    "images wrong dtype": save_other("images.npy", np.zeros((10, 3, 32, 32), np.int8)),
    "images of objects": save_other("images.npy", np.array([None] * 10)),
    "images too many": edit("images.npy", lambda content: content.replace(b"(10,", b"(99,")),
    "labels byte": edit("labels.npy", flip(-8)),
    "labels gone": lambda home: (home / "labels.npy").unlink(),
    "about gone": lambda home: (home / "about.json").unlink(),
    "about empty": edit("about.json", lambda content: b""),
    "about a list": edit("about.json", lambda content: b"[1]"),
    "about byte": edit("about.json", flip(40)),
    "about altered": altered_about,
    "folder empty": lambda home: [file.unlink() for file in home.iterdir()],
    "a file": in_place_of_the_folder,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_cache_is_rebuilt(pets, own_cache, decodings, case):
    first = load_images(pets)
    [home] = own_cache.iterdir()
    DAMAGES[case](home)
    assert same(load_images(pets), first) and len(decodings) == 2
    assert same(load_images(pets), first) and len(decodings) == 2
    assert home.is_dir() and {file.name for file in home.iterdir()} == {"images.npy", "labels.npy", "about.json"}


def test_cache_of_another_source_is_found_out(tmp_path, pets, own_cache, decodings):
    load_images(pets)
    [home] = own_cache.iterdir()
    other = write_folder(tmp_path / "cows", tiny_files(("cow", "ox"), 2, 1))
    load_images(other)
    [cows] = [folder for folder in own_cache.iterdir() if folder != home]
    shutil.rmtree(home)
    shutil.copytree(cows, home)
    assert load_images(pets).classes == CLASSES and len(decodings) == 3


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "about.json"])
def test_an_interrupt_while_storing_leaves_nothing(pets, own_cache, monkeypatch, name):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    real = np.save
    monkeypatch.setattr(np, "save", lambda path, array: interrupted() if path.name == name else real(path, array))
    if name == "about.json":
        monkeypatch.setattr(cache.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(pets)
    assert list(own_cache.iterdir()) == []


def test_what_was_left_by_a_killed_process_is_swept(pets, own_cache):
    old, new = own_cache / ".1.tmp", own_cache / ".2.tmp"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    load_images(pets)
    assert not old.exists() and new.exists()


def test_unwritable_cache_costs_a_note(tmp_path, pets):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "cache"
    images = load_images(pets, cache_dir=folder)
    assert images.n_train == 6 and images.note.startswith(f"{folder}: decoded images cannot be kept there (")
    assert "Not a directory" in images.note and images.note.isprintable()


def test_full_disk_costs_a_note(pets, own_cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert "No space left on device" in load_images(pets).note
    assert list(own_cache.iterdir()) == []


def test_images_outlive_their_cache(pets, own_cache):
    load_images(pets)
    images = load_images(pets)
    before = images.images.copy()
    for file in own_cache.rglob("*.npy"):
        file.write_bytes(b"")
    shutil.rmtree(own_cache)
    assert np.array_equal(images.images, before)


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_at_once(pets, own_cache, damaged):
    fingerprint = load_images(pets).fingerprint
    [home] = own_cache.iterdir()
    if damaged:
        (home / "images.npy").write_bytes(b"")
    else:
        shutil.rmtree(own_cache)
    script = f"from cifar_fastai import load_images; i = load_images({str(pets)!r}); print(i.fingerprint, i.note)"
    processes = [
        subprocess.Popen([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(4)
    ]
    assert [process.communicate(timeout=120)[0].split() for process in processes] == [[fingerprint, "None"]] * 4
    assert list(own_cache.iterdir()) == [home]


def test_threads_at_once(pets, own_cache):
    """Many readers and rebuilders of one entry: each ends with the whole set, and a whole entry stays."""
    first, results = load_images(pets), []
    [home] = own_cache.iterdir()

    def work():
        for _ in range(10):
            shutil.rmtree(home, ignore_errors=True)
            results.append(same(load_images(pets), first))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40
    assert same(load_images(pets), first)
    assert not list(own_cache.glob(".*"))


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/cifar_fastai"),
        ("linux", {}, "~/.cache/cifar_fastai"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/cifar_fastai"),
        ("win32", {"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/x"}, "/local/cifar_fastai"),
        ("linux", {"CIFAR_FASTAI_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, "/own"),
    ],
)
def test_cache_folder(monkeypatch, platform, environment, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "CIFAR_FASTAI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert cache.cache_folder() == Path(expected).expanduser()


# And the rest -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]


def test_progress_on_a_terminal_only(pets, monkeypatch, capsys):
    load_images(pets)
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(os.environ["CIFAR_FASTAI_CACHE"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_images(pets)
    out, err = capsys.readouterr()
    assert out == "" and "decoding images [" in err and err.endswith("\r\033[K")
    shutil.rmtree(os.environ["CIFAR_FASTAI_CACHE"])
    load_images(pets, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_notebook_is_a_bar_of_fastprogress(pets, monkeypatch, capsys):
    shown = []

    def bar(items, **about):
        shown.append(about)
        return items

    with monkeypatch.context() as patch:
        patch.setattr("cifar_fastai.data.decode.in_notebook", lambda: True)
        patch.setattr("fastprogress.progress_bar", bar)
        images = load_images(pets)
    assert shown == [dict(total=len(images.images), leave=False, comment="decoding images")]
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(os.environ["CIFAR_FASTAI_CACHE"])
    assert same(images, load_images(pets))


def test_importing_it_is_light():
    heavy = "{'torch', 'fastai', 'sklearn', 'matplotlib'}"
    script = f"import sys, cifar_fastai.data.images; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, cwd=ROOT, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("\n", "", 0)


REAL = os.environ.get("CIFAR10_PATH")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="CIFAR10_PATH does not name a copy of CIFAR-10")
def test_real_cifar10(tmp_path):
    images = load_images(REAL)
    assert images.name in ("CIFAR-10", "CIFAR-10 (JPEG copy)") and images.note is None
    assert (images.n_train, images.n_test, images.classes) == (50_000, 10_000, CIFAR10_CLASSES)
    assert np.bincount(images.train_labels).tolist() == [5000] * 10
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    mean, std = decode.channel_statistics(images.train_images)
    assert np.allclose(mean, CIFAR10_MEAN, atol=0.003) and np.allclose(std, CIFAR10_STD, atol=0.006)
    took = []
    for _ in range(5):  # the best of them: another process may have the disk or the cores
        began = time.monotonic()
        again = load_images(REAL)
        took.append(time.monotonic() - began)
        assert same(again, images)
    assert min(took) < 1
