"""Files that are whole or not there, and folders that one process holds."""

import errno
import json
import os
import subprocess
import sys
import threading
from unittest.mock import Mock

import pytest

from cifar_fastai.files import atomic_write, lock_folder, private_folder, remove_leftovers, write_json


def test_the_file_is_there_when_the_block_has_ended(tmp_path):
    path = tmp_path / "numbers.txt"
    with atomic_write(path) as file:
        file.write("zwölf\n")
        assert not path.exists()
    assert path.read_bytes() == "zwölf\n".encode() and os.listdir(tmp_path) == ["numbers.txt"]
    with atomic_write(path, "wb") as file:
        file.write(b"\r\n")
        assert path.read_text() == "zwölf\n", "whoever reads meanwhile reads the old one"
    assert path.read_bytes() == b"\r\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("new")
        raise error("no")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_errors_of_the_disk_name_the_file(tmp_path, code):
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "file"):
        raise OSError(code, os.strerror(code), "/some/temporary/name")
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path / "file"))
    assert isinstance(error.value, PermissionError) == (code == errno.EACCES)
    assert os.listdir(tmp_path) == []


def test_others_may_read_it_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "file.json", [])
    finally:
        os.umask(old)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o640


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, [0] * 1000)
    writer = threading.Thread(target=lambda: [write_json(path, [k] * 1000) for k in range(50)])
    writer.start()
    while writer.is_alive():
        assert len(set(json.loads(path.read_text()))) == 1
    assert json.loads(path.read_text()) == [49] * 1000


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, time
from cifar_fastai.files import lock_folder
with lock_folder(sys.argv[1]) as free:
    print(free, flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_folder_until_it_ends(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with lock_folder(tmp_path) as free:
        assert not free
    other.kill()
    other.wait()
    other.stdout.close()
    with lock_folder(tmp_path) as free:
        assert free
        with lock_folder(tmp_path) as again:
            assert not again, "not by the same process either"
    with lock_folder(tmp_path) as free:
        assert free
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_locked_count_as_free(tmp_path, monkeypatch, code):
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=OSError(code, os.strerror(code))))
    with lock_folder(tmp_path) as free:
        assert free


def test_a_private_folder_is_the_users_alone(tmp_path, monkeypatch):
    """0700 whatever the umask; neither a planted link nor another user's folder is taken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    old = os.umask(0)
    try:
        assert private_folder("code") == tmp_path / "caches" / "cifar_fastai" / "code"
    finally:
        os.umask(old)
    folder = private_folder("code")
    folder.chmod(0o777)
    assert private_folder("code").stat().st_mode & 0o777 == 0o700
    (folder.parent / "link").symlink_to(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 4321)
    for name in "code", "link":
        with pytest.raises(PermissionError, match="is not a folder of this user"):
            private_folder(name)


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    for name in (f".{'a1' * 16}.tmp", "model.pth", ".hidden", "notes.tmp", ".notes.tmp"):
        (tmp_path / name).write_text(name)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".notes.tmp", "model.pth", "notes.tmp"]
