"""CIFAR-10's official batches: pickles, read as data.

To unpickle is to run what the pickle says. Here nothing is run: `load_plain` goes over the opcodes itself and knows
only those that dictionaries, lists, numbers, strings and arrays of bytes are made of; anything else is refused. Even
numpy's own functions stay out of reach, which trust the state that a pickle hands them.
"""

import pickletools

import numpy as np

from cifar_fastai.errors import InputError, printable, reason

__all__ = ["BATCH_FILES", "TEST_BATCH", "TRAIN_BATCHES", "load_plain", "read_batch", "read_label_names"]

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
BATCH_FILES = (*TRAIN_BATCHES, TEST_BATCH, "batches.meta")
_ROW = 3 * 32 * 32  # red, green, blue plane of one image


def read_batch(content, n_classes, where):
    """`(images, labels)` of one batch: uint8 (N, 3, 32, 32) and int64 (N,). Raises InputError beginning with `where`.

    The format: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    fields = _fields(content, where)
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _ROW or not len(data):
        found = f"shape {data.shape}" if isinstance(data, np.ndarray) else "missing or no array"
        raise InputError(f"{where}: its data must be uint8 of shape (N, {_ROW}), and is {found}; {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels)} of them" if isinstance(labels, list) else "no list"
        raise InputError(f"{where}: there must be {len(data)} labels, and there is {found}; {_AGAIN}")
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < n_classes:
            found = label if type(label) is int and abs(label) < 2**63 else f"no small number ({type(label).__name__})"
            raise InputError(f"{where}: label {i} must be in 0..{n_classes - 1}, and is {found}; {_AGAIN}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def read_label_names(content, where):
    """The class names in `batches.meta`, in the order of the labels. Raises InputError beginning with `where`."""
    names = _fields(content, where).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise InputError(f"{where}: its label_names must be a list of names; {_AGAIN}")
    names = [_text(name) for name in names]
    if len(set(names)) != len(names) or not all(name and len(name) < 256 and name.isprintable() for name in names):
        raise InputError(f"{where}: its label_names must be printable, short and each there once; {_AGAIN}")
    return names


_AGAIN = "get the archive again"


def _fields(content, where):
    try:
        fields = load_plain(content)
    except Exception as error:  # a damaged pickle ends in IndexError, KeyError, UnicodeDecodeError, struct.error, ...
        raise InputError(f"{where}: not one of CIFAR-10's batches ({reason(error)}); {_AGAIN}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: must be a dictionary, and is a {type(fields).__name__}; {_AGAIN}")
    return {_text(key): value for key, value in fields.items()}


def _text(name):
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


class _Dtype:
    """Stands for the dtype uint8; no other is let in."""

    def __init__(self, name, *_):
        if _text(name) not in ("u1", "|u1", "uint8"):
            raise ValueError("an array of something else than uint8")


class _Array:
    """Stands for an array until its state has come."""

    def __init__(self, *_):
        self.value = None

    def build(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data, dtype, shape, order="C"):
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise ValueError("an array of something else than bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order=_text(order))


def _encode(text, encoding="latin1"):
    return text.encode("latin-1")  # so does Python 3 write bytes under protocol 2


_NDARRAY = object()  # the class itself is only ever an argument
_GLOBALS = {
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _Dtype,
    "_codecs encode": _encode,
    **{f"{core}.multiarray _reconstruct": _Array for core in ("numpy.core", "numpy._core")},
    **{f"{core}.numeric _frombuffer": _array for core in ("numpy.core", "numpy._core")},
}


def load_plain(content):
    """What `pickle.loads(content, encoding="bytes")` gives for plain data and arrays of uint8; nothing is executed.

    Raises ValueError for what is not plain, and other exceptions for a damaged pickle.
    """
    stack, marks, memo = [], [], {}

    def to_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for op, arg, _ in pickletools.genops(content):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return _finished(stack.pop())
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1":
                stack.append(arg)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING":  # Python 2's, bytes by nature
                stack.append(arg.encode("latin-1"))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(arg)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(to_mark())
            case "APPEND":
                item = stack.pop()
                _must_be(stack[-1], list).append(item)
            case "APPENDS":
                items = to_mark()
                _must_be(stack[-1], list).extend(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(op.name[-1])
                if len(stack) < size:
                    raise ValueError("a tuple of nothing")
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_filled({}, to_mark()))
            case "SETITEM":
                pair = [stack.pop(), stack.pop()][::-1]
                _filled(stack[-1], pair)
            case "SETITEMS":
                items = to_mark()
                _filled(stack[-1], items)
            case "GLOBAL":
                stack.append(_global(arg))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(f"{_must_be(module, str)} {_must_be(name, str)}"))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                if not callable(function):
                    raise ValueError("a call of what is no function")
                stack.append(function(*_must_be(args, tuple)))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Array):
                    stack[-1].build(state)
                elif not isinstance(stack[-1], _Dtype):  # whose state is byte order and the like
                    raise ValueError("a state for what has none")
            case name:
                raise ValueError(f"the opcode {name}, which plain data do without")
    raise ValueError("no end")


def _global(name):
    if name not in _GLOBALS:
        raise ValueError(f"it asks for {printable(name)}, which no data need")
    return _GLOBALS[name]


def _must_be(value, kind):
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} for a {kind.__name__}")
    return value


def _filled(target, items):
    """Put keys and values, in turn, into the dict `target`. A key is text: tuples in tuples could hash for ever."""
    _must_be(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_must_be(key, bytes | str)] = value
    return target


def _finished(value):
    """The value with arrays in place of their stand-ins, as a dict's values; deeper down the batches hold none."""
    if isinstance(value, dict):
        return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}
    return value.value if isinstance(value, _Array) else value
