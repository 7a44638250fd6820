"""TensorBoard logs of a run, written without a thread, so that a full disk ends in one error.

fastai's `TensorBoardCallback` traces the model, which fails under mixed precision, and reads the loss at every step.
"""

import errno
import io
import os
import socket
import time
from pathlib import Path

import torch
from PIL import Image

from cifar_fastai.training.recorder import FitCallback


class TensorBoardLog(FitCallback):
    """Losses, accuracies, learning rate and momentum into `folder`: per step, written when an epoch ends.

    The numbers of an epoch stand at its last step. A resumed run hides, by their step, those of an epoch that it
    repeats.
    """

    order, file = 75, None

    def __init__(self, folder):
        self.folder = Path(folder)

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
        values = [(tag, {"simple_value": value}, step) for tag, value, step in values if value is not None]
        self._write(values, purge_step=start)

    def add_results(self, metrics, pictures, n_steps):
        """Add the accuracies in `metrics`, of metrics.json, and `pictures`, {name: Figure}, at the last step."""
        step, names = max(0, n_steps - 1), ("test_accuracy", "tta_accuracy", "tta_shift_accuracy")
        values = [
            (f"final/{name}", {"simple_value": metrics[name]}, step) for name in names if metrics[name] is not None
        ]
        for name, figure in pictures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            (width, height), png = Image.open(buffer).size, buffer.getvalue()
            image = dict(width=width, height=height, colorspace=4, encoded_image_string=png)  # 4: RGBA
            values.append((f"pictures/{name}", {"image": image}, step))
        self._write(values)

    def _write(self, values, purge_step=0):
        """Append `values`, tuples of (tag, value, step); TensorBoard hides older files' values from `purge_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = [Event(wall_time=now, step=step, summary={"value": [{"tag": tag, **x}]}) for tag, x, step in values]
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


def _open_no_link(path, flags):
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
