"""Decoded images on disk, one .npz for each data set, so that a second start need not decode them again."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from cifar_fastai.files import TEMPORARY, atomic_write, check_regular, private_folder, user_folder

DOWNLOADS = "cifar_fastai-downloads"  # a folder of this name alone may be emptied
_VERSION = 5  # of the file's layout, and of how images are decoded
_DAY = 24 * 60 * 60  # seconds


def cache_folder():
    """Where decoded images are kept: $CIFAR_FASTAI_CACHE, or cifar_fastai in the user's own cache folder."""
    if folder := os.environ.get("CIFAR_FASTAI_CACHE"):
        return Path(folder)
    return user_folder() or private_folder("images")


def load(folder, key):
    """The fields of the ImageSet stored under `key`, or None where there is none, or it is damaged.

    Images are read into memory, not mapped, so that a run goes on when its cache is deleted or written anew.
    """
    with suppress(Exception), np.load(check_regular(_path(folder, key)), allow_pickle=False) as archive:
        fields, images, labels = _read_about(archive), archive["images"], archive["labels"]  # the zip's CRC is checked
        kinds = (images.shape, labels.shape, images.dtype, labels.dtype)
        n, size = fields.pop("n"), images.shape[-1]
        if fields.pop("key") == key and kinds == ((n, 3, size, size), (n,), np.uint8, np.int64):
            return fields | dict(images=images, labels=labels)


def store(folder, key, fields):
    """Store the fields of an ImageSet under `key`, in place of an earlier file. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(TEMPORARY):  # left by a process that was killed while storing; newer ones may be in use
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()
    about = {name: value for name, value in fields.items() if name not in ("images", "labels")}
    about = json.dumps(about | {"key": key, "n": len(fields["labels"])})
    with atomic_write(_path(folder, key), "wb") as file:
        np.savez(file, about=np.array(about), images=fields["images"], labels=fields["labels"])


def entries(folder):
    """A dict for each data set stored here: its key and the fields of its ImageSet, arrays apart."""
    result = []
    for path in sorted(Path(folder).glob(f"v{_VERSION}-*.npz")):
        with suppress(Exception), np.load(check_regular(path), allow_pickle=False) as archive:
            result.append(_read_about(archive))
    return result


def files(folder):
    """[(path, description, bytes)] of everything in the cache, also of other versions, and unfinished downloads."""
    result = []
    for pattern in (f"v[0-9]*-{'[0-9a-f]' * 32}.npz", TEMPORARY, f"{DOWNLOADS}/*"):
        for path in sorted(Path(folder).glob(pattern)):
            text = f"download from {unquote(path.name)}" if path.parent != Path(folder) else "unreadable"
            with suppress(Exception), np.load(path, allow_pickle=False) as archive:
                about = _read_about(archive)
                text = f"{about['name'] or Path(about['source']).name}, {about['n']:,} images, from {about['source']}"
            result += [(path, text, path.stat().st_size)] if path.name != ".lock" else []
    return result


def _path(folder, key):
    return Path(folder) / f"v{_VERSION}-{key[:32]}.npz"


def _read_about(archive):
    about = json.loads(str(archive["about"]))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
