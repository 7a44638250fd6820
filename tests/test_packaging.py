"""What the package says of itself: its dependencies, its public names, what importing it costs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cifar_fastai

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_requirements_and_package_name_the_same_dependencies():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[-1] == "-e .[dev]"
    assert sorted(lines[:-1]) == sorted(PROJECT["dependencies"])


def test_dependencies_have_floors_and_no_pins():
    extras = PROJECT["optional-dependencies"]
    every = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert all(re.fullmatch(r"[\w.-]+>=[\d.]+", line) for line in every if line != extras["dev"][0]), every
    assert extras["dev"][0] == f"cifar_fastai[{','.join(sorted(extras.keys() - {'dev'}))}]"


@pytest.mark.parametrize("name", cifar_fastai.__all__)
def test_every_public_name_is_there_whatever_was_imported_before(name):
    import cifar_fastai.runs.results  # noqa: F401  (imports most modules, whose names must hide none)

    value = getattr(cifar_fastai, name)
    assert callable(value) and value.__doc__


def test_the_star_import_hides_no_name_of_fastais():
    import fastai.vision.all as theirs

    import cifar_fastai.all as ours

    assert set(cifar_fastai.__all__) - {name for name in vars(ours) if not name.startswith("_")} == {
        "RandomCrop",
        "resnet18",
        "resnet34",
        "test_dl",
        "write_report",
    }
    for name in (name for name in vars(ours) if not name.startswith("_")):
        assert getattr(theirs, name, None) in (None, getattr(ours, name)), name


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'fastai', 'numpy', 'matplotlib')"
    code = f"import sys, cifar_fastai; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("line", ["from cifar_fastai.all import *", "from cifar_fastai import cifar_dls"])
def test_importing_its_names_shows_no_warning_of_torchs(line):
    code = ["-W", "error::FutureWarning", "-c", line]
    assert subprocess.run([sys.executable, *code], capture_output=True, text=True).stderr == ""


def test_no_star_imports_outside_notebooks():
    for path in [*ROOT.glob("cifar_fastai/**/*.py"), *ROOT.glob("recipes/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*from .+ import \*|^\s*(from|import) fastai\.vision\.all", text, re.MULTILINE), path
