"""Files that are whole or not there: written under a temporary name, then renamed."""

import errno
import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a folder is not locked there
    fcntl = None

__all__ = ["atomic_write", "held", "sweep", "write_json"]


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file that takes the name `path` only when the block ends well; `mode` is "w" (UTF-8) or "wb".

    Whoever reads `path` meanwhile, or after a crash, finds the old file whole or none. The data reach the disk
    before the name does. Raises OSError as `open` does.
    """
    path, name = Path(path), None
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError) and error.strerror:  # name the file that was wanted, not the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN is refused (ValueError): other readers could not read it."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


@contextmanager
def held(folder):
    """Hold `folder` against other processes while the block runs; yields False where another one holds it.

    The system lets go when the process ends, however it ends, and nothing is left behind. Where folders cannot be
    locked (Windows, some network drives) it yields True.
    """
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        yield handle is None or _lock(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def sweep(folder):
    """Remove what `atomic_write` left in `folder` when its process was killed; for who holds the folder."""
    for left in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            left.unlink()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
