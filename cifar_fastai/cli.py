"""A recipe's `main` as a command: its signature is the command line, its errors are one line and an exit status."""

import os
import signal
import sys
import warnings
from functools import wraps

from fastcore.script import anno_parser

from cifar_fastai.errors import RunError

__all__ = ["command"]


def command(defaults=None):
    """Decorate a `main` so that, called without arguments, it reads the command line and exits with a status.

    `defaults` are the values that parameters left at None will take; `--help` shows them. A call with arguments,
    from a notebook or a test, is a plain call.
    """

    def decorate(main):
        @wraps(main)
        def run(*args, **kwargs):
            if args or kwargs:
                return main(*args, **kwargs)
            given = vars(_parser(main, defaults or {}).parse_args())
            del given["pdb"], given["xtra"]
            sys.exit(_run(main, given))

        return run

    return decorate


def _parser(main, defaults):
    parser = anno_parser(main)
    for action in parser._actions:
        if action.dest in defaults:
            if defaults[action.dest] is not None and defaults[action.dest] is not False:
                action.help = f"{action.help} (default: {defaults[action.dest]})"
        if action.help and action.help != "==SUPPRESS==":
            action.help = action.help.replace(" (default: False)", "")
    return parser


def _run(main, given):
    """Run `main`; its exit status is 0, that of the error, or 128 + the signal that ended it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # torch about its own jit, at import
    try:
        main(**given)
        return 0
    except KeyboardInterrupt as stop:  # signals.Stopped among them, which knows more
        resume = getattr(stop, "resume", None)
        print(f"\nstopped; go on with: {resume}" if resume else "\nstopped", file=sys.stderr, flush=True)
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except BrokenPipeError:  # whoever read the output has gone
        _leave_broken_stdout()
        return 128 + 13
    except Exception as error:
        if given.get("debug"):
            raise
        _leave_broken_stdout()
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        return getattr(error, "status", 1)


def _leave_broken_stdout():
    """Where nothing can be printed any more, let Python not try again, and complain, at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error):
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        resume = getattr(error, "resume", None)
        return f"{where}{error.strerror}" + (f"; go on with: {resume}" if resume else "")
    lines = (str(error).strip() or "no message").splitlines()
    first = lines[-1].strip() if lines[0].startswith("Exception occured in") else lines[0]  # fastai's own in front
    return f"{type(error).__name__}: {first} (the traceback: --debug)"
