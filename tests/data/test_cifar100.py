"""CIFAR-100, generated in the official format: fine and coarse labels, by path, from the cache and from a mirror."""

import hashlib
import pickle

import numpy as np
import pytest
from tiny_data import cifar100_files, refused, write_folder, write_tar

from cifar_fastai.data import decode, download
from cifar_fastai.data.images import channel_statistics, load_images
from cifar_fastai.errors import InputError

FILES = cifar100_files()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive whose files pass for the official ones; no mirror can be reached."""
    monkeypatch.setattr(decode, "CIFAR100_MD5", {name: hashlib.md5(FILES[name]).hexdigest() for name in FILES})
    monkeypatch.setitem(download.MIRRORS, "cifar100", ("http://127.0.0.1:9/cifar-100-python.tar.gz",))
    on_top = {f"cifar-100-python/{name}": content for name, content in FILES.items()}
    return write_tar(tmp_path / "c100.tar.gz", on_top | {"cifar-100-python/file.txt~": b""})


def test_fine_and_coarse_labels(archive):
    """As pickle reads them."""
    fine = load_images(archive)
    train, test, meta = (pickle.loads(FILES[name], encoding="bytes") for name in ("train", "test", "meta"))
    assert np.array_equal(fine.images.reshape(-1, 3072), np.concatenate([train[b"data"], test[b"data"]]))
    assert fine.labels.tolist() == train[b"fine_labels"] + test[b"fine_labels"]
    assert (fine.name, fine.classes) == ("CIFAR-100", tuple(meta[b"fine_label_names"]))
    assert (fine.n_train, fine.n_test, fine.source, fine.flip) == (300, 150, str(archive), 0.5)
    assert (fine.mean, fine.std) == channel_statistics(fine.train_images)
    assert load_images("cifar100").fingerprint == fine.fingerprint  # from the cache
    coarse = load_images("cifar100-coarse")
    assert (coarse.name, coarse.classes) == ("CIFAR-100 (coarse)", tuple(meta[b"coarse_label_names"]))
    assert coarse.labels.tolist() == train[b"coarse_labels"] + test[b"coarse_labels"]
    assert np.array_equal(coarse.images, fine.images) and coarse.source == fine.source


def test_names_in_another_order(tmp_path):
    """Labels follow their names; other files than the official ones are called by their folder."""
    meta = pickle.loads(FILES["meta"])
    turned = pickle.dumps({key: names[::-1] for key, names in meta.items()}, 2)
    plain = load_images(write_folder(tmp_path / "a", FILES))
    other = load_images(write_folder(tmp_path / "b", FILES | {"meta": turned}))
    assert (plain.name, other.name) == ("a", "b") and plain.classes == other.classes
    assert other.labels.tolist() == [99 - label for label in plain.labels]
    supers = dict(zip(other.classes, other.coarse, strict=True))
    assert supers["class03"] == f"super{19 - 7 * 96 % 20:02}" and plain.coarse[3] == "super01"


def test_from_a_mirror(archive, monkeypatch):
    with pytest.raises(InputError, match="^CIFAR-100 is not available: .*127.0.0.1:9/cifar-100.*Connection refused"):
        load_images("cifar100")
    monkeypatch.setenv("CIFAR100_URL", archive.as_uri())
    assert load_images("cifar100-coarse").source == archive.as_uri()
    monkeypatch.setattr(decode, "CIFAR100_MD5", dict.fromkeys(FILES, "0" * 32))
    with pytest.raises(InputError, match="300 train and 150 test images, but not CIFAR-100's"):
        load_images("cifar100", cache_dir=archive.parent / "empty")


TRAIN = pickle.loads(FILES["train"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({b"fine_labels": [100, *TRAIN[b"fine_labels"][1:]]}, r"fine_labels must be a list of 300 numbers in 0\.\.99"),
        ({b"coarse_labels": None}, r"coarse_labels must be a list of 300 numbers in 0\.\.19"),
        ({b"coarse_labels": [3, *TRAIN[b"coarse_labels"][1:]]}, "a class with two superclasses"),
        ({b"data": TRAIN[b"data"][:, :100]}, r"must be of shape \(N, 3072\)"),
    ],
)
def test_damaged_files(tmp_path, changes, message):
    refused(write_folder(tmp_path / "c", FILES | {"train": pickle.dumps(TRAIN | changes, 2)}), message)
