"""The pages under recipes/, run for what they define."""

import runpy
from pathlib import Path

from cifar_fastai.names import check_name

__all__ = ["recipe_page"]

_FOLDER = Path(__file__).parent.parent / "recipes"


def recipe_page(name):
    """What recipes/<name>.py defines, by name: its RECIPE and its main. InputError where there is no such page."""
    check_name("recipe", name, tuple(sorted(path.stem for path in _FOLDER.glob("*.py"))))
    return runpy.run_path(str(_FOLDER / f"{name}.py"))
