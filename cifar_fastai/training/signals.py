"""Ctrl-C and SIGTERM: the first ends a training step and then the run, a second ends the process at once."""

import os
import signal
import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from fastai.callback.core import Callback

from cifar_fastai.hardware import rank


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `resume` is the command that resumes it, once there is a checkpoint."""

    def __init__(self, signum=signal.SIGINT, resume=None):  # a pickle sets them later
        super().__init__()
        self.signum, self.resume = signum, resume


_state = SimpleNamespace(signum=None, in_training=False)  # the signal that arrived; whether a step is running


def _handle(signum, frame):
    if _state.signum is not None:
        os._exit(128 + signum)
    _state.signum = signum
    if not _state.in_training:
        raise Stopped(signum)
    with suppress(OSError):
        if rank() == 0:  # print is not safe in a handler
            os.write(2, b"\nstopping after this step; once more to stop at once\n")


@contextmanager
def catch_signals():
    """While the block runs, SIGINT and SIGTERM raise `Stopped`: in training after the step, elsewhere at once.

    A signal that the parent process made this one ignore (nohup, a job in the background) stays ignored.
    """
    _state.signum, _state.in_training, handlers = None, False, {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    handlers = {signum: handler for signum, handler in handlers.items() if handler is not signal.SIG_IGN}
    try:
        for signum in handlers:
            signal.signal(signum, _handle)
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


class StopOnSignal(Callback):
    """End the fit after the step in which a signal came."""

    order = 120

    def before_fit(self):
        self.after_batch()  # it may have come where Python drops exceptions, in a destructor
        _state.in_training = True

    def after_batch(self):
        if _state.signum is not None:
            _state.in_training = False
            raise Stopped(_state.signum)

    def after_fit(self):
        _state.in_training = False
        self.after_batch()
