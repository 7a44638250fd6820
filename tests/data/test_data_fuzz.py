"""Mutated archives and batches: always a clean error or a correct image set, and no file outside the cache."""

import gzip
import io
import pickle
import string
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tiny_data import encoded, member, random_pixels, tiny_files, write_folder, write_tar

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cifar_fastai.data import official
from cifar_fastai.data.images import load_images
from cifar_fastai.data.sources import BATCH_FILES
from cifar_fastai.errors import InputError

BOUNDED = settings(max_examples=50, suppress_health_check=list(HealthCheck))


FILES = tiny_files(n_train=2, top="pets/")
ORIGINALS = {random_pixels(seed).transpose(2, 0, 1).tobytes() for seed in range(len(FILES))}
with tempfile.TemporaryDirectory() as folder:
    TAR = write_tar(Path(folder) / "pets.tar", FILES, mode="w").read_bytes()
OPEN_TAR = TAR.rstrip(b"\0") + bytes(-len(TAR.rstrip(b"\0")) % 512)  # without its end
ROW = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
BATCH = {b"data": ROW, b"labels": [0, 1], b"filenames": [b"a.png", b"b.png"], b"batch_label": b"one"}
META = pickle.dumps({b"label_names": [b"cat", b"dog"]}, 2)

kinds = st.sampled_from(["flip", "cut", "drop", "double", "insert", "zero"])
places, lengths = st.floats(0, 1, exclude_max=True), st.integers(1, 600)
mutations = st.lists(st.tuples(kinds, places, lengths, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def mutated(content, changes):
    content = bytearray(content)
    for kind, where, length, new in changes:
        at = int(where * len(content))
        part = content[at : at + length]
        if kind == "flip" and content:
            content[at] ^= 1 << length % 8
        elif kind != "flip":
            parts = {"drop": b"", "double": part + part, "insert": new + part, "zero": bytes(len(part))}
            content[at : None if kind == "cut" else at + length] = parts.get(kind, b"")
    return bytes(content)


def clean_error_or_correct(make):
    """Load what `make(folder)` wrote there; return the ImageSet, or None where it was refused."""
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        inside, cache = root / "inside", root / "cache"
        inside.mkdir()
        path = make(inside)
        before = {file: file.read_bytes() for file in inside.rglob("*") if file.is_file()}
        try:
            images = load_images(path, cache_dir=cache)
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 1500 and not list(cache.glob("*"))
            images = None
        else:
            consistent(images)
            again = load_images(path, cache_dir=cache)
            assert again.fingerprint == images.fingerprint and np.array_equal(again.images, images.images)
        assert {file: file.read_bytes() for file in inside.rglob("*") if file.is_file()} == before
        assert {file.name for file in root.iterdir()} <= {"inside", "cache"}
        return images


def consistent(images):
    n = len(images.images)
    assert images.images.shape == (n, 3, 32, 32) and images.images.dtype == np.uint8
    assert images.labels.shape == (n,) and images.labels.dtype == np.int64
    assert 0 <= images.labels.min() and images.labels.max() < len(images.classes)
    assert 0 < images.n_train < n and list(images.classes) == sorted(set(images.classes))
    assert all(name.isprintable() for name in (*images.classes, images.name))


def written(content):
    def make(folder):
        (folder / "pets.tgz").write_bytes(content)
        return folder / "pets.tgz"

    return make


@BOUNDED
@given(mutations, st.booleans())
def test_mutated_archive(changes, packed):
    content = mutated(gzip.compress(TAR, 1, mtime=0) if packed else TAR, changes)
    images = clean_error_or_correct(written(content))
    if images is not None:  # PNG and gzip have checksums: what is read is what was packed
        pixels = set(map(bytes, images.images))
        assert pixels == ORIGINALS if packed else pixels <= ORIGINALS


NAMES = """../x.png /x.png pets/../../x.png pets/train/cat/x.png pets/train/cat pets pets/train/<b>/x.png .
    pets/test/cat/0.png pets/train/cat/x\x01.png pets//train C:\\x.png pets/train/cat/x/y.png other/train/cat/x.png
    pets/train/\udcff/x.png""".split()
PARTS = ["pets", "train", "test", "cat", "cow", "..", ".", "a.png", "é", "x" * 120]
names = st.one_of(
    st.sampled_from(["", *NAMES]),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("/".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
types = st.sampled_from([bytes([kind]) for kind in b"0\x001234567SLKxgXZ"])
sizes = st.one_of(st.integers(0, 2000), st.sampled_from([-1, -512, -(2**40), 2**31, 2**40, 2**62]))


@BOUNDED
@given(st.lists(st.tuples(names, types, sizes, names, st.booleans()), min_size=1, max_size=4), st.booleans())
@example([("pets/train/cat/x.png", tarfile.XHDTYPE, -1024, "", False)], False)
@example([("pets/train/cat/x.png", tarfile.REGTYPE, 2**62, "", False)], True)
@example([("x", tarfile.XHDTYPE, 512, "", False)] * 4, False)
@example([(".", tarfile.REGTYPE, 0, "", True)], True)
def test_hostile_members(members, first):
    content = b""
    for name, kind, size, link, honest in members:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, size, link
        body = encoded(random_pixels(5)) if honest else b"20 path=../../x.png\n"
        if honest:
            info.size = len(body)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        content += header + body + bytes(-len(body) % 512)
    clean_error_or_correct(written(content + TAR if first else OPEN_TAR + content + bytes(1024)))


SPARSE = [f"GNU.sparse.{name}" for name in ("map", "size", "major", "minor", "name", "realsize")]
VALUES = ["1", "0", "-1", "-512", "1e9", "nan", "0,5", "BINARY", "../x.png", "99999999999999"]
pax = st.dictionaries(
    st.sampled_from(["path", "size", "linkpath", "mtime", "hdrcharset", *SPARSE]),
    st.one_of(st.sampled_from(VALUES), st.text(string.printable, max_size=10)),
    max_size=4,
)


@BOUNDED
@given(pax)
def test_hostile_pax_headers(headers):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in FILES.items():
            info, _ = member(name, content)
            if name.endswith("train/cat/1.png"):
                info.pax_headers = headers
            tar.addfile(info, io.BytesIO(content))
    clean_error_or_correct(written(file.getvalue()))


@BOUNDED
@given(mutations, st.sampled_from(sorted(FILES)))
def test_mutated_image(changes, name):
    files = FILES | {name: mutated(FILES[name], changes)}
    clean_error_or_correct(lambda folder: write_folder(folder / "outer", files))


@BOUNDED
@given(st.sampled_from(["data_batch_1", "test_batch", "batches.meta"]), mutations, st.integers(0, 5))
def test_mutated_batches(name, changes, protocol):
    files = dict.fromkeys(BATCH_FILES, pickle.dumps(BATCH, protocol)) | {"batches.meta": META}
    files[name] = mutated(files[name], changes)
    images = clean_error_or_correct(lambda folder: write_folder(folder / "batches", files))
    if images is not None:
        assert len(images.images) >= 10


integers = st.integers(-(2**31) + 1, 2**31 - 1)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, st.floats(), st.text(), st.binary(min_size=1)),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner),
    ),
    max_leaves=20,
)


@BOUNDED
@given(values, st.integers(0, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_batches_are_read_as_pickle_reads_them(value, protocol, n, fortran, as_text):
    """Whatever else they hold; a value that numpy or pickle repeats is repeated here."""
    data = np.arange(n * 3072).astype(np.uint8).reshape(n, 3072)
    batch = {b"data": np.asfortranarray(data) if fortran else data, b"labels": list(range(n)), b"more": [value, value]}
    batch = {key.decode() if as_text else key: value for key, value in batch.items()}
    try:
        images, labels = official.read_batch(pickle.dumps(batch, protocol), "b", labels=n)
    except InputError as error:
        assert "parts used again" in str(error) or "more than 32 bits" in str(error)
    else:
        assert np.array_equal(images.reshape(n, 3072), data) and labels.tolist() == list(range(n))
