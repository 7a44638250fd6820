"""The learning-rate range test as numbers: fastai's `lr_find`, with everything put back as it was, whatever happens."""

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from fastai.callback.schedule import SuggestionMethod

from cifar_fastai.errors import RunError
from cifar_fastai.names import SUGGESTIONS
from cifar_fastai.plots.charts import plot_lr_find
from cifar_fastai.training.checkpoint import random_states, set_random_states

__all__ = ["RangeTest", "range_test", "untouched"]


@dataclass(frozen=True)
class RangeTest:
    """Learning rates and smoothed losses by step, and what each rule suggests (None where it finds nothing)."""

    lrs: list
    losses: list
    suggestions: dict

    def plot(self):
        """A Figure of the loss by learning rate, the suggestions marked."""
        return plot_lr_find(self.lrs, self.losses, self.suggestions)


@contextmanager
def untouched(learn):
    """Put the learner's weights, optimizer and every random state back when the block ends, also by an interrupt."""
    weights = {name: value.clone() for name, value in learn.model.state_dict().items()}
    opt = None if learn.opt is None else learn.opt.state_dict()
    states, training, loss_func = random_states(learn.dls), learn.model.training, learn.loss_func
    try:
        yield
    finally:
        learn.model.load_state_dict(weights)
        learn.model.zero_grad()
        learn.model.train(training)
        learn.opt = None
        if opt is not None:
            learn.create_opt()
            learn.opt.load_state_dict(opt)
        learn.loss_func = loss_func  # MixUp puts its own there
        learn("after_cancel_batch")  # leaves autocast, if an interrupt came within
        set_random_states(states, learn.dls)


def range_test(learn, start_lr=1e-5, end_lr=10, num_it=100):
    """Train `num_it` steps while the learning rate grows from `start_lr` to `end_lr`; a RangeTest.

    On train images alone; the learner and the random states are afterwards as before, but for `learn.range_test`, which
    keeps the result for `write_run`. Smith: Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.
    RunError when the loss is never a number.
    """
    model_dir = learn.model_dir
    with untouched(learn), tempfile.TemporaryDirectory() as folder:
        learn.model_dir = folder  # lr_find saves the model beside others otherwise
        try:
            learn.lr_find(start_lr, end_lr, num_it, suggest_funcs=None, show_plot=False)
            lrs = [float(lr) for lr in learn.recorder.lrs]
            losses = [float(loss) for loss in learn.recorder.losses]
        finally:
            learn.model_dir = model_dir
            learn.remove_cbs([cb for cb in learn.cbs if cb.name == "lr_finder"])  # an interrupt leaves it
    finite = int(np.argmin(np.isfinite(losses))) if not np.all(np.isfinite(losses)) else len(losses)
    lrs, losses = lrs[:finite], losses[:finite]
    if len(lrs) < 10:
        raise RunError(f"the range test saw only {len(lrs)} steps with a finite loss; try a lower start")
    learn.range_test = RangeTest(lrs, losses, _suggest(lrs, losses, num_it))
    return learn.range_test


def _suggest(lrs, losses, num_it):
    """What fastai's rules say, without the first tenth and the last five steps, as in its lr_find."""
    first, last = min(num_it // 10, len(lrs) // 4), len(lrs) - (5 if len(lrs) > 20 else 0)
    lrs, losses = torch.tensor(lrs[first:last]), torch.tensor(losses[first:last])
    found = {}
    for name in SUGGESTIONS:
        try:
            found[name] = float(getattr(SuggestionMethod, name.capitalize())(lrs, losses, num_it)[0])
        except (IndexError, ValueError):
            found[name] = None
    return found
