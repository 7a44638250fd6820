"""Files that are either complete or absent: written under a temporary name, then renamed. Also folder locks."""

import errno
import json
import os
import stat
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from cifar_fastai.errors import InputError, reason

__all__ = [
    "TEMPORARY",
    "atomic_write",
    "check_regular",
    "lock_folder",
    "private_folder",
    "read_json",
    "remove_leftovers",
    "user_folder",
    "write_json",
    "writing",
]

TEMPORARY = f".{'[0-9a-f]' * 32}.tmp"  # what `atomic_write` writes to, as a pattern
_state = SimpleNamespace(writes=True)


@contextmanager
def writing(is_allowed):
    """Whether `atomic_write` writes in this block: of several processes that do the same, only one may."""
    before, _state.writes = _state.writes, is_allowed
    try:
        yield
    finally:
        _state.writes = before


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file that gets the name `path` only when the block ends without an error; `mode` is "w" (UTF-8) or "wb".

    A reader finds the complete old file or the complete new one, also after a crash: the data reach the disk before
    the name does. Raises OSError with `path` as its file name. In `writing(False)` nothing is written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # `path` plus a suffix could be too long a name
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if not _state.writes:
        with open(os.devnull, mode, **text) as file:
            yield file
        return
    try:
        # O_EXCL never follows a link; 0o666 is reduced by the user's umask, as for any file
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN is refused (ValueError): other readers could not read it."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def check_regular(path):
    """`path`. Raises OSError where it is missing, or no file: whoever opens a pipe waits for its other end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_json(path):
    """The object in a JSON file as a dict. Raises InputError for a file that is missing, damaged or no object."""
    try:
        value = json.loads(Path(check_regular(path)).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    return value


@contextmanager
def lock_folder(folder, name=".lock"):
    """Lock `folder` against other processes while the block runs; yields False where another process holds it.

    The system releases the lock when the process ends, however it ends. Raises OSError where the folder is missing or
    may not be written to.
    """
    lock, is_free = FileLock(Path(folder) / name, fallback_to_soft=False), True
    try:
        lock.acquire(blocking=False)
    except Timeout:
        is_free = False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some network drives have no locks
            raise
    try:
        yield is_free
    finally:
        if lock.is_locked:
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while it is locked: who has opened it sees it unlinked and tries again
            lock.release()


def user_folder():
    """Where the user's caches are, cifar_fastai in the system's folder for them; None for a user without a home."""
    try:
        path = Path(user_cache_dir("cifar_fastai", appauthor=False))
    except RuntimeError:  # HOME is unset, and the system does not know the user
        return None
    return path if path.is_absolute() else None  # an older platformdirs returns one that begins with ~


def private_folder(name):
    """A folder of caches which this user alone can read and write, made where needed; in the temporary one at worst.

    Raises OSError where somebody else owns it: what lies there could be theirs.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else None
    folder, temporary = user_folder(), Path(tempfile.gettempdir(), f"cifar_fastai-{user}-{name}")
    folder = folder / name if folder else temporary
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = temporary
        folder.mkdir(mode=0o700, exist_ok=True)
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or user not in (None, info.st_uid):
        raise PermissionError(errno.EPERM, "is not a folder of this user", str(folder))
    if user is not None and info.st_mode & 0o077:
        os.chmod(folder, 0o700)
    return folder


def remove_leftovers(folder):
    """Remove what `atomic_write` left in `folder` when its process was killed; only for the process that locks it."""
    for path in Path(folder).glob(TEMPORARY):
        with suppress(OSError):
            path.unlink()
