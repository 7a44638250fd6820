"""Errors that a user can mend: one line saying what was wrong, with the value, and what to do."""

import re

from fastcore.imports import IN_NOTEBOOK

__all__ = ["InputError", "RunError"]


class RunError(Exception):
    """A run could not go on (a full disk, a loss that is no number). The recipe ends with status 1."""

    status = 1

    def __init__(self, message):
        super().__init__(message)
        self.message = message

    def __str__(self):  # fastai rewrites the args of what a callback raises; the message stays one line
        return _as_arguments(self.message) if IN_NOTEBOOK else self.message


class InputError(RunError):
    """What was given cannot be used (a parameter, a file, a data set). The recipe ends with status 2."""

    status = 2


def _as_arguments(message):
    """`message` with parameters named as a call takes them: `--valid-pct 2` is `valid_pct 2` in a notebook."""
    return re.sub(r"(?<![\w-])--(?!resume)([a-z]\w*(?:-\w+)*)", lambda flag: flag[1].replace("-", "_"), message)
