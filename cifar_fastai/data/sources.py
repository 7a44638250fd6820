"""The files of a data set, in a folder or in a tar archive: seen alike, and nothing about them taken on trust.

An archive is read where it lies and never extracted, so no name in it can reach a file outside; names that try to,
links and devices are refused all the same, and so is an archive that would unpack into more than memory should hold.
"""

import gzip
import hashlib
import os
import re
import stat
import tarfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cifar_fastai.errors import InputError, printable, reason

__all__ = ["MAX_FILES", "MAX_FILE_BYTES", "MAX_TOTAL_BYTES", "Archive", "Entry", "Folder", "open_source"]

MAX_FILES = 200_000
MAX_FILE_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 2 * 2**30
_MAX_HEADER_BYTES = 64 * 2**10  # of one extended header: a long name, or pax records
_MAX_NAME = 255  # of one part of a path, as file systems have it
_BLOCK = 512  # a tar archive is made of these


class Entry(NamedTuple):
    """A file or folder of a source, its name relative to the folder that holds the splits or the batches."""

    parts: tuple
    is_dir: bool
    size: int  # bytes
    offset: int = 0  # of the content, in an unpacked archive
    stamp: tuple = ()  # times of the last change in a folder, in ns

    @property
    def name(self):
        return "/".join(self.parts)


def open_source(path, marks):
    """The `Folder` or `Archive` at `path`, with the files that lie beside the `marks` (names of folders or files).

    The marks lie in `path` itself or in a single folder on top. Raises InputError where `path` is neither.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(
            f"{printable(path) or repr('')}: not found; give a folder, a .tgz or .tar archive, or auto, cifar10, digits"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)}: cannot be read ({reason(error)}); give another path") from None
    if stat.S_ISDIR(mode):
        return Folder(path, marks)
    if stat.S_ISREG(mode):
        return Archive(path, marks)
    raise InputError(f"{printable(path)}: neither a folder nor a file; give a folder, or a .tgz or .tar archive")


class Folder:
    """A data set in a folder. Links are followed, since a folder is its owner's own; a tar archive is a stranger's."""

    def __init__(self, path, marks):
        self.path, self.marks = Path(path), frozenset(marks)

    @cached_property
    def root(self):
        names = [(child.name,) for child in self._scan(())]
        if not self.marks.intersection(top for (top,) in names):
            tops = [child.name for child in self._scan(()) if child.is_dir()]
            names += [(top, child.name) for top in tops for child in self._scan((top,))]
        return _find_root(names, self.marks, self.path)

    @property
    def stem(self):
        return printable(self.path.resolve().name)

    @cached_property
    def entries(self):
        """Everything beside the marks, three folders deep, without hidden files: a list of `Entry`."""
        entries = []
        self._walk((), entries)
        return entries

    def key(self):
        """A hash of where the folder is and of every file's name, size and times of change; contents are not read.

        A file that was altered in place has a new time of change (ctime), even where size and date were put back.
        """
        digest = hashlib.sha256(os.fsencode(self.path.joinpath(*self.root).resolve()))
        for entry in sorted(self.entries):
            digest.update(f"\n{entry.name}\0{entry.is_dir}\0{entry.size}\0{entry.stamp}".encode())
        return digest.hexdigest()

    def read(self, entries, max_bytes):
        """Yield `(i, content)` for every one of `entries`. Raises InputError that names the file."""
        for i, entry in enumerate(entries):
            _check_size(entry, max_bytes, self)
            try:
                yield i, self.path.joinpath(*self.root, *entry.parts).read_bytes()
            except OSError as error:
                raise InputError(f"{self.where(entry)}: cannot be read ({reason(error)}); mend or remove it") from None

    def where(self, entry):
        """The entry's name for an error message."""
        return printable(self.path.joinpath(*self.root, *entry.parts))

    def _walk(self, parts, entries):
        """Add what lies in the folder `parts` to `entries`. At the top only the marks are looked at, so that neighbours
        of any size do no harm."""
        for child in self._scan((*self.root, *parts)):
            if not parts and child.name not in self.marks:
                continue
            try:
                is_dir, info = child.is_dir(), child.stat()
            except OSError as error:  # a link to nowhere
                raise InputError(f"{printable(child.path)}: cannot be read ({reason(error)}); remove it") from None
            _check_name(child.name, child.path)
            inside = (*parts, child.name)
            if is_dir:
                entries.append(Entry(inside, True, 0))
                if len(inside) < 3:
                    self._walk(inside, entries)
            elif stat.S_ISREG(info.st_mode):
                entries.append(Entry(inside, False, info.st_size, stamp=(info.st_mtime_ns, info.st_ctime_ns)))
            else:
                raise InputError(f"{printable(child.path)}: not a regular file; remove it")
            if len(entries) > MAX_FILES:
                raise InputError(f"{printable(self.path)}: holds more than {MAX_FILES:,} files; give a smaller set")

    def _scan(self, parts):
        """What lies in the folder `parts` and is not hidden, sorted by name: a list of `os.DirEntry`."""
        folder = self.path.joinpath(*parts)
        try:
            with os.scandir(folder) as found:
                return sorted((child for child in found if not _hidden(child.name)), key=lambda child: child.name)
        except OSError as error:
            raise InputError(f"{printable(folder)}: cannot be read ({reason(error)}); mend or remove it") from None


class Archive:
    """A data set in a tar archive, plain or packed with gzip."""

    def __init__(self, path, marks):
        self.path, self.marks = Path(path), frozenset(marks)

    @property
    def root(self):
        return self._listing[0]

    @property
    def stem(self):
        return printable(re.sub(r"(\.tar)?(\.t?gz|\.tar)$", "", self.path.name, flags=re.IGNORECASE))

    @property
    def entries(self):
        """Everything beside the marks without hidden files, in the archive's order: a list of `Entry`."""
        return self._listing[1]

    def key(self):
        """A hash of the archive's bytes."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{printable(self.path)}: cannot be read ({reason(error)})") from None

    def read(self, entries, max_bytes):
        """Yield `(i, content)` for every one of `entries`, in the archive's order. Raises InputError."""
        for entry in entries:
            _check_size(entry, max_bytes, self)
        with self._open() as stream:
            for i in sorted(range(len(entries)), key=lambda i: entries[i].offset):
                stream.seek(entries[i].offset)
                content = stream.read(entries[i].size)
                if len(content) != entries[i].size:
                    raise EOFError("the file ends early")
                yield i, content

    def where(self, entry):
        """The entry's name for an error message."""
        return f"{printable(self.path)}: {printable('/'.join((*self.root, *entry.parts)))}"

    @cached_property
    def _listing(self):
        """`(root, entries)` after a pass over the whole archive, in which every member was checked."""
        found = {}
        with self._open() as stream:
            self._check_is_tar(stream.read(_BLOCK))
            stream.seek(0)
            stream.max_read = _MAX_HEADER_BYTES
            for count, info in enumerate(tarfile.open(fileobj=stream, mode="r:", encoding="utf-8"), start=1):
                if count > MAX_FILES:
                    raise InputError(f"{printable(self.path)}: holds more than {MAX_FILES:,} files; give a smaller set")
                entry = self._checked(info)
                if any(map(_hidden, entry.parts)):
                    continue
                if entry.parts in found and not (entry.is_dir and found[entry.parts].is_dir):
                    raise InputError(f"{printable(self.path)}: holds {printable(entry.name)} twice; pack it again")
                found[entry.parts] = entry
            if len(stream.last) != _BLOCK or any(stream.last):  # tarfile takes a damaged header for the end
                raise EOFError("no end marker" if not stream.last else "a damaged header")
            while stream.read(_MAX_HEADER_BYTES):  # to the very end, where gzip compares its checksum
                pass
        found.pop((), None)
        root = _find_root(list(found), self.marks, self.path)
        inside = [
            entry._replace(parts=entry.parts[len(root) :])
            for entry in found.values()
            if entry.parts[: len(root)] == root and len(entry.parts) > len(root)
        ]
        return root, inside

    def _checked(self, info):
        """The member as an `Entry`. Raises InputError for one that an honest archive would not hold."""
        where = f"{printable(self.path)}: {printable(info.name)}"
        path = PurePosixPath(info.name)
        if path.is_absolute() or ".." in path.parts or "\\" in info.name or info.name[1:2] == ":":
            raise InputError(f"{where}: a name that leads outside the archive; get the archive from elsewhere")
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise InputError(f"{where}: a link or special file; pack plain files only (tar --dereference)")
        if info.size < 0:
            raise EOFError(f"{info.size} bytes in one file")
        if info.isreg() and info.size > MAX_FILE_BYTES:
            raise InputError(
                f"{where}: {info.size:,} bytes is more than any file of a data set of 32x32 images has; remove it"
            )
        if not any(map(_hidden, path.parts)):
            for part in path.parts:
                _check_name(part, where)
        return Entry(path.parts, info.isdir(), info.size if info.isreg() else 0, offset=info.offset_data)

    def _check_is_tar(self, block):
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if len(block) == _BLOCK and not any(block):
                return  # an archive of nothing: the search for a root says so
            raise InputError(
                f"{printable(self.path)}: not a tar archive; give a folder, or a .tgz or .tar archive"
            ) from None

    @contextmanager
    def _open(self):
        """The unpacked archive as a stream. Whatever fails in the block becomes an InputError: a hostile header ends
        tarfile's parsing in more ways than can be listed (ValueError, RecursionError, KeyError, ...)."""
        try:
            with open(self.path, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                with gzip.GzipFile(fileobj=file) if packed else file as unpacked:
                    yield _Bounded(unpacked, printable(self.path))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{printable(self.path)}: a truncated or damaged archive ({reason(error)}); download or pack it again"
            ) from None


class _Bounded:
    """An unpacked stream that gives up, rather than fill the memory, when an archive unpacks into too much."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.max_read = MAX_FILE_BYTES
        self.last = b""  # what the last read gave

    def tell(self):
        return self.file.tell()

    def seek(self, offset):
        self._check(offset)
        return self.file.seek(offset)

    def read(self, size):
        if not 0 <= size <= self.max_read:
            raise InputError(f"{self.name}: a header of {size:,} bytes; pack the archive again")
        self._check(self.file.tell() + size)
        self.last = self.file.read(size)
        return self.last

    def _check(self, offset):
        if offset > MAX_TOTAL_BYTES:
            raise InputError(f"{self.name}: unpacks into more than {MAX_TOTAL_BYTES // 2**30} GB; give a smaller set")


def _find_root(names, marks, path):
    """The folder that holds the marks: () for the source itself, or (name,) for a folder on top."""
    tops = sorted({parts[0] for parts in names})
    if marks.intersection(tops):
        return ()
    roots = sorted({parts[:1] for parts in names if len(parts) > 1 and parts[1] in marks})
    if len(roots) == 1:
        return roots[0]
    if roots:
        found = ", ".join(printable(root[0]) for root in roots[:4])
        raise InputError(f"{printable(path)}: holds several data sets ({found}); give one of them")
    found = ", ".join(map(printable, tops[:4])) + (", ..." if len(tops) > 4 else "") if tops else "nothing"
    raise InputError(
        f"{printable(path)}: holds neither train and test folders nor CIFAR-10's batches (found: {found}); "
        "give the folder or archive that does"
    )


def _check_name(name, where):
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise InputError(f"{printable(where)}: a name of control characters, or of more than {_MAX_NAME}; rename it")


def _check_size(entry, max_bytes, source):
    if entry.size > max_bytes:
        raise InputError(
            f"{source.where(entry)}: {entry.size:,} bytes, more than the {max_bytes:,} that such a file "
            "may have; remove it or make it smaller"
        )


def _hidden(name):
    return name.startswith(".") or name == "__MACOSX"
