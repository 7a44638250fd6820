"""README and docs: links lead somewhere, examples run on tiny data, tables agree with the code, promises have tests."""

import json
import re
import runpy
import tomllib
from collections import OrderedDict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import cifar_fastai
from cifar_fastai import models
from cifar_fastai.recipes import PRESETS, RECIPES
from cifar_fastai.settings import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README, GUIDE = TEXTS[ROOT / "README.md"], TEXTS[ROOT / "docs" / "guide.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
COLAB = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
FOLDERS = "recipes", "tests", "cifar_fastai", "docs", "notebooks", "benchmarks"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def without_code(text):
    return re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page):
    """The targets of all links and pictures of a page."""
    return re.findall(r"\]\(([^()\s]+)\)", without_code(TEXTS[page]))


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith((COLAB, REPOSITORY)):
            file = ROOT / target.partition("/blob/main/")[2]
            assert file.is_file(), link
        elif not target.startswith("https://"):
            file = (page.parent / target).resolve() if target else page
            assert file.exists() and file.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), link


@every_page
def test_files_that_a_page_names_exist(page):
    names = re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", TEXTS[page])
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_page_is_linked_from_readme():
    pages, seen = [ROOT / "README.md"], set()
    while pages:
        page = pages.pop()
        seen.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        pages += [path for path in PAGES if path.resolve() in targets and path not in seen]
    assert seen == set(PAGES)
    assert {ROOT / "docs" / path.name for path in (ROOT / "docs").glob("*.md")} <= seen


@every_page
def test_pages_name_no_place_of_a_machine(page):
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|mnt|Users)/", TEXTS[page])


def test_every_notebook_opens_in_colab_from_readme():
    notebooks = {f"{COLAB}/blob/main/notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {link for link in links(ROOT / "README.md") if link.startswith(COLAB)}


def test_readme_names_every_command_and_preset():
    commands = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"results.py"}  # in CONTRIBUTING.md
    assert not [name for name in (*commands, *PRESETS) if name not in README]


@every_page
def test_flags_that_a_page_names_exist(page):
    # of other commands
    others = {*"resume help images seeds minutes repeats run to logdir host space repo-type workers storage".split()}
    others |= {*"nproc-per-node nnodes node-rank master-addr multi-gpu num-processes ntasks-per-node nodes".split()}
    others |= {*"rdzv rdzv-backend rdzv-endpoint rdzv-id".split()}
    names = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", TEXTS[page]))
    assert {name.replace("-", "_") for name in names - others} <= set(OPTIONS)


# --------------------------------------------------------------------------------------------------- tables


def test_the_parameters_are_those_of_settings():
    page = runpy.run_path(str(ROOT / "docs" / "make_parameters.py"))["parameters_page"]()
    assert page == TEXTS[ROOT / "docs" / "parameters.md"], "run python docs/make_parameters.py"
    assert all(f"| `{name}` |" in page for name in (*OPTIONS, *RECIPES))


def test_the_module_guide_names_what_exists():
    rows = re.findall(r"^\| .+? \| (.+?) \| `(cifar_fastai[\w.]*)` \|$", GUIDE, flags=re.MULTILINE)
    assert len(rows) > 20
    for names, module in rows:
        for bold, name in re.findall(r"(\*\*)?`(\w+)`", names):
            value = getattr(import_module(module), name)
            assert value.__doc__ or name.isupper()
            assert bool(bold) == (name in cifar_fastai.__all__), f"{name} is bold where cifar_fastai has it"
    assert not [name for name in cifar_fastai.__all__ if f"**`{name}`**" not in GUIDE]


PROMISES = re.findall(r"^- .+?(?=^- |^#|^\S|\Z)", TEXTS[ROOT / "docs" / "promises.md"], flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("promise", PROMISES or [""])
def test_promises_name_tests_that_exist(promise):
    for part in promise.split("Tests: ")[1].split(";"):
        names = re.findall(r"`(test_\w+\.py)`", part)
        files = [path for name in names for path in (ROOT / "tests").rglob(name)]
        assert names and len(files) == len(names), part
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        for name in re.findall(r"`(test_\w+)`", part):
            assert f"def {name}(" in text, name


def test_the_citation_agrees_with_the_package():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {cifar_fastai.__version__}" in text and f"license: {PROJECT['license']}" in text
    assert PROJECT["authors"][0]["name"] in text


# ------------------------------------------------------------------------------------------------- examples

SMALL_DLS = 'bs=16, subset=160, device="cpu", padding=4,'
SMALL = {  # what makes the examples small; each text must stand in one of them
    "README.md": {
        'cifar_dls("auto")': f'cifar_dls("digits", {SMALL_DLS})',
        "fit_one_cycle(20,": "fit_one_cycle(1,",
    },
    "docs/guide.md": {
        'load_images("auto")': 'load_images("digits")',
        "cifar_dls(images, bs=256,": f"cifar_dls(images, {SMALL_DLS}",
        "learn.lr_find()": "learn.lr_find(num_it=40, show_plot=False)",
        "fit_one_cycle(20, 0.04,": "fit_one_cycle(1, 0.05,",
        "range_test(learn)": "range_test(learn, num_it=40)",
        "range(len(images.labels)), bs=128)": 'range(len(images.labels)), bs=16, device="cpu")',
        "epochs=2,": 'epochs=1, subset=80, bs=16, device="cpu", compile="no", out="runs/recipe",',
    },
}


def examples(name):
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", TEXTS[ROOT / name], flags=re.DOTALL | re.MULTILINE)


def small_network(n_classes, width):
    """The children of ResNet18, and maps of 32, 16, 8 and 4 pixels, from a thousand weights."""
    parts = OrderedDict(conv1=nn.Conv2d(3, 4, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(4))
    for k in range(1, 5):
        conv = nn.Conv2d(4, 4, 3, stride=1 if k == 1 else 2, padding=1)
        parts[f"layer{k}"] = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(parts | dict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), linear=nn.Linear(4, n_classes)))


def run_examples(name, monkeypatch):
    """Run the examples of a page, made small, one after the other on a small network; the names that they define."""
    monkeypatch.setitem(models._FACTORIES, "resnet18", small_network)
    names, blocks = {}, examples(name)
    for old, new in SMALL[name].items():
        assert any(old in block for block in blocks), f"{name} must have {old!r} in an example"
        blocks = [block.replace(old, new) for block in blocks]
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"<example {number} of {name}>", "exec"), names)
    return names


def test_the_notebook_example_of_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_examples("README.md", monkeypatch)
    assert len(names["preds"]) == 360
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in ("cat.png", "ship.jpg"):
        Image.fromarray(pixels).save(name)
    names = run_examples("docs/guide.md", monkeypatch)
    assert all((tmp_path / "runs" / "mine" / name).exists() for name in ("report.html", "explain.png"))
    assert list(names["test"].suggestions) == ["valley", "slide", "steep", "minimum"]
    assert names["heatmaps"].maps.shape == (16, 32, 32) and len(names["preds"]) == 360
    assert (names["folder"] / "report.html").exists()
    lines = [json.loads(line) for line in (tmp_path / "runs" / "logged" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["tag"] == "step/loss"] == list(range(10))
    assert lines[-1]["tag"] == "final/test_tta_shift_accuracy", "write_run adds the results"
