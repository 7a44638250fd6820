"""Ctrl-C and SIGTERM end a fit after the step; what a parent process ignores stays ignored."""

import os
import signal

import pytest
from fastai.callback.core import Callback

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.signals import StopOnSignal, Stopped, catch_signals


class Strike(Callback):
    """Send this process a signal within the second step."""

    def __init__(self, signum):
        self.signum, self.n_steps = signum, 0

    def after_pred(self):
        if self.training and self.train_iter == 1:
            os.kill(os.getpid(), self.signum)

    def after_step(self):
        self.n_steps += 1


def fit(images, model, signum):
    learn = cifar_learner(cifar_dls(images, bs=8, device="cpu"), model, cbs=[Strike(signum), StopOnSignal()])
    with learn.no_bar(), learn.no_logging(), catch_signals():
        try:
            learn.fit(1)
        except Stopped as stopped:
            assert stopped.signum == signum
    return learn.strike.n_steps


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_step_is_finished_and_no_other_begun(tiny_images, tiny_model, signum):
    old = signal.getsignal(signum)
    assert fit(tiny_images, tiny_model, signum) == 2 and signal.getsignal(signum) is old


def test_outside_of_training_it_stops_at_once():
    with pytest.raises(Stopped), catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")


def test_an_ignored_signal_stays_ignored(tiny_images, tiny_model):
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert fit(tiny_images, tiny_model, signal.SIGINT) == 6
    finally:
        signal.signal(signal.SIGINT, old)
