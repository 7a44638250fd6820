"""The learning-rate schedules of a run: `fit_one_cycle`, or fastai's `ParamScheduler` with a schedule from here."""

from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cifar_fastai.training.recorder import FitCallback


def two_pieces(pct, first, second):
    """fastai schedule: `first` for the first `pct` of the run, then `second`.

    The same as fastai's `combine_scheds`, in plain floats: that one reads a dozen numbers out of tensors at every step.
    """
    return lambda pos: first(pos / pct) if pos < pct else second((pos - pct) / (1 - pct))


def one_cycle(pct, start, peak, end, anneal="cos"):
    """fastai schedule: from `start` up to `peak` in the first `pct` of the run, then down to `end`; cos or linear.

    Smith & Topin: Super-Convergence, arXiv:1708.07120; the cosine shape is fastai's.
    """
    shape = SchedCos if anneal == "cos" else SchedLin
    return two_pieces(pct, shape(start, peak), shape(peak, end))


def step_lr(lr, n_epoch, step_size, gamma):
    """fastai schedule: `lr` times `gamma` for every `step_size` epochs that have passed, as torch's StepLR."""
    return lambda pos: lr * gamma ** (int(pos * n_epoch + 1e-6) // step_size)  # pos is a sum of many small parts


def one_cycle_steps(settings, n_steps):
    """Learning rate and momentum at each step of a one-cycle run of `n_steps` steps: two lists."""
    s, pct = settings, settings.peak_fraction
    lr, mom = one_cycle(pct, s.lr / s.div, s.lr, s.lr / s.div_final, s.anneal), one_cycle(pct, *_moms(s), s.anneal)
    return [lr(k / n_steps) for k in range(n_steps)], [mom(k / n_steps) for k in range(n_steps)]


def _moms(settings):
    high, low = settings.momentum, settings.mom_min
    return high, high if low is None else low, high


class Plateau(FitCallback):
    """torch's `ReduceLROnPlateau` on the validation loss (fastai's does not reach a torch optimizer)."""

    order, scheduler, saved = 62, None, ("scheduler",)

    def __init__(self, gamma, patience):
        self.gamma, self.patience = gamma, patience

    def before_train(self):
        if self.scheduler is None:
            self.scheduler = ReduceLROnPlateau(self.opt.opt, factor=self.gamma, patience=self.patience)

    def after_validate(self):
        if self.scheduler is not None:
            self.scheduler.step(self.recorder.loss.value)


def fit_scheduled(learn, settings, lr, cbs=()):
    """Fit `learn` for `settings.epochs` on the schedule of `settings`, with `lr` as its highest learning rate."""
    s, cbs = settings, list(cbs)
    if s.sched == "one-cycle":
        cycle = dict(div=s.div, div_final=s.div_final, pct_start=s.peak_fraction, moms=_moms(s), anneal=s.anneal)
        learn.fit_one_cycle(s.epochs, lr, **cycle, cbs=cbs)
        return
    if s.sched == "flat-cos":
        cbs.append(ParamScheduler({"lr": two_pieces(s.pct_start, SchedCos(lr, lr), SchedCos(lr, lr / s.div_final))}))
    elif s.sched == "step":
        cbs.append(ParamScheduler({"lr": step_lr(lr, s.epochs, s.step_size, s.gamma)}))
    elif s.sched == "plateau":
        cbs.append(Plateau(s.gamma, s.plateau_patience))
    learn.fit(s.epochs, lr, cbs=cbs)
