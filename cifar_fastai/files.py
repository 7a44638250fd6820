"""Files that are whole or not there: written under a temporary name, then renamed."""

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_write", "write_json"]


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
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def write_json(path, value):
    """Write `value` as indented JSON, atomically. NaN is refused (ValueError): other readers could not read it."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
