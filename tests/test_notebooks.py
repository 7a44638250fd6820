"""The notebooks: they define nothing, import in one cell, hold no path of a machine, and run from top to end."""

import ast
import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from cifar_fastai.files import read_json
from cifar_fastai.recipes import RECIPES
from cifar_fastai.settings import Settings

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PATHS = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/|file://|\b[A-Z]:\\")  # /a/b, C:\b

PICTURES = {"resnet18": 10, "custom_resnet": 7, "explain": 9}  # that each shows

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# what a test makes small: each text must stand in the notebook's code, once
DIGITS = {'DATA = "auto"': 'DATA = "digits"'}
PART = DIGITS | {"SUBSET = None": "SUBSET = 80"}
SMALL = {
    "resnet18": PART
    | {"BS = 256": "BS = 8", "EPOCHS = 20": "EPOCHS = 1", "LR = 0.04": "LR = 0.02"}
    | {"valley, slide))": "valley, slide), num_it=40)"},
    "custom_resnet": PART
    | {"BS = 512": "BS = 8", "EPOCHS = 24": "EPOCHS = 1", "range_test(learn)": "range_test(learn, num_it=40)"},
    "explain": DIGITS | {"EPOCHS = 3": "EPOCHS = 1"},
}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(cell):
    """The cell's syntax tree, magics being calls."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def pictures(cells):
    """How many pictures the cells show."""
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def outputs(notebook):
    """Everything that the cells gave out, pictures left out, as text."""
    texts = []
    for output in (output for cell in code(notebook) for output in cell.outputs):
        texts.append(output.get("text", ""))
        texts.append("\n".join(output.get("traceback", ())))
        texts += [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(text if isinstance(text, str) else json.dumps(text) for text in texts)


@every_notebook
def test_nothing_is_defined_and_one_cell_imports(path):
    cells = code(nbformat.read(path, as_version=4))
    assert 5 < len(cells) < 20
    importing = []
    for cell in cells:
        nodes = list(ast.walk(tree(cell)))
        definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda
        assert not [node for node in nodes if isinstance(node, definitions)]
        if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes):
            importing.append(cell)
        else:
            assert sum(isinstance(node, ast.Call) for node in nodes) <= 6
    assert importing == cells[:1]


@every_notebook
def test_the_repository_has_one_address(path):
    notebook = nbformat.read(path, as_version=4)
    slug = REPOSITORY.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
    assert f"]({badge})" in notebook.cells[0].source
    assert f"%pip install -q git+{REPOSITORY}\n" in code(notebook)[0].source
    text = "\n".join(cell.source for cell in notebook.cells)
    assert set(re.findall(r"github(?:\.com)?/([\w-][\w.-]*/[\w.-]+)", text)) == {slug}


@every_notebook
def test_committed_as_executed_on_cifar10(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "from top to end, in one go"
    assert re.search(r"on CIFAR-10( \(JPEG copy\))?: \d+ epochs? in", outputs(notebook))
    assert_clean(notebook, path.stem)


def assert_clean(notebook, name):
    """No path of a machine, no warning, nothing on stderr; every picture once, and few in a cell."""
    text, cells = outputs(notebook), code(notebook)
    assert not PATHS.search(text), PATHS.search(text)
    assert "Warning" not in text and "Traceback" not in text
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert pictures(cells) == PICTURES[name] and max(pictures([cell]) for cell in cells) <= 3


def test_paths_are_seen_and_nothing_else():
    assert all(map(PATHS.search, ["at /data/c.tgz", "'/srv/x'", "/a/b", "file://x", "D:\\x", "(/data/www/x)"]))
    others = ["1/3 and/or 2", "runs/a/report.html", "https://a.b/c/d", "<b>1</b></td>", "3 / 4"]
    assert not any(map(PATHS.search, others))


def test_together_they_are_small():
    assert len(NOTEBOOKS) == 3 and sum(path.stat().st_size for path in NOTEBOOKS) < 6_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the notebooks run, one after the other."""
    return tmp_path_factory.mktemp("notebooks")


def run(name, folder):
    """(the text, the code) of the notebook `name`, made small, after a clean run from top to end in `folder`."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for old, new in SMALL[name].items():
        holders = [cell for cell in code(notebook) if old in cell.source]
        assert len(holders) == 1 and holders[0].source.count(old) == 1, f"{name}.ipynb must hold {old!r} once"
        holders[0].source = holders[0].source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # a kernel brings its own
        patch.setenv("OMP_NUM_THREADS", "1")  # faster on a busy machine, little slower on an idle one
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    assert_clean(notebook, name)
    return outputs(notebook), "\n".join(cell.source for cell in code(notebook))


def assert_same_settings(folder, name, *small):
    """The run that the notebook wrote has what its recipe sets, except for `small`; its learning rate."""
    values = read_json(folder / "runs" / name / "config.json")["parameters"]
    recipe, neutral = RECIPES[name].to_dict(), Settings().to_dict()
    names = [k for k in recipe if recipe[k] not in (neutral[k], None) and k not in small]
    assert {k: values[k] for k in names} == {k: recipe[k] for k in names}
    return values["lr"]


@pytest.fixture(scope="module")
def resnet18(folder):
    run("resnet18", folder)


@pytest.mark.slow
def test_resnet18(resnet18, folder):
    assert (folder / "runs" / "resnet18" / "report.html").exists()
    assert_same_settings(folder, "resnet18", "epochs", "bs", "lr")
    recipe = RECIPES["resnet18"]
    assert (recipe.epochs, recipe.bs, recipe.lr) == (20, 256, 0.04), "as in the notebook's first cell"


@pytest.mark.slow
def test_custom_resnet(folder):
    _, source = run("custom_resnet", folder)
    lr = assert_same_settings(folder, "custom_resnet", "epochs", "bs", "lr", "lr_suggest")
    recipe = RECIPES["custom_resnet"]
    assert (recipe.epochs, recipe.bs, recipe.pct_start) == (24, 512, 5 / 24)
    assert f'suggestions["{recipe.lr_suggest}"]' in source
    text, _ = run("custom_resnet", folder)
    assert "Loaded, not trained here: custom_resnet on digits: 1 epoch in" in text
    assert str(lr)[:6] in text, "the loaded run's own range test"


@pytest.mark.slow
def test_a_finished_run_is_loaded(resnet18, folder):
    text, _ = run("resnet18", folder)
    assert "Loaded, not trained here: resnet18 on digits: 1 epoch in" in text and "holds this run" in text


@pytest.mark.slow
def test_explain_without_a_run_trains_one(tmp_path):
    run("explain", tmp_path)
    assert (tmp_path / "runs" / "short" / "report.html").exists() and not (tmp_path / "runs" / "resnet18").exists()


@pytest.mark.slow
def test_explain_goes_on_from_the_run(resnet18, folder):
    assert "resnet18 on digits: 1 epoch in" in run("explain", folder)[0]
