"""Errors that a user can mend: one line saying what was wrong, with the value, and what to do."""

__all__ = ["InputError", "RunError"]


class RunError(Exception):
    """A run could not go on (a full disk, a loss that is no number). The recipe ends with status 1."""

    status = 1


class InputError(RunError):
    """What was given cannot be used (a parameter, a file, a data set). The recipe ends with status 2."""

    status = 2
