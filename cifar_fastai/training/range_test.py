"""The learning-rate range test as numbers: fastai's `lr_find`, with everything put back as it was, whatever happens."""

import copy
import math
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from fastai.callback.schedule import LRFinder, SuggestionMethod

from cifar_fastai.errors import InputError, RunError
from cifar_fastai.plots.charts import plot_lr_find
from cifar_fastai.settings import choices
from cifar_fastai.training.checkpoint import random_states, set_random_states


@dataclass(frozen=True, repr=False)
class RangeTest:
    """Learning rates and smoothed losses by step, and what each rule suggests (None where it finds nothing)."""

    lrs: list
    losses: list
    suggestions: dict

    def __repr__(self):
        found = ", ".join(f"{name} {'-' if lr is None else f'{lr:.3g}'}" for name, lr in self.suggestions.items())
        return f"{len(self.lrs)} steps from lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}; suggestions: {found}"

    def plot(self):
        """A Figure of the loss by learning rate, the suggestions marked."""
        return plot_lr_find(self.lrs, self.losses, self.suggestions)


@contextmanager
def untouched(learn):
    """Restore the learner's weights, optimizer, callbacks and every random state when the block ends, however it ends.

    The learner's `model_dir` is a temporary folder in the block.
    """
    weights = {name: value.clone() for name, value in learn.model.state_dict().items()}
    opt = None if learn.opt is None else copy.deepcopy(learn.opt.state_dict())  # it holds the tensors themselves
    states, training = random_states(learn.dls), learn.model.training
    loss_func, model_dir = learn.loss_func, learn.model_dir
    try:
        with tempfile.TemporaryDirectory() as learn.model_dir:
            yield
    finally:
        learn.model.load_state_dict(weights)
        learn.model.zero_grad()
        learn.model.train(training)
        learn.opt = None
        if opt is not None:
            learn.create_opt()
            learn.opt.load_state_dict(opt)
        learn.loss_func, learn.model_dir = loss_func, model_dir  # MixUp replaces the loss
        learn.remove_cbs(learn._grab_cbs(LRFinder))  # an interrupt may leave it
        learn("after_cancel_batch")  # leaves autocast after an interrupt
        set_random_states(states, learn.dls)


def check_range(start_lr, end_lr, num_it):
    """Raise InputError for arguments that no range test can use."""
    if not 1e-12 <= start_lr < end_lr <= 1e6:
        raise InputError("must rise, and lie between 1e-12 and 1e6", start_lr=start_lr, end_lr=end_lr)
    if not 20 <= num_it <= 100_000:
        raise InputError("must be from 20 to 100,000 steps", num_it=num_it)


def range_test(learn, start_lr=1e-5, end_lr=10.0, num_it=100):
    """Train `num_it` steps while the learning rate grows from `start_lr` to `end_lr`; a RangeTest.

    On train images alone; the learner and the random states are afterwards as before, except for `learn.range_test`,
    which keeps the result for `write_run`. Smith: Cyclical Learning Rates for Training Neural Networks,
    arXiv:1506.01186. InputError for wrong arguments; RunError when too few steps have a finite loss.
    """
    check_range(start_lr, end_lr, num_it)
    with untouched(learn):
        learn.lr_find(start_lr, end_lr, num_it, suggest_funcs=None, show_plot=False)
        lrs, losses = ([float(value) for value in values] for values in (learn.recorder.lrs, learn.recorder.losses))
    n_finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if n_finite < 10:
        raise RunError(f"the range test saw only {n_finite} steps with a finite loss; try a lower start")
    lrs, losses = lrs[:n_finite], losses[:n_finite]
    learn.range_test = RangeTest(lrs, losses, suggest(lrs, losses, num_it))
    return learn.range_test


def suggest(lrs, losses, num_it):
    """{rule: learning rate}, None where a rule finds none, or one after the loss has exploded.

    A loss has exploded that comes after the lowest and is half above the highest before it. The first losses, which
    the rules leave out as well, cannot be the lowest: they are those of single batches.
    """
    n, suggestions = len(lrs), dict.fromkeys(choices("lr_suggest"))
    first = min(num_it // 10, n // 4)  # as in fastai's lr_find, and so is the last
    lowest = min(range(first, n), key=losses.__getitem__)
    limit = next((lrs[k] for k in range(lowest, n) if losses[k] > 1.5 * max(losses[: lowest + 1])), math.inf)
    used = slice(first, n - (5 if n > 20 else 0))
    for name in suggestions:
        rule = getattr(SuggestionMethod, name.capitalize())
        with suppress(IndexError, ValueError):
            lr = float(rule(torch.tensor(lrs[used]), torch.tensor(losses[used]), num_it)[0])
            suggestions[name] = lr if lr < torch.tensor(limit) else None  # in float32, as the rules
    return suggestions
