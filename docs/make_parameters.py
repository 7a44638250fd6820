"""Make docs/parameters.md from the fields of `Settings` and the named recipes.

python docs/make_parameters.py
"""

from pathlib import Path
from typing import get_args

from cifar_fastai.cli import flag
from cifar_fastai.recipes import PRESETS, RECIPES
from cifar_fastai.settings import OPTIONS, Settings

PAGE = Path(__file__).with_name("parameters.md")
TYPES = {str: "text", int: "whole number", float: "number", bool: "switch"}
SIGNS = dict(ge="≥", gt=">", le="≤", lt="<")
INTRODUCTION = """\
# Parameters

Made by `docs/make_parameters.py` from `Settings` in [settings.py](../cifar_fastai/settings.py); do not edit it by hand.

A parameter is a flag on the command line, `python recipes/resnet18.py --valid-pct 0.1` or `cifar-fastai train resnet18
--valid-pct 0.1`, and an argument in Python, `train("resnet18", valid_pct=0.1)` or `Settings(valid_pct=0.1)`. A switch
is a flag without a value, in Python True or False. Values that are not allowed are refused before anything is written.

The defaults below are those of `Settings()`, plain SGD without augmentation. **The recipes use other values**, listed
under [recipes and presets](#recipes-and-presets) and shown by the `--help` of each command."""
RECIPES_INTRODUCTION = """\
## Recipes and presets

What each of them sets. `resnet18`, `resnet34` and `custom_resnet` are commands in [recipes/](../recipes); `--preset`
takes one of the others: `python recipes/resnet18.py --preset zoo94`. A flag on the command line takes precedence over
both. A `flip` of none is 0.5, or 0 on digits."""


def parameters_page():
    """The Markdown of docs/parameters.md."""
    rows = [
        (f"`{name}`", f"`{flag(name)}`", _types(option), _text(option.default), _allowed(option), _help(option))
        for name, option in OPTIONS.items()
    ]
    recipes = [(f"`{name}`", ", ".join(_differences(settings))) for name, settings in RECIPES.items()]
    table = _table(("name", "flag", "type", "default", "allowed values", "meaning"), rows)
    return "\n\n".join([INTRODUCTION, table, RECIPES_INTRODUCTION, _table(("name", "settings"), recipes)]) + "\n"


def _types(option):
    kinds = [kind for kind in get_args(option.type) or (option.type,) if kind is not type(None)]
    return " or ".join(TYPES[kind] for kind in kinds)


def _text(value):
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"
    return str(value)


def _allowed(option):
    limits = option.metadata
    if option.name == "preset":
        return ", ".join(PRESETS)
    if "choices" in limits:
        return ", ".join(limits["choices"])
    bounds = [f"{sign} {limits[name]:,}" for name, sign in SIGNS.items() if name in limits]
    return " or ".join(filter(None, [", ".join(bounds), *limits.get("words", ())]))


def _help(option):
    name, *values = option.metadata.get("needs", (None,))
    needs = f"; only with `{name}` {' or '.join(values)}".rstrip() if name else ""
    return option.metadata["help"] + needs


def _differences(settings):
    """The parameters of `settings` that differ from the defaults, as `name` value; the network's name always."""
    defaults = Settings().to_dict()
    for name, value in settings.to_dict().items():
        if name == "model" or value != defaults[name]:
            yield f"{name} {_text(value)}"


def _table(head, rows):
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(parameters_page(), encoding="utf-8", newline="\n")
