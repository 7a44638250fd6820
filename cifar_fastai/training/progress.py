"""A progress line for a terminal: how far the epoch is, how long the run will take. A log file gets none of it."""

import sys
import time

from fastai.callback.core import Callback

__all__ = ["ConsoleProgress"]


class ConsoleProgress(Callback):
    """Redraw one line a few times a second on a terminal; it is gone when the epoch's own line is printed."""

    order = 64

    def __init__(self, every=0.25):
        self.every, self.on = every, sys.stderr.isatty()
        self.drawn, self.began, self.done = 0.0, None, 0

    def before_train(self):
        self.began = self.began or time.monotonic()

    def after_batch(self):
        now = time.monotonic()
        if self.training:
            self.done += 1
        if not self.on or self.began is None or now - self.drawn < self.every:
            return
        self.drawn = now
        if hasattr(self.learn, "lr_finder"):  # a fit that ends within an epoch
            num_it = self.learn.lr_finder.num_it
            head, what, share, steps = " " * 7, "range test", self.done / num_it, num_it - self.done
        else:
            head, what = f"{self.epoch + 1:>3}/{self.n_epoch:<3}", "train" if self.training else "evaluate"
            share = (self.iter + 1) / self.n_iter
            steps = (self.n_epoch - self.epoch - self.pct_epoch) * len(self.dls.train)
        minutes, seconds = divmod(int((now - self.began) / self.done * steps), 60)
        bar = f"[{'=' * int(20 * share):<20}] {what}, {minutes}:{seconds:02} left"
        sys.stderr.write(f"\r{head}  {bar} \033[K")
        sys.stderr.flush()

    @property
    def pct_epoch(self):
        return (self.iter + 1) / self.n_iter if self.training else 1.0

    def after_validate(self):
        self._clear()

    def after_fit(self):
        self._clear()

    def _clear(self):
        if self.on:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
