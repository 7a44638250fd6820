"""The README's Python examples, run one after the other on tiny data; and the names of its module guide."""

import re
from collections import OrderedDict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

README = Path(__file__).parent.parent / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="no README.md")

# what makes the examples small; each text must stand in one of them
SMALL = {
    'load_images("auto")': 'load_images("digits")',
    "cifar_dls(images, bs=256,": 'cifar_dls(images, bs=16, subset=160, device="cpu",',
    "learn.lr_find()": "learn.lr_find(num_it=40, show_plot=False)",
    "fit_one_cycle(20, 0.04,": "fit_one_cycle(1, 0.05,",
    "range_test(learn)": "range_test(learn, num_it=40)",
    "range(len(images.labels)), bs=128)": 'range(len(images.labels)), bs=16, device="cpu")',
}


def examples():
    """The blocks of Python, made small."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for old, new in SMALL.items():
        assert any(old in block for block in blocks), f"README.md must hold {old!r} in an example"
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


def small_network(n_classes):
    """The children of ResNet18, and maps of 32, 16, 8 and 4 pixels, from a thousand weights."""
    parts = [("conv1", nn.Conv2d(3, 4, 3, padding=1, bias=False)), ("bn1", nn.BatchNorm2d(4))]
    for k in range(1, 5):
        conv = nn.Conv2d(4, 4, 3, stride=1 if k == 1 else 2, padding=1)
        parts.append((f"layer{k}", nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())))
    parts += [("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), ("linear", nn.Linear(4, n_classes))]
    return nn.Sequential(OrderedDict(parts))


def test_examples_run(tmp_path, monkeypatch):
    from cifar_fastai import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._FACTORIES, "resnet18", small_network)
    torch.set_num_threads(1)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in ("cat.png", "ship.jpg"):
        Image.fromarray(pixels).save(name)
    names = {}
    for block in examples():
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert (tmp_path / "runs" / "mine" / "explain.png").exists()
    assert list(names["rates"].suggestions) == ["valley", "slide", "steep", "minimum"]
    assert names["heatmaps"].maps.shape == (16, 32, 32) and len(names["preds"]) == 360


def test_examples_are_short():
    for block in examples():
        assert sum(not line.startswith(("from ", "import ")) for line in block.split("\n") if line) <= 5


def test_the_module_guide_names_what_there_is():
    guide = README.read_text(encoding="utf-8").partition("| To ... | take | from |")[2].partition("\n\n")[0]
    row = re.compile(r"\| [^|]+ \| (`[^|]+`) \| `(cifar_fastai\.\w+)` \|")
    rows = [row.fullmatch(line).groups() for line in guide.splitlines()[2:]]
    assert len(rows) > 10
    for names, module in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert getattr(import_module(module), name).__doc__ or name.isupper()
