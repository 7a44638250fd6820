"""Decoded images on disk, so that a second start takes them from there.

Each data set has a folder, named by the key of its source and written under another name first: it is whole or not
there. Several processes may come at once; whoever loses a race has the images in memory anyway.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from cifar_fastai.data.decode import Decoded

__all__ = ["cache_folder", "entries", "load", "store"]

_VERSION = 2  # of what is stored, and of how images are decoded
_DAY = 24 * 60 * 60  # seconds


def cache_folder():
    """Where decoded images are kept: $CIFAR_FASTAI_CACHE, or cifar_fastai in the user's own cache folder."""
    if named := os.environ.get("CIFAR_FASTAI_CACHE"):
        return Path(named)
    users = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if not os.path.isabs(users):  # as the XDG specification asks
        users = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(users, "cifar_fastai")


def load(folder, key):
    """The images stored under `key`, or None where there are none, or any byte of them has changed.

    They are read into memory, not mapped: a run goes on when its cache is deleted or rebuilt meanwhile.
    """
    home = _home(folder, key)
    try:
        about = _read_about(home)
        if about["key"] != key:  # renamed, or copied from another
            return None
        decoded = Decoded(
            images=_read_array(home / "images.npy", np.uint8, (about["n"], 3, 32, 32)),
            labels=_read_array(home / "labels.npy", np.int64, (about["n"],)),
            classes=tuple(about["classes"]),
            n_train=about["n_train"],
            has_jpeg=about["has_jpeg"],
            folder=about["folder"],
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
        )
        return decoded if decoded.fingerprint == about["fingerprint"] else None
    except Exception:  # whatever is wrong with a cache, the images are decoded again
        return None


def store(folder, key, decoded, **about):
    """Store `decoded` under `key`, in place of what is there, with what else is to be known `about` it. Raises OSError.

    `about` is JSON, and is found again by `entries`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    new, old = (folder / f".{uuid.uuid4().hex}.tmp" for _ in range(2))
    try:
        new.mkdir()
        np.save(new / "images.npy", decoded.images)
        np.save(new / "labels.npy", decoded.labels)
        about |= dict(
            key=key,
            n=len(decoded.images),
            n_train=decoded.n_train,
            classes=decoded.classes,
            has_jpeg=decoded.has_jpeg,
            folder=decoded.folder,
            mean=decoded.mean,
            std=decoded.std,
            fingerprint=decoded.fingerprint,
        )
        text = json.dumps(about, sort_keys=True)
        (new / "about.json").write_text(json.dumps({"about": text, "sha256": _sha256(text)}), encoding="utf-8")
        home = _home(folder, key)
        with suppress(FileNotFoundError):
            os.rename(home, old)
        try:
            os.rename(new, home)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not home.is_dir():
                raise  # else another process was faster
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def entries(folder):
    """What is known about each data set stored here: a list of dicts, with what `store` was told and their key."""
    found = []
    with suppress(OSError):
        for home in sorted(Path(folder).glob(f"v{_VERSION}-*")):
            with suppress(Exception):  # damaged: not there
                found.append(_read_about(home))
    return found


def _home(folder, key):
    return Path(folder) / f"v{_VERSION}-{key[:32]}"


def _read_about(home):
    wrapped = json.loads((home / "about.json").read_text(encoding="utf-8"))
    if _sha256(wrapped["about"]) != wrapped["sha256"]:
        raise ValueError("damaged")
    return json.loads(wrapped["about"])


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _read_array(path, dtype, shape):
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # a damaged header fails here, before memory is taken
    if mapped.dtype != dtype or mapped.shape != shape:
        raise ValueError("damaged")
    return np.array(mapped)


def _sweep(folder):
    """Remove what a process that was killed while storing has left, a day ago or more."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)
