"""Loggers: the numbers of a run for TensorBoard, Weights & Biases, or a program of your own."""

import errno
import io
import os
import socket
import time
from pathlib import Path

import torch
from PIL import Image

from cifar_fastai.errors import check_extra
from cifar_fastai.training.recorder import FitCallback


class RunLog(FitCallback):
    """The base of loggers: collects what a run measures, and hands it over when an epoch or the run ends.

    A subclass has `write(values, start)`: `values` are tuples (tag, number, step), of an epoch whose first step is
    `start`, or results. One that takes pictures also has `write_results`. `config`, the parameters of the run, is by
    default `learn.settings` when the fit begins; `folder` is the run's folder.
    """

    order = 75

    def __init__(self, folder, config=None):
        self.folder, self.config = Path(folder), config

    def before_fit(self):
        self.config = dict(self.learn.settings) if self.config is None else self.config
        self.learn.history.logs = self.learn.history.logs | {self.name: self}

    def before_train(self):
        self.losses = []

    def after_batch(self):
        if self.training:
            self.losses.append(self.loss.detach())

    def after_epoch(self):
        history = self.learn.history
        if history.trained_epoch != self.epoch:
            return
        end = len(history.lrs)
        start = end - len(self.losses)
        steps = dict(loss=torch.stack(self.losses).tolist(), lr=history.lrs[start:], momentum=history.moms[start:])
        values = [(f"step/{name}", value, k) for name in steps for k, value in enumerate(steps[name], start)]
        names = {name: name.replace("valid", history.eval_split) for name in history.rows[-1] if name != "epoch"}
        values += [(f"epoch/{names[name]}", history.rows[-1][name], end - 1) for name in names]
        self.write([value for value in values if value[1] is not None], start)

    def add_results(self, metrics, pictures, n_steps):
        """Add the accuracies in `metrics`, of metrics.json, and `pictures`, {name: Figure}, at the last step."""
        split, images = "valid" if metrics["test_accuracy"] is None else "test", {}
        values = dict(accuracy=metrics[f"{split}_accuracy"], tta_accuracy=metrics["tta_accuracy"])
        values |= dict(tta_shift_accuracy=metrics["tta_shift_accuracy"])
        results = {f"final/{split}_{name}": value for name, value in values.items() if value is not None}
        for name, figure in pictures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            images[f"pictures/{name}"] = buffer
        self.write_results(results, images, max(0, n_steps - 1))

    def write_results(self, results, pictures, step):
        """Write {tag: number} and {tag: BytesIO of a PNG file} at the last `step`."""
        self.write([(tag, value, step) for tag, value in results.items()], 0)


class TensorBoardLog(RunLog):
    """Losses, accuracies, learning rate and momentum for TensorBoard, into the folder tensorboard of the run's folder.

    Per step, written when an epoch ends; the numbers of an epoch stand at its last step. A resumed run hides, by their
    step, those of an epoch that it repeats. Written without a thread, so that a full disk ends in one error. (fastai's
    `TensorBoardCallback` traces the model, which fails under mixed precision, and reads the loss at every step.)
    """

    file = None

    def __init__(self, folder, config=None):
        super().__init__(Path(folder) / "tensorboard", config)
        check_extra("tensorboard", "tensorboard")

    def write(self, values, start):
        self._append([({"value": [{"tag": tag, "simple_value": value}]}, step) for tag, value, step in values], start)

    def write_results(self, results, pictures, step):
        from torch.utils.tensorboard.summary import hparams

        super().write_results(results, pictures, step)
        summaries = list(hparams(self.config or {}, results))
        for tag, png in pictures.items():
            (width, height), content = Image.open(png).size, png.getvalue()
            image = dict(width=width, height=height, colorspace=4, encoded_image_string=content)  # 4: RGBA
            summaries.append({"value": [{"tag": tag, "image": image}]})
        self._append([(summary, step) for summary in summaries])

    def _append(self, summaries, purge_step=0):
        """Append tuples (summary, step); TensorBoard hides older files' values from `purge_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary, step in summaries]
        try:
            if self.file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.folder.is_symlink():
                    raise PermissionError(errno.EPERM, "is a link, and not a folder of this run")
                self.file = self.folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
                starts = [dict(file_version="brain.Event:2"), dict(session_log={"status": 1})]  # 1: START, which hides
                starts = starts if purge_step else starts[:1]
                events = [*(Event(wall_time=now, step=purge_step, **start) for start in starts), *events]
            with open(self.file, "ab", opener=_open_no_link) as file:
                writer = RecordWriter(file)
                for event in events:
                    writer.write(event.SerializeToString())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from None


class WandbLog(RunLog):
    """The same for Weights & Biases, which keeps its files in the folder wandb of the run's folder.

    `wandb login` and the variables of its environment apply, such as WANDB_MODE=offline and WANDB_PROJECT. A resumed
    run goes on in the same run of W&B.
    """

    session = None

    def __init__(self, folder, config=None):
        super().__init__(folder, config)
        check_extra("wandb", "wandb")

    def before_train(self):
        super().before_train()
        self._start()

    def _start(self):
        import wandb

        if self.session is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            ids = [
                path.name.rpartition("-")[2] for path in sorted(self.folder.glob("wandb/*run-*"), key=os.path.getmtime)
            ]
            options = dict(project=os.environ.get("WANDB_PROJECT", "cifar_fastai"), name=self.folder.resolve().name)
            options |= dict(id=ids[-1], resume="allow") if ids else {}
            settings = wandb.Settings(console="off", quiet=True, reinit="finish_previous")  # stdout stays
            self.session = wandb.init(dir=self.folder, config=self.config, settings=settings, **options)
        return self.session

    def write(self, values, start):
        steps = {}
        for tag, value, step in values:
            steps.setdefault(step, {})[tag] = value
        for step, numbers in sorted(steps.items()):
            self._start().log(numbers, step=step)

    def write_results(self, results, pictures, step):
        from wandb import Image as Picture

        self._start().log(results | {tag: Picture(Image.open(png)) for tag, png in pictures.items()}, step=step)
        self.session.finish()
        self.session = None


LOGGERS = {"tensorboard": TensorBoardLog, "wandb": WandbLog}


def _open_no_link(path, flags):
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
