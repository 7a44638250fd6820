"""The official batches: read as pickle reads them, and no pickle of a stranger's runs or fills the memory."""

import os
import pickle
import resource
import struct

import numpy as np
import pytest
from tiny_data import batch_files, refused, write_folder, write_tar

from cifar_fastai.data import images, official
from cifar_fastai.data.images import CIFAR10_CLASSES, load_images
from cifar_fastai.data.sources import BATCH_FILES
from cifar_fastai.errors import InputError

BATCH = pickle.loads(batch_files()["data_batch_1"])


def python2_batch(pixels, labels):
    """A batch as Python 2's cPickle wrote the official ones (protocol 2, 8-bit strings)."""

    def string(text):
        return b"U" + bytes([len(text)]) + text

    data = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85" + string(b"b") + b"\x87R"
        b"(K\x01M"
        + struct.pack("<H", len(pixels))
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\x03"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x00(" + string(b"data") + array + string(b"labels") + numbers + b"u."


@pytest.mark.parametrize("protocol", range(6))
def test_batches(tmp_path, protocol):
    files = batch_files(protocol=protocol)
    loaded = load_images(write_folder(tmp_path / "cifar-10-batches-py", files))
    assert loaded.name == "cifar-10-batches-py" and loaded.classes == CIFAR10_CLASSES and loaded.n_train == 20
    plain = [pickle.loads(files[name], encoding="bytes") for name in BATCH_FILES[1:]]
    assert np.array_equal(loaded.images.reshape(-1, 3072), np.concatenate([part[b"data"] for part in plain]))
    assert loaded.labels.tolist() == sum((part[b"labels"] for part in plain), [])
    on_top = {f"cifar-10-batches-py/{name}": content for name, content in files.items()}
    assert load_images(write_tar(tmp_path / "a.tar.gz", on_top)).fingerprint == loaded.fingerprint


def test_batches_by_python_2():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (300, 3072), dtype=np.uint8), rng.integers(0, 10, 300).tolist()
    content = python2_batch(pixels, labels)
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels)  # the test's own batch is a pickle
    rows, read_labels = official.read_batch(content, "data_batch_1", labels=10)
    assert np.array_equal(rows, pixels.reshape(-1, 3, 32, 32)) and read_labels.tolist() == labels


@pytest.mark.parametrize("backwards", [False, True])
def test_batches_name_cifar10_whatever_the_order_of_their_classes(tmp_path, monkeypatch, backwards):
    monkeypatch.setattr(images, "CIFAR10_SPLITS", (20, 4))
    monkeypatch.setattr(images, "in_official_order", lambda images, labels: (images, labels, True))
    files = batch_files(names=CIFAR10_CLASSES[::-1] if backwards else CIFAR10_CLASSES)
    loaded = load_images(write_folder(tmp_path / "b", files))
    first = pickle.loads(files["data_batch_1"])[b"labels"]
    assert loaded.name == "CIFAR-10" and loaded.classes == CIFAR10_CLASSES
    assert loaded.labels[:4].tolist() == [9 - label if backwards else label for label in first]


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo ran > '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("file", ["batches.meta", "test_batch"])
def test_a_planted_pickle_is_refused_and_not_run(tmp_path, protocol, file):
    marker = tmp_path / "ran"
    content = pickle.dumps({b"data": Planted(marker), b"labels": [1], b"label_names": Planted(marker)}, protocol)
    folder = write_folder(tmp_path / "b", batch_files(**{file: content}))
    refused(folder, rf"{file}: not one of CIFAR's batches \(it asks for \S+ system")
    assert not marker.exists()
    pickle.loads(content)  # it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["__builtin__ eval", "numpy load", "numpy.core.multiarray scalar", "cifar_fastai.data.cache store"]
)
def test_nothing_but_arrays_is_provided(name):
    with pytest.raises(InputError, match=f"it asks for {name}"):
        official.read_batch(f"c{name.replace(' ', chr(10))}\n(S'1'\ntR.".encode(), "b", labels=10)


def doubled_tuples(n, before=b""):
    """A dictionary whose key holds 2 ** `n` tuples, each of which is the same tuple twice."""
    return b"\x80\x02})" + b"".join(before + b"q%ch%ch%c\x86" % (i, i, i) for i in range(n)) + b"Ns."


def string_many_times(n):
    """A dictionary whose `n` values are one string of 4 MB, turned into bytes."""
    start = b"\x80\x02X" + struct.pack("<I", 2**22) + b"x" * 2**22 + b"q\x000}"
    return start + b"".join(b"K%cc_codecs\nencode\n(h\x00U\x06latin1tRs" % (i % 256) for i in range(n)) + b"."


STRANGE = {
    "int64": pickle.dumps({b"data": np.zeros(3, np.int64), b"labels": []}),
    "objects": pickle.dumps({b"data": np.array([None]), b"labels": []}),
    "a number": pickle.dumps(1.5),
    "a set": pickle.dumps({1, 2}),
    "a tuple for a key": pickle.dumps({(1, 2): 3}),
    "memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo in text": b"Np2000000000\n.",
    "bytearray of exabytes": b"\x80\x05\x96" + b"\xff" * 8 + b".",
    "huge integers": b"\x80\x02}" + b"".join(b"\x8a\x09" + bytes(8) + b"%cNs" % i for i in range(1, 9)) + b".",
    "deep tuples": b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.",
    "doubled tuples": doubled_tuples(60),
    "doubled by DUP": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "doubled behind a pop": doubled_tuples(60, before=b"X\0\0\0\x000"),
    "strings": string_many_times(2000),
    **{
        str(content): content
        for content in [
            b"",
            b".",
            b"\x80\x02",
            b"\x80\x02}",
            b"N}b.",
            b"]]b.",
            b"\x85.",
            b"e.",
            b"(cnumpy\nndarray\n(tR.",
            b"cnumpy\nndarray\nN}b.",
            b"}(K\x01u.",
            b"h\x05.",
        ]
    },
}


@pytest.mark.parametrize("case", STRANGE)
def test_other_pickles_are_refused_and_fill_no_memory(case):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="^b: not one of CIFAR's batches") as refusal:
        official.read_batch(STRANGE[case], "b", labels=10)
    assert str(refusal.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # 512 MB


LABELS = r"its labels must be a list of 4 numbers in 0\.\.9"
BAD_LABELS = (None, [1, 2, 3], [1, 2, 10, 3], [-1, 2, 1, 3], [1, 2, 1, "cat"])
ZEROS = np.zeros((4, 3072), np.uint8)
BAD_BATCHES = {
    "columns": (BATCH | {b"data": ZEROS[:, :3000]}, r"must be of shape \(N, 3072\), and is \(4, 3000\)"),
    "dimensions": (BATCH | {b"data": ZEROS.reshape(4, 3, 32, 32)}, r"and is \(4, 3, 32, 32\)"),
    "no rows": (pickle.dumps(BATCH | {b"data": ZEROS[:0], b"labels": []}, 4), r"and is \(0, 3072\)"),
    "dtype": (BATCH | {b"data": ZEROS.astype(np.float32)}, "an array of another type than uint8"),
    "no data": ({b"labels": [1]}, "its data are no array"),
    "data a list": (BATCH | {b"data": [1, 2]}, "its data are no array"),
    **{f"labels {labels}": (BATCH | {b"labels": labels}, LABELS) for labels in BAD_LABELS},
    "label huge": (BATCH | {b"labels": [1, 2, 1, 10**300]}, "integers of more than 32 bits"),
    "a list": ([1, 2], "no dictionary"),
    "cut": (batch_files()["data_batch_1"][:-500], "not one of CIFAR's batches"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(tmp_path, case):
    content, message = BAD_BATCHES[case]
    refused(write_folder(tmp_path / "b", batch_files(data_batch_2=content)), f"data_batch_2: .*{message}")


@pytest.mark.parametrize("names", [[b"cat"], [b"cat", b"cat"], [b"cat\n", b"dog"], [b"", b"x"], [b"x" * 256, b"y"]])
def test_bad_label_names(tmp_path, names):
    changes = {"batches.meta": {b"label_names": names}}
    refused(write_folder(tmp_path / "b", batch_files(**changes)), "batches.meta: not one of CIFAR's batches")


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_5", "test_batch"])
def test_a_missing_batch(tmp_path, name):
    files = batch_files()
    del files[name]
    refused(write_folder(tmp_path / "b", files), f"b: no {name} beside the other batches")
