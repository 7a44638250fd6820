"""The files of a data set, in a folder or in a tar archive of unknown origin, behind one interface.

An archive is unpacked into memory, within bounds, and never extracted, so no name in it can reach a file outside.
Names that try to, links and devices are refused all the same.
"""

import gzip
import hashlib
import io
import os
import re
import stat
import tarfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

from cifar_fastai.errors import InputError, printable, reason

SPLITS = ("train", "test")
BATCH_FILES = ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch")  # of CIFAR-10
CIFAR100_FILES = ("meta", "train", "test")
MARKS = {*SPLITS, *BATCH_FILES}  # names at the top of a data set
MAX_FILES = 200_000
MAX_TOTAL_BYTES = 2**30  # of an unpacked archive
_MAX_HEADER_BYTES = 2**16  # of a long name, or of pax records
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}  # left by file managers


def open_source(path):
    """The `Folder` or `Archive` at `path`. Raises InputError."""
    with reading(
        path or "''", "cannot be read", "give a folder, a .tgz or .tar archive, or auto, cifar10, cifar100, digits"
    ):
        mode = os.stat(path).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise ValueError("neither a folder nor a file")
        return Folder(path) if stat.S_ISDIR(mode) else Archive(path)


@contextmanager
def reading(where, problem, hint):
    """Turn every error into InputError: hostile files end in ValueError, RecursionError, struct.error and others."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = printable(getattr(error, "filename", None) or where)
        raise InputError(f"{where}: {problem} ({reason(error)}); {hint}") from None


class Source:
    """The files of a data set at `path`. Visible ones under the marks count, which are at the top or one folder below.

    `key()` is a hash that changes with the files. `_members` are a dict by the parts of a file's name below `path`.
    """

    def __init__(self, path):
        self.path = Path(path)
        name = os.path.basename(os.path.abspath(path))
        self.stem = printable(re.sub(r"(\.tar)?(\.t?gz|\.tar)$", "", name, flags=re.IGNORECASE))

    @cached_property
    def root(self):
        """The name of the folder that holds the marks, or "" for the source itself."""
        tops = [parts[0] for parts in self._members if MARKS.intersection(parts[1:2])]
        roots = [""] if any(parts[0] in MARKS for parts in self._members) else sorted(set(tops))
        if len(roots) != 1:
            names = ", ".join(map(printable, roots[:4])) or "none"
            marks = "train and test folders or CIFAR-10's batches"
            raise InputError(f"{printable(self.path)}: must hold one data set, {marks}; it holds {names}")
        return roots[0]

    @cached_property
    def files(self):
        """A dict whose keys are names, tuples of their parts from a mark on."""
        top = (self.root,) if self.root else ()
        inside = {parts[len(top) :]: value for parts, value in self._members.items() if parts[: len(top)] == top}
        return {name: value for name, value in inside.items() if MARKS.intersection(name[:1]) or name == ("meta",)}

    def read(self, name, max_bytes):
        """The content of a file. Raises InputError where it cannot be read or is larger than `max_bytes`."""
        content = self._read(name, max_bytes + 1)
        if len(content) > max_bytes:
            raise InputError(f"{self.where(name)}: more than {max_bytes:,} bytes; remove or shrink it")
        return content

    def where(self, name):
        """A file's place for an error message."""
        return printable(f"{self.path}{self.separator}{PurePosixPath(self.root, *name)}")


class Folder(Source):
    """A data set in a folder. Links are followed, since a folder is its owner's own."""

    separator, problem = "/", ("cannot be read", "repair or remove it")

    @cached_property
    def _members(self):
        """{parts: (size, times of change)}, four folders deep."""
        files, folders = {}, [()]
        with reading(self.path, *self.problem):
            for parents in folders:  # which grows
                folder = os.path.join(self.path, *parents)
                try:
                    children = sorted(child for child in os.listdir(folder) if not _is_hidden(child))
                except PermissionError:
                    if parents and not MARKS.intersection(parents):  # a neighbour that nobody needs, as lost+found
                        continue
                    raise
                if not MARKS.intersection(parents):  # neighbours of any size do no harm
                    tops = [name for name in children if not parents and os.path.isdir(os.path.join(folder, name))]
                    children = (
                        [child for child in children if child in {*MARKS, "meta"}] if MARKS & {*children} else tops
                    )
                for child in children:
                    parts, path = (*parents, child), os.path.join(folder, child)
                    info = os.stat(path)  # fails for a link to nowhere
                    if stat.S_ISREG(info.st_mode):
                        files[parts] = info.st_size, info.st_mtime_ns, info.st_ctime_ns
                    elif not stat.S_ISDIR(info.st_mode):
                        raise OSError(None, "not a regular file", path)
                    elif len(parts) < 5:
                        folders.append(parts)
                    if len(files) + len(folders) > MAX_FILES:
                        raise ValueError(f"more than {MAX_FILES:,} files")
        return files

    def key(self):
        """A file that was altered in place has a new time of change (ctime), even where size and date were put back."""
        place = str(self.path.resolve())  # fastai gives paths another repr
        return hashlib.sha256(repr((place, sorted(self._members.items()))).encode()).hexdigest()

    def _read(self, name, size):
        with reading(self.path, *self.problem), open(self.path.joinpath(self.root, *name), "rb") as file:
            return file.read(size)


class Archive(Source):
    """A data set in a tar archive, plain or packed with gzip."""

    separator = ": "
    problem = "not an archive, or a damaged one", "give a complete .tgz or .tar archive of up to 1 GB"

    def __init__(self, path):
        super().__init__(path)
        with reading(self.path, *self.problem):  # a file that is too large, or of another kind, is not hashed
            if self.path.stat().st_size > 2 * MAX_TOTAL_BYTES:
                raise ValueError("too large")
            tarfile.TarInfo.frombuf(self._unpack(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")

    def key(self):
        """Of the archive's bytes."""
        with reading(self.path, *self.problem), open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _members(self):
        """{parts of the name: content} of all visible files, after a check of every header."""
        members = {}
        with reading(self.path, *self.problem):
            content = self._unpack(MAX_TOTAL_BYTES + 1)  # to the end, where gzip compares its checksum
            if len(content) > MAX_TOTAL_BYTES:
                raise ValueError(f"more than {MAX_TOTAL_BYTES / 2**30:g} GB when unpacked")
            view, stream = memoryview(content), io.BytesIO(content)  # neither copies it
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", tarinfo=_Header) as tar:
                for count, info in enumerate(tar):
                    if count == MAX_FILES:
                        raise ValueError(f"more than {MAX_FILES:,} files")
                    parts, end = PurePosixPath(info.name).parts, info.offset_data + info.size
                    is_outside = {"/", "//", ".."}.intersection(parts) or "\\" in info.name or info.name[1:2] == ":"
                    if is_outside or not (info.isreg() or info.isdir()) or info.issparse():
                        refusal = "a link, a special file, or a name that leads outside; pack plain files only"
                        raise InputError(f"{printable(f'{self.path}: {info.name}')}: {refusal} (tar --dereference)")
                    if not info.offset_data <= end <= len(content):
                        raise EOFError("the file ends early")
                    if parts and info.isreg() and not any(map(_is_hidden, parts)):
                        if parts in members:
                            raise InputError(f"{printable(f'{self.path}: {info.name}')}: is in it twice; pack it again")
                        members[parts] = view[info.offset_data : end]
                if view[tar.offset :][: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):  # where tarfile ends silently
                    raise EOFError("a damaged header, or no end marker")
        return members

    def _read(self, name, size):
        return bytes(self.files[name][:size])

    def _unpack(self, size):
        """The first `size` bytes of the unpacked archive, or all of it where it is shorter."""
        with open(self.path, "rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return (gzip.GzipFile(fileobj=file) if is_packed else file).read(size)


class _Header(tarfile.TarInfo):
    """A header of a tar archive whose extension is bounded."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type not in tarfile.REGULAR_TYPES and not 0 <= header.size <= _MAX_HEADER_BYTES:
            raise EOFError(f"a header of {header.size:,} bytes")
        return header


def _is_hidden(name):
    return name.startswith(".") or name.lower() in _JUNK
