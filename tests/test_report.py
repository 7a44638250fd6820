"""report.html: what is on the page, that it is escaped and complete, and that it stays small."""

import base64
import csv
import io
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cifar_fastai.config import BASE
from cifar_fastai.errors import InputError
from cifar_fastai.report import LIMIT, Tiles, write_report

HOSTILE = ("<script>alert(1)</script>", "\"'&</script><!--", "ok")


def make_run(folder, classes=("red", "green", "blue"), n=60, wrong=0.3, epochs=3, cams=True, seed=0, **metrics):
    """A run folder with everything that `write_report` reads but figures, and the Tiles of its errors.

    `n` images, about the fraction `wrong` of them misclassified; `metrics` replaces entries of metrics.json.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    true = np.arange(n) % len(classes)
    predicted = np.where(rng.random(n) < wrong, (true + rng.integers(1, len(classes), n)) % len(classes), true)
    confidence, losses = rng.uniform(0.3, 1, n), rng.exponential(2, n)
    names = np.array(classes, dtype=object)
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "target", "predicted", "confidence", "loss"])
        writer.writerows(zip(range(n), names[true], names[predicted], confidence, losses, strict=True))
    columns = "epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "images_per_second", "seconds"
    with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for k in range(epochs):
            writer.writerow([k + 1, 2 / (k + 1), 1 - 0.7 / (k + 1), 1.8 / (k + 1), 1 - 0.6 / (k + 1), 0.01, 900.5, 1.2])
    accuracy = float((true == predicted).mean())
    write_json(folder / "metrics.json", {
        "dataset": "made-up", "model": "resnet18", "parameters": 11173962, "epochs": 3, "seed": 42, "device": "cpu",
        "precision": "fp32", "eval_split": "test", "train_accuracy": 0.7667, "valid_accuracy": accuracy,
        "valid_loss": 0.61234, "test_accuracy": accuracy, "tta_accuracy": accuracy + 0.01, "tta_shift_accuracy": None,
        "class_accuracy": dict.fromkeys(classes), "images_per_second": 901.2, "seconds": 75.3, **metrics})  # fmt: skip
    given = {"epochs": 3, "data": "/some where/it's", "label_smoothing": 0.1, "no_test": True, "out": "runs/x"}
    write_json(folder / "config.json", {**BASE, **given, "recipe": "resnet18", "given": given,
                                        "versions": {"python": "3.12", "torch": "2.9"}, "fingerprint": "f00d"})  # fmt: skip
    (folder / "summary.txt").write_text("conv1  64 x 32 x 32  1,728\n", encoding="utf-8")
    errors = np.flatnonzero(true != predicted)
    k = len(errors)
    images = np.kron(rng.integers(0, 256, (k, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    maps = rng.random((2, k, 32, 32), dtype=np.float32) if cams else (None, None)
    faint = np.arange(k) == 0
    return Tiles(images, errors, names[true[errors]], names[predicted[errors]], confidence[errors], losses[errors],
                 *maps, *((faint, ~faint) if cams else (None, None)), caption="GradCAM of layer3, 8 x 8 pixels")  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path, **changes):
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and what carries data-metric."""

    VOID = {"meta", "link", "img", "br", "input", "path"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.words, self.open, self.metrics = [], [], [], {}
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("script", "style"):
            self.words.append(data)
            if name := self.open[-1][1].get("data-metric"):
                self.metrics[name] = data

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.elements
                if name == tag and all(attrs.get(key.replace("_", "-")) == value for key, value in wanted.items())]

    @property
    def tiles(self):
        return [attrs for attrs in self.all("li") if "data-i" in attrs]

    @property
    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)[1])
