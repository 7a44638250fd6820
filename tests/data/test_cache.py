"""The cache of decoded images: used again, rebuilt when damaged, shared by threads, and never in the way."""

import os
import runpy
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from platformdirs import macos, unix
from tiny_data import CLASSES, TINY, encoded, random_pixels, tiny_files, without, write_folder, write_tar

from cifar_fastai.data import cache, decode
from cifar_fastai.data import images as data
from cifar_fastai.data.images import load_images
from cifar_fastai.files import user_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", TINY)


@pytest.fixture
def decodings(monkeypatch):
    """A list that grows by each decoding."""
    done = []

    def count(source, progress, size):
        done.append(source.path)
        return decode.decode(source, progress, size)

    monkeypatch.setattr(data, "decode", count)
    return done


def same(a, b):
    a, b = asdict(a), asdict(b)
    return all(np.array_equal(a.pop(name), b.pop(name)) for name in ("images", "labels")) and a == b


def test_second_start_decodes_nothing(tmp_path, pets, decodings):
    packed = write_tar(tmp_path / "pets.tgz", TINY), write_tar(tmp_path / "top.tgz", tiny_files(top="cats/"))
    for path in (pets, *packed):
        first, n = load_images(path), len(decodings)
        assert same(load_images(path), first) and len(decodings) == n
    assert load_images(packed[0].rename(tmp_path / "my.cows.tar.gz")).name == "my.cows"
    assert len(decodings) == 3


def test_changed_source_is_decoded_again(tmp_path, pets, decodings):
    load_images(pets)
    file = pets / "train/cat/0000.png"
    times, changed = file.stat(), encoded(random_pixels(77))
    assert len(changed) == times.st_size
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same date
    assert np.array_equal(load_images(pets).images[0], random_pixels(77).transpose(2, 0, 1)) and len(decodings) == 2
    file.unlink()
    assert load_images(pets).n_train == 5 and len(decodings) == 3
    archive = write_tar(tmp_path / "pets.tgz", TINY)
    assert load_images(archive).n_train == 6
    assert load_images(write_tar(archive, without(TINY, "0002"))).n_train == 4


def flip_in(member, at):
    """Change one bit of a member of the .npz, counted from its end where `at` is negative."""

    def damage(path):
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{member}.npy")
        content = bytearray(path.read_bytes())
        start = info.header_offset + 30 + len(info.filename) + content[info.header_offset + 28]  # after its extra field
        content[start + at % info.file_size] ^= 0x10
        path.write_bytes(content)

    return damage


def test_a_pipe_in_the_cache_is_not_waited_for(pets, tmp_path):
    first = load_images(pets, cache_dir=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").glob("*.npz")
    entry.unlink()
    os.mkfifo(entry)
    assert not cache.entries(tmp_path / "cache") and same(load_images(pets, cache_dir=tmp_path / "cache"), first)


def write_other(**changes):
    def damage(path):
        with np.load(path) as archive:
            arrays = dict(archive) | changes
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    return damage


PLACES = [(name, at) for name in ("images", "labels", "about") for at in (3, 20, 61, 150, -1)]
DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "a lone array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    **{f"{name} {at}": flip_in(name, at) for name, at in PLACES},
    "wrong shape": write_other(images=np.zeros((10, 3, 16, 64), np.uint8)),
    "wrong dtype": write_other(images=np.zeros((10, 3, 32, 32), np.int8)),
    "objects": write_other(images=np.array([None] * 10)),
    "too few": write_other(images=np.zeros((9, 3, 32, 32), np.uint8)),
    "no labels": write_other(labels=None),
    "about of another kind": write_other(about=np.array("[1]")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_cache_is_rebuilt(pets, own_cache, decodings, case):
    first = load_images(pets)
    [path] = own_cache.iterdir()
    DAMAGES[case](path)
    assert same(load_images(pets), first) and len(decodings) == 2
    assert same(load_images(pets), first) and len(decodings) == 2
    assert list(own_cache.iterdir()) == [path]


def test_file_of_another_source_is_not_taken(tmp_path, pets, own_cache, decodings):
    load_images(pets)
    [path] = own_cache.iterdir()
    load_images(write_folder(tmp_path / "cows", tiny_files(("cow", "ox"), 2, 1)))
    [cows] = [other for other in own_cache.iterdir() if other != path]
    shutil.copy(cows, path)
    assert load_images(pets).classes == CLASSES and len(decodings) == 3


def test_a_killed_process_leaves_nothing_for_long(pets, own_cache, monkeypatch):
    own_cache.mkdir()
    old, new = (own_cache / f".{digit * 32}.tmp" for digit in "12")
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))

    def half(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        load_images(pets)
    assert list(own_cache.iterdir()) == [new]


def test_unwritable_cache_costs_a_note(tmp_path, pets):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" / "cache"
    images = load_images(pets, cache_dir=folder)
    assert images.n_train == 6 and images.note.startswith(f"{folder}: decoded images cannot be kept there (")
    assert "Not a directory" in images.note and images.note.isprintable()


def test_threads_at_once(pets, own_cache):
    """Many readers and writers of one file: each ends with the complete set, and a complete file stays."""
    first, results = load_images(pets), []
    [path] = own_cache.iterdir()

    def work(_):
        for _ in range(10):
            path.unlink(missing_ok=True)
            results.append(same(load_images(pets), first))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert results == [True] * 40
    assert same(load_images(pets), first)
    assert not list(own_cache.glob(".*"))


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        (unix.Unix, {"XDG_CACHE_HOME": "/x"}, "/x/cifar_fastai"),
        (unix.Unix, {}, "~/.cache/cifar_fastai"),
        (macos.MacOS, {}, "~/Library/Caches/cifar_fastai"),
        (unix.Unix, {"CIFAR_FASTAI_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, "/own"),
    ],
)
def test_cache_folder(monkeypatch, platform, environment, expected):
    for name in ("XDG_CACHE_HOME", "CIFAR_FASTAI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platformdirs.PlatformDirs", platform)
    assert cache.cache_folder() == Path(expected).expanduser()


def test_the_recipe_lists_and_clears(pets, own_cache, capsys):
    """All that is ours goes; a stranger's files in the folder stay."""
    own_cache.mkdir(exist_ok=True)
    (own_cache / cache.DOWNLOADS).mkdir()
    (own_cache / cache.DOWNLOADS / "https%3A%2F%2Fhost%2Fa.tgz.part").write_bytes(bytes(3_000_000))
    (own_cache / f"v3-{'0' * 32}.npz").write_bytes(b"of another version")
    (own_cache / "downloads").mkdir()
    others = {own_cache / name for name in ("notes.txt", ".notes.tmp", "v8-engine.npz", "downloads/thesis.pdf")}
    for path in others:  # as where CIFAR_FASTAI_CACHE names the home folder
        path.write_bytes(b"a stranger's")
        os.utime(path, (0, 0))
    load_images(pets)

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("sys.argv", ["data.py", *arguments])
            runpy.run_path(str(ROOT / "recipes" / "data.py"), run_name="__main__")
        assert stop.value.code == 0
        return capsys.readouterr().out

    out = run()
    assert f"cache: {own_cache}" in out and f"pets, 10 images, from {pets}" in out
    assert "3.0 MB  download from https://host/a.tgz.part" in out and "3.0 MB  in all" in out
    assert run("list") == out and "removed" in run("clear")
    assert {path for path in own_cache.rglob("*") if path.is_file()} == others
    assert "0.0 MB  in all" in run()


@pytest.mark.parametrize("home", [None, "~", "relative"])
def test_a_user_without_a_home(tmp_path, pets, monkeypatch, home):
    """HOME is unset and the system does not know the user: the temporary folder is used, and none is called ~."""
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("no such user")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CIFAR_FASTAI_CACHE")
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert user_folder() is None
    assert load_images(pets).note is None
    caches = tmp_path / f"cifar_fastai-{os.geteuid()}-images"
    assert caches.stat().st_mode & 0o777 == 0o700 and list(caches.glob("*.npz")) and not os.listdir(tmp_path / "here")
