"""Errors that a user can act on: one line with the value, what is wrong with it and what to do."""

from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

__all__ = ["InputError", "RunError", "check_choice", "check_extra", "escaped", "printable", "reason", "renamed"]


class RunError(Exception):
    """A run cannot go on, for example because of a full disk or a loss that is not a number. Exit status 1.

    `arguments` are the wrong arguments and their values: `InputError("must be below 1", valid_pct=2)` reads
    "valid_pct=2: must be below 1". The message names other arguments in backticks.
    """

    status = 1

    def __init__(self, message, /, **arguments):
        values = ", ".join(f"{name}={printable(repr(value))}" for name, value in arguments.items())
        self.text, self.arguments, self.line = message, arguments, f"{values}: {message}" if values else message
        super().__init__(self.line)

    def __str__(self):  # fastai changes `args` of what a callback raises
        return self.line


class InputError(RunError):
    """An argument, a file or a data set cannot be used. Exit status 2."""

    status = 2


@contextmanager
def renamed(**names):
    """In this block, an InputError calls its arguments by the caller's names: `renamed(cam_method="method")`."""
    try:
        yield
    except InputError as error:
        arguments = {names.get(name, name): value for name, value in error.arguments.items()}
        raise InputError(error.text, **arguments) from None


def check_choice(choices, **argument):
    """Return the value of the one keyword argument if it is among `choices`; else raise InputError with near names."""
    ((name, value),) = argument.items()
    if value in choices:
        return value
    lower = {str(choice).lower(): choice for choice in choices}
    near = [lower[match] for match in get_close_matches(str(value).lower(), lower, n=2, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(map(str, choices))}"
    raise InputError(f"no such name; {hint}", **argument)


def check_extra(extra, *modules):
    """InputError unless `modules` are installed, which the optional dependencies of the name `extra` are."""
    for module in modules:
        if getattr(find_spec(module), "origin", None) is None:  # a folder of that name is no module
            raise InputError(f'{module} is not installed: pip install "cifar_fastai[{extra}]"')


def escaped(text):
    """A text from outside as one line without control characters, which a terminal would obey."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]


def printable(text):
    """A name from outside as one short line of printable text."""
    text = escaped(text)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def reason(error):
    """Why an exception was raised, in a few words on one line."""
    cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return printable(str(getattr(cause, "strerror", None) or cause).strip() or type(error).__name__)
