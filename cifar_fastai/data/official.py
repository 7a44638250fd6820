"""The official batches of CIFAR-10 and CIFAR-100: pickles, read as data.

A pickle is a program. Here it can name seven functions of numpy and codecs, and none of them is called: each becomes a
`_Call`, a record of the name and the arguments, from which arrays and text are made afterwards where they belong.
"""

import io
import pickle
import pickletools
import re

import numpy as np

from cifar_fastai.data.sources import reading

CIFAR100_MD5 = dict(  # as published
    meta="7973b15100ade9c7d40fb424638fde48",
    train="16019d7e3df5f24257cddd939b257f8d",
    test="f0ef6b0ae62326f3e7ffdfab6717acfc",
)
_PROBLEM = "not one of CIFAR's batches", "get the archive again"
_ROW = 3 * 32 * 32  # red, green, blue plane of one image
_MAX_OPCODES = 500_000  # CIFAR-100's 50,000 rows need 350,000 in the oldest protocol
_MAX_TUPLES = 100  # besides the arguments of calls; an array has three
_MAX_TEXT = 255  # characters of a key or a name
_FUNCTIONS = re.compile(
    r"numpy (ndarray|dtype)|_codecs encode|numpy\._?core\.(multiarray _reconstruct|numeric _frombuffer)"
)
_REUSABLE = re.compile("(EMPTY_)?(LIST|DICT)|.*GLOBAL|REDUCE|.*(STRING|UNICODE|BYTE).*")  # opcodes


def read_batch(content, where, **n_classes):
    """`(images, labels, ...)` of one batch: uint8 (N, 3, 32, 32), and int64 (N,) for each of the keys in `n_classes`.

    `labels=10` in CIFAR-10, `fine_labels=100, coarse_labels=20` in CIFAR-100. Raises InputError beginning with `where`.
    The format: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    with reading(where, *_PROBLEM):
        fields = _read_fields(content)
        data = _array(fields.get("data"))
        if data.ndim != 2 or data.shape[1] != _ROW or not len(data):
            raise ValueError(f"its data must be of shape (N, {_ROW}), and is {data.shape}")
        for key, n in n_classes.items():
            labels = fields.get(key)
            is_list = isinstance(labels, list) and len(labels) == len(data)
            if not is_list or not all(type(label) is int and 0 <= label < n for label in labels):
                raise ValueError(f"its {key} must be a list of {len(data)} numbers in 0..{n - 1}")
        return data.reshape(-1, 3, 32, 32), *(np.array(fields[key], dtype=np.int64) for key in n_classes)


def read_label_names(content, where, key="label_names"):
    """The class names in `batches.meta` or `meta`, in the order of the labels. InputError beginning with `where`."""
    with reading(where, *_PROBLEM):
        names = [_text(name) for name in _read_fields(content).get(key, ())]
        if len(set(names)) != len(names) or len(names) < 2 or not all(name.isprintable() for name in names):
            raise ValueError(f"its {key} must be two or more, printable and different")
        return names


def _read_fields(content):
    """The dictionary in a batch, its keys as str."""
    _check_opcodes(content)
    fields = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(fields, dict):
        raise ValueError("no dictionary")
    return {_text(key): value for key, value in fields.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if not _FUNCTIONS.fullmatch(f"{module} {name}"):
            raise ValueError(f"it asks for {module} {name}, which no data need")
        return _Call(name)


class _Call:
    """A function that a pickle names, or its result: the arguments of the call and the state set afterwards."""

    def __init__(self, name, args=()):
        self.name, self.args, self.state = name, args, None

    def __call__(self, *args):
        return _Call(self.name, args)

    def __setstate__(self, state):
        self.state = state


def _check_opcodes(content):
    """Raise ValueError for a pickle that would cost the unpickler much more memory or time than its size.

    Its memo is as long as the largest index in it. A dictionary's key of tuples that hold the same tuple twice takes
    for ever to hash, and one of thousands in each other overflows the stack; large integers can be made to have the
    same hash. So tuples may not be used again and, arguments of calls apart, are few.
    """
    memo, n_tuples, last = {}, 0, ""  # memo: which indexes may be read
    for count, (opcode, arg, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        index = len(memo) if name == "MEMOIZE" else arg
        is_read, is_write = name.endswith("GET"), name.endswith("PUT") or name == "MEMOIZE"
        n_tuples += ("TUPLE" in name) - (name == "REDUCE")
        if count > _MAX_OPCODES or n_tuples > _MAX_TUPLES or (is_write and not 0 <= index <= count):
            raise ValueError("more parts than a batch has")
        if name == "DUP" or (is_read and not memo.get(arg)):
            raise ValueError("parts used again")
        if isinstance(arg, int) and abs(arg) >= 2**31:
            raise ValueError("integers of more than 32 bits")
        if is_write:
            memo[index] = _REUSABLE.fullmatch(last)
        elif name != "FRAME":
            last = name


def _array(value):
    """The uint8 array that numpy would make of a `_Call`."""
    match value:
        case _Call(name="_reconstruct", state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case _Call(name="_frombuffer", args=(data, dtype, shape, order)):
            pass
        case _:
            raise ValueError("its data are no array")
    if not isinstance(dtype, _Call) or dtype.name != "dtype" or _text(dtype.args[0]) not in ("u1", "|u1", "uint8"):
        raise ValueError("an array of another type than uint8")
    if isinstance(data, _Call) and data.name == "encode":  # bytes, as Python 3 writes them in protocol 2
        data = data.args[0].encode("latin-1")
    return np.frombuffer(data, np.uint8).reshape(shape, order=_text(order))


def _text(value):
    """A key or a name as str. Raises ValueError for anything but short text."""
    if isinstance(value, _Call) and value.name == "encode":
        value = value.args[0][: _MAX_TEXT + 1].encode("latin-1")
    if not isinstance(value, bytes | str) or not 0 < len(value) <= _MAX_TEXT:
        raise ValueError("a key or name that is no short text")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
