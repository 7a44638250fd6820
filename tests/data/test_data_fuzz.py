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

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_fastai.data import official as batches
from cifar_fastai.data.images import ImageSet, load_images
from cifar_fastai.errors import InputError

BOUNDED = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def packed(files):
    """(TarInfo, content) pairs -> the bytes of a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in files:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def member(name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


FILES = {
    f"pets/{split}/{name}/{i}.png": png(10 * len(split) + 2 * (name == "cat") + i)
    for split in ("train", "test")
    for name in ("cat", "dog")
    for i in range(2)
}
TAR = packed(member(*file) for file in FILES.items())
OPEN_TAR = TAR.rstrip(b"\0") + bytes(-len(TAR.rstrip(b"\0")) % 512)  # without its end
ROW = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
BATCH = {b"data": ROW, b"labels": [0, 1], b"filenames": [b"a.png", b"b.png"], b"batch_label": b"one"}
META = pickle.dumps({b"label_names": [b"cat", b"dog"]}, 2)

mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "double", "insert", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 600),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content, changes):
    content = bytearray(content)
    for kind, where, length, new in changes:
        at = int(where * len(content))
        if kind == "flip" and content:
            content[at] ^= 1 << length % 8
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = new
        elif kind == "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
    return bytes(content)


def clean_error_or_correct(make):
    """Load what `make(folder)` wrote there; return the ImageSet, or None where it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inside = folder / "inside"
        inside.mkdir()
        path = make(inside)
        before = {file: file.read_bytes() for file in inside.rglob("*") if file.is_file()}
        try:
            images = load_images(path, cache_dir=folder / "cache")
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 1500
            assert not list(folder.glob("cache/*"))
            images = None
        else:
            consistent(images)
            again = load_images(path, cache_dir=folder / "cache")
            assert again.fingerprint == images.fingerprint and np.array_equal(again.images, images.images)
        assert {file: file.read_bytes() for file in inside.rglob("*") if file.is_file()} == before
        assert {file.name for file in folder.iterdir()} <= {"inside", "cache"}
        return images


def consistent(images):
    assert isinstance(images, ImageSet)
    n = len(images.images)
    assert images.images.shape == (n, 3, 32, 32) and images.images.dtype == np.uint8
    assert images.labels.shape == (n,) and images.labels.dtype == np.int64
    assert 0 <= images.labels.min() and images.labels.max() < len(images.classes)
    assert 0 < images.n_train < n and list(images.classes) == sorted(set(images.classes))
    assert all(name.isprintable() for name in (*images.classes, images.name))


def originals():
    return {np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).tobytes() for content in FILES.values()}


def written(content, name="pets.tgz"):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


@BOUNDED
@given(mutations)
def test_mutated_tar(changes):
    images = clean_error_or_correct(written(mutated(TAR, changes), "pets.tar"))
    if images is not None:  # PNG has checksums: what is read is what was packed
        assert set(map(bytes, images.images)) <= originals()


@BOUNDED
@given(mutations)
def test_mutated_tar_in_whole_gzip(changes):
    clean_error_or_correct(written(gzip.compress(mutated(TAR, changes), 1)))


@BOUNDED
@given(mutations)
def test_mutated_gzip(changes):
    images = clean_error_or_correct(written(mutated(gzip.compress(TAR, 1, mtime=0), changes)))
    if images is not None:  # gzip has a checksum of the whole
        assert set(map(bytes, images.images)) == originals()


names = st.one_of(
    st.sampled_from(
        [
            "../x.png",
            "/x.png",
            "pets/../../x.png",
            "pets/train/cat/x.png",
            "pets/train/cat",
            "pets",
            "pets/train/<b>/x.png",
            "pets/test/cat/0.png",
            ".",
            "",
            "pets/train/cat/x\n.png",
            "pets//train",
            "C:\\x.png",
            "pets/train/cat/x/y.png",
            "other/train/cat/x.png",
            "pets/train/\udcff/x.png",
        ]
    ),
    st.lists(
        st.sampled_from(["pets", "train", "test", "cat", "cow", "..", ".", "a.png", "é", "x" * 120]),
        min_size=1,
        max_size=6,
    ).map("/".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
types = st.sampled_from(
    [
        tarfile.REGTYPE,
        tarfile.AREGTYPE,
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        b"Z",
    ]
)
sizes = st.one_of(st.integers(0, 2000), st.sampled_from([-1, -512, -(2**40), 2**31, 2**40, 2**62]))


@BOUNDED
@given(st.lists(st.tuples(names, types, sizes, names, st.booleans()), min_size=1, max_size=4), st.booleans())
@example([("pets/train/cat/x.png", tarfile.XHDTYPE, -1024, "", False)], False)
@example([("pets/train/cat/x.png", tarfile.REGTYPE, 2**62, "", False)], True)
@example([("x", tarfile.XHDTYPE, 512, "", False)] * 4, False)
def test_hostile_members(members, first):
    content = b""
    for name, kind, size, link, honest in members:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, size, link
        body = png(5) if honest else b"20 path=../../x.png\n"
        if honest:
            info.size = len(body)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        content += header + body + bytes(-len(body) % 512)
    clean_error_or_correct(written(content + TAR if first else OPEN_TAR + content + bytes(1024), "pets.tar"))


pax = st.dictionaries(
    st.sampled_from(
        [
            "path",
            "size",
            "linkpath",
            "GNU.sparse.map",
            "GNU.sparse.size",
            "GNU.sparse.major",
            "GNU.sparse.minor",
            "GNU.sparse.name",
            "GNU.sparse.realsize",
            "mtime",
            "hdrcharset",
        ]
    ),
    st.one_of(
        st.sampled_from(["1", "0", "-1", "-512", "1e9", "nan", "0,5", "BINARY", "../x.png", "99999999999999"]),
        st.text(string.printable, max_size=10),
    ),
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
    clean_error_or_correct(written(file.getvalue(), "pets.tar"))


@BOUNDED
@given(mutations, st.sampled_from(sorted(FILES)))
def test_mutated_image(changes, name):
    content = mutated(FILES[name], changes)

    def make(folder):
        for file, whole in FILES.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content if file == name else whole)
        return folder

    clean_error_or_correct(make)


@BOUNDED
@given(st.sampled_from(["data_batch_1", "test_batch", "batches.meta"]), mutations, st.integers(0, 5))
def test_mutated_batches(name, changes, protocol):
    files = dict.fromkeys((*batches.TRAIN_BATCHES, batches.TEST_BATCH), pickle.dumps(BATCH, protocol))
    files["batches.meta"] = META
    files[name] = mutated(files[name], changes)

    def make(folder):
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    images = clean_error_or_correct(make)
    if images is not None:
        assert len(images.images) >= 10


@BOUNDED
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_random_pickles(head, tail):
    with pytest.raises(InputError):
        batches.read_batch(head + pickle.dumps({}, 2)[:-1] + tail, 10, "b")


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**500), 2**500), st.text(), st.binary(min_size=1)),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.one_of(st.text(), st.binary(min_size=1)), inner)
    ),
    max_leaves=20,
)


@BOUNDED
@given(plain, st.integers(0, 5))
def test_plain_data_are_read_as_pickle_reads_them(value, protocol):
    content = pickle.dumps(value, protocol)
    assert batches.load_plain(content) == pickle.loads(content, encoding="bytes")


@BOUNDED
@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_arrays_are_read_as_pickle_reads_them(protocol, n, m, fortran):
    array = np.arange(n * m, dtype=np.uint8).reshape(n, m)
    array = np.asfortranarray(array) if fortran else array
    read = batches.load_plain(pickle.dumps({b"data": array}, protocol))[b"data"]
    assert np.array_equal(read, array) and read.dtype == np.uint8
