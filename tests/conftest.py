"""Tiny data and networks that the tests share."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from tiny_net import TinyNet

os.environ.setdefault("MPLBACKEND", "agg")
torch.set_num_threads(1)  # tiny networks gain nothing from more
settings.register_profile("suite", derandomize="FUZZ_EXAMPLES" not in os.environ, deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _own_random_numbers():
    """No test depends on what others have drawn."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache of decoded images."""
    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_images():
    """An ImageSet of three classes, 48 train and 18 test images, each class brightest in a channel of its own."""
    from cifar_fastai.data.images import ImageSet

    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(48) % 3, np.arange(18) % 3]).astype(np.int64)
    images = rng.integers(0, 160, (66, 3, 32, 32), dtype=np.uint8)
    images[np.arange(66), labels] += 90
    pixels = images[:48] / 255
    mean, std = tuple(pixels.mean((0, 2, 3))), tuple(pixels.std((0, 2, 3)))
    return ImageSet("tiny", ("red", "green", "blue"), images, labels, 48, mean, std, source="made up")


@pytest.fixture
def tiny_model():
    """A `TinyNet` for the classes of `tiny_images`, always with the same weights."""
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder of PNG files, 16 train and 6 test images for each of three classes that can hardly be told apart."""
    root, rng = tmp_path_factory.mktemp("data") / "colours", np.random.default_rng(0)
    for split, n in (("train", 16), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(0, 240, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 3
                Image.fromarray(pixels).save(root / split / name / f"{k:02}.png")
    return root


@pytest.fixture(scope="session")
def recipes(tiny_folder, tmp_path_factory):
    """Starts runs of the tiny recipe as processes: see tiny_runs.py."""
    from tiny_runs import Recipes

    return Recipes(tiny_folder, tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    """Runs on the tiny network in this process: see tiny_runs.py."""
    from tiny_runs import Tiny

    monkeypatch.setenv("CIFAR_FASTAI_CACHE", str(tiny_folder.parent / "cache"))
    return Tiny(tiny_folder, monkeypatch)


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of those of notebooks
def chromium():
    """A Chromium that Playwright drives; the test is skipped where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser: install chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=browser)


@pytest.fixture
def problems():
    """What no report may cause: errors and warnings on the console, exceptions, requests. Empty at the end."""
    problems = []
    yield problems
    assert problems == []


@pytest.fixture
def visit(chromium, problems):
    """A function that opens a file, or an address, in a new window."""
    windows = []

    def visit(path, width=1280, dark=False, **options):
        size, scheme = dict(width=width, height=900), "dark" if dark else "light"
        options |= dict(viewport=size, color_scheme=scheme, has_touch=True, reduced_motion="reduce")
        windows.append(chromium.new_context(**options))
        page, uri = windows[-1].new_page(), path if isinstance(path, str) else path.resolve().as_uri()
        page.set_default_timeout(5_000)
        page.on("pageerror", lambda error: problems.append(error.message))
        page.on("console", lambda line: line.type in ("error", "warning") and problems.append(line.text))
        page.on("request", lambda to: to.url.startswith(("data:", "blob:", uri)) or problems.append(to.url))
        page.goto(uri)
        return page

    yield visit
    for window in windows:
        window.close()
