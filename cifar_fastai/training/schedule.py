"""The learning-rate schedules of a run, through fastai: `fit_one_cycle` where it can say it, else `ParamScheduler`."""

from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["Pieces", "Plateau", "StepLR", "fit_scheduled", "one_cycle", "one_cycle_steps", "peak_fraction"]


class Pieces:
    """fastai schedule: `first` for the first `pct` of the run, then `second`.

    What fastai's `combine_scheds` gives, in plain floats: that one reads a dozen numbers out of tensors at every step.
    """

    def __init__(self, pct, first, second):
        self.pct, self.first, self.second = pct, first, second

    def __call__(self, pos):
        return self.first(pos / self.pct) if pos < self.pct else self.second((pos - self.pct) / (1 - self.pct))


def one_cycle(pct, start, peak, end, anneal="cos"):
    """fastai schedule: from `start` up to `peak` in the first `pct` of the run, then down to `end`; cos or linear.

    Smith & Topin: Super-Convergence, arXiv:1708.07120; the cosine shape is fastai's.
    """
    shape = SchedCos if anneal == "cos" else SchedLin
    return Pieces(pct, shape(start, peak), shape(peak, end))


def one_cycle_steps(cfg, n_steps):
    """Learning rate and momentum at each step of a one-cycle run of `n_steps` steps: two lists."""
    at, low = peak_fraction(cfg), cfg.momentum if cfg.mom_min is None else cfg.mom_min
    lr = one_cycle(at, cfg.lr / cfg.div, cfg.lr, cfg.lr / cfg.div_final, cfg.anneal)
    mom = one_cycle(at, cfg.momentum, low, cfg.momentum, cfg.anneal)
    return [lr(k / n_steps) for k in range(n_steps)], [mom(k / n_steps) for k in range(n_steps)]


class StepLR:
    """fastai schedule: `lr` times `gamma` for every `step_size` epochs that have passed, as torch's StepLR."""

    def __init__(self, lr, n_epoch, step_size, gamma):
        self.lr, self.n_epoch, self.step_size, self.gamma = lr, n_epoch, step_size, gamma

    def __call__(self, pct):
        epoch = int(pct * self.n_epoch + 1e-6)  # pct is a sum of many small parts
        return self.lr * self.gamma ** (epoch // self.step_size)


class Plateau(Callback):
    """torch's `ReduceLROnPlateau` on the validation loss (fastai's does not reach a torch optimizer)."""

    order = 62

    def __init__(self, gamma, patience):
        self.gamma, self.patience, self.scheduler = gamma, patience, None

    def before_train(self):
        if self.scheduler is None:
            self.scheduler = ReduceLROnPlateau(self.opt.opt, factor=self.gamma, patience=self.patience)

    def after_validate(self):
        if self.scheduler is not None and not hasattr(self.learn, "gather_preds"):
            self.scheduler.step(self.recorder.loss.value)

    def state_dict(self):
        state = self.scheduler.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, (int, float, list))}


def peak_fraction(cfg):
    """Where the peak of the cycle lies, as a fraction of the run."""
    return cfg.peak_epoch / cfg.epochs if cfg.peak_epoch else cfg.pct_start


def fit_scheduled(learn, cfg, lr, cbs=(), start_epoch=0):
    """Fit `learn` for `cfg.epochs` on the schedule that `cfg` names, with `lr` as its highest learning rate."""
    cbs = list(cbs)
    low = cfg.momentum if cfg.mom_min is None else cfg.mom_min
    moms = (cfg.momentum, low, cfg.momentum)
    if cfg.sched == "one-cycle":
        learn.fit_one_cycle(
            cfg.epochs,
            lr,
            div=cfg.div,
            div_final=cfg.div_final,
            pct_start=peak_fraction(cfg),
            moms=moms,
            cbs=cbs,
            start_epoch=start_epoch,
            anneal=cfg.anneal,
        )
        return
    if cfg.sched == "flat-cos":  # fastai's fit_flat_cos knows no start_epoch
        cbs.append(ParamScheduler({"lr": Pieces(cfg.pct_start, SchedCos(lr, lr), SchedCos(lr, lr / cfg.div_final))}))
    elif cfg.sched == "step":
        cbs.append(ParamScheduler({"lr": StepLR(lr, cfg.epochs, cfg.step_size, cfg.gamma)}))
    elif cfg.sched == "plateau":
        cbs.append(Plateau(cfg.gamma, cfg.plateau_patience))
    learn.fit(cfg.epochs, lr, cbs=cbs, start_epoch=start_epoch)
