"""Ctrl-C and SIGTERM: the first ends a training step and then the run, a second ends at once."""

import os
import signal
import threading
from contextlib import contextmanager, suppress

from fastai.callback.core import Callback

__all__ = ["Stopped", "StopOnSignal", "catch_signals"]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `resume` is the command that goes on with it, once there is a checkpoint."""

    def __init__(self, signum, resume=None):
        super().__init__()
        self.signum, self.resume = signum, resume


class _Pending:
    """The signal that came while a step was running, and whether one is."""

    signum, in_training = None, False


_pending = _Pending()


def _handle(signum, frame):
    if _pending.signum is not None:
        os._exit(128 + signum)  # the second one does not ask
    _pending.signum = signum
    if not _pending.in_training:
        raise Stopped(signum)
    with suppress(OSError):
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print is not safe in here


@contextmanager
def catch_signals():
    """While the block runs, SIGINT and SIGTERM raise `Stopped`: in training after the step, elsewhere at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    _pending.signum, _pending.in_training = None, False
    old = {signum: signal.signal(signum, _handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


class StopOnSignal(Callback):
    """End the fit after the step in which a signal came."""

    order = 120

    def before_fit(self):
        self.after_batch()  # it may have come where Python drops exceptions, in a destructor
        _pending.in_training = True

    def after_batch(self):
        if _pending.signum is not None:
            _pending.in_training = False
            raise Stopped(_pending.signum)

    def after_fit(self):
        _pending.in_training = False
        self.after_batch()
