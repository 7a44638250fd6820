"""The arrows of the architecture, read from the imports: dependencies point one way, and there is no cycle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cifar_fastai"
FOUNDATION = {"errors", "files", "settings", "recipes", "models", "plots"}
LINE = [
    "hardware",
    "data",
    "training",
    "evaluation",
    "api",
    "report",
    "runs",
    "cli",
    "commands",
]  # each may import those before it
MAY_IMPORT = {
    **{"errors": set(), "files": {"errors"}, "settings": {"errors"}, "models": {"errors"}},
    **{"recipes": {"errors", "settings"}, "plots": {"errors", "files"}},
    **{layer: FOUNDATION | set(LINE[:level]) for level, layer in enumerate(LINE)},
    "all": {"__init__", "api"},
    "__init__": set(),  # it loads modules by name, on first use
}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """(names of the package's modules that a file imports, whether at its top), imports in functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar_fastai"):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in submodules if (ROOT / Path(*name.split("."))).with_suffix(".py").exists()]
            for name in files or [node.module]:
                yield name, node in tree.body
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cifar_fastai"):
                    yield alias.name, node in tree.body


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(name):
    """The layer of a module: its folder, or for a module at the top its own name."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    layers = {layer(target) for target, _ in imports(FILES[name])} - {layer(name)}
    assert layers <= MAY_IMPORT[layer(name)], layers - MAY_IMPORT[layer(name)]


def test_there_is_no_cycle():
    graph = {name: {target for target, _ in imports(path) if target != name} for name, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_import_in_a_function_hides_another_layer():
    """Only the commands load what is heavy late, so that --help answers at once."""
    hidden = {name for name, path in FILES.items() if any(not at_top for _, at_top in imports(path))}
    assert hidden <= {"cifar_fastai.commands"}


def test_nothing_outside_is_imported_by_the_package():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"(import|from) (benchmarks|recipes)\b", path.read_text(encoding="utf-8")), path
