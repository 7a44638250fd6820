"""Runs compared: what is printed, what is on the page, and what is refused."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_runs import Tiny

from cifar_fastai.data.images import load_images
from cifar_fastai.errors import InputError
from cifar_fastai.runs.compare import compare_runs

PICTURE = r'<img src="data:image/png;base64,([^"]*)" alt="Image (\d+)"><p><span class="is"><small>true</small> (\w+)'


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """The folders of two runs on the same images, with other seeds, rates and random predictions."""
    parent, folders = tmp_path_factory.mktemp("runs"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FASTAI_CACHE", str(parent / "cache"))
        for seed in 1, 2:
            folders.append(
                Tiny(tiny_folder, patch).train(parent / f"seed{seed}", epochs=2, seed=seed, lr=0.1 * seed).folder
            )
            rows = pd.read_csv(folders[-1] / "predictions.csv")
            rows["predicted"] = np.random.default_rng(seed).choice(["blue", "green", "red"], len(rows))
            rows.to_csv(folders[-1] / "predictions.csv", index=False)
            change(folders[-1] / "metrics.json", test_accuracy=float((rows.target == rows.predicted).mean()))
    return folders


def change(path, **values):
    """Replace values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def other(runs, tmp_path):
    """A function that copies the second run and changes its config.json."""

    def copy(parameters=(), **values):
        folder = shutil.copytree(runs[1], tmp_path / "other")
        parameters = json.loads((folder / "config.json").read_text())["parameters"] | dict(parameters)
        change(folder / "config.json", parameters=parameters, **values)
        return folder

    return copy


def wrong(folder):
    rows = pd.read_csv(folder / "predictions.csv")
    return (rows.target != rows.predicted).to_numpy()


def test_the_table_has_what_differs_and_the_page_what_one_gets_right(runs, tiny_folder, tmp_path, capsys):
    page = compare_runs(runs, tmp_path / "both.html").read_text()
    lines = capsys.readouterr().out.splitlines()
    table = {line[:24].strip(): line[24:].split() for line in lines[3:-1]}
    assert lines[:2] == ["A: seed1", "B: seed2"] and lines[-1] == f"page: {tmp_path / 'both.html'}"
    assert table["seed"] == ["1", "2"] and table["lr"] == ["0.1", "0.2"] and "bs" not in table
    accuracies = [f"{1 - wrong(run).mean():.2%}".removesuffix("%") for run in runs]
    assert table["test accuracy"] == [accuracies[0], "%", accuracies[1], "%"] and "training time" in table
    only_a, only_b = ~wrong(runs[0]) & wrong(runs[1]), wrong(runs[0]) & ~wrong(runs[1])
    assert only_a.any() and only_b.any()
    images, found = load_images(tiny_folder, progress=False), {"A": [], "B": []}
    for part in page.split("<h3>")[1:]:
        right, n = re.match(r"(\w) right, \w wrong: (\d+) image", part).groups()
        for uri, index, true in re.findall(PICTURE, part):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
            np.testing.assert_array_equal(pixels, images.test_images[int(index)].transpose(1, 2, 0))
            assert true == images.classes[images.test_labels[int(index)]]
            found[right].append(int(index))
        assert len(found[right]) == int(n)
    assert sorted(found["A"]) == list(np.flatnonzero(only_a)) and sorted(found["B"]) == list(np.flatnonzero(only_b))


def test_classes_are_side_by_side_and_lines_over_each_other(runs, tmp_path):
    page = compare_runs(runs, tmp_path / "both.html").read_text()
    table = re.search(r"Class</th>.*?</table>", page, re.S)[0]
    rows = re.findall(r'<th scope="row">(\w+)</th>' + 2 * r".*?</span>([\d.]+)", table, re.S)
    rows = pd.DataFrame(rows, columns=["class", "A", "B"]).set_index("class").astype(float)
    for letter, run in zip("AB", runs, strict=True):
        table = pd.read_csv(run / "predictions.csv")
        expected = 100 * (table.target == table.predicted).groupby(table.target).mean()
        np.testing.assert_allclose(rows[letter].sort_index(), expected.sort_index(), atol=0.06)
    spread = (rows.A - rows.B).abs()
    assert spread.is_monotonic_decreasing and len(rows) == 3
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 2 and all("var(--accent)" in svg and "var(--wrong)" in svg for svg in drawings)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data_name="digits", data_fingerprint="1"), "differ in their images (A: colours, B: digits)"),
        (dict(data_fingerprint="1"), "differ in their images (all called colours)"),
        (dict(parameters=dict(no_test=True, valid_pct=0.1)), "differ in their split (A: test, B: validation)"),
    ],
)
def test_other_images_and_other_splits_are_said_in_one_line(runs, other, tmp_path, capsys, changes, words):
    page = compare_runs([runs[0], other(**changes)], tmp_path / "both.html").read_text()
    assert words in page and "right, B wrong" not in page and "Accuracy by class" in page
    assert sum(words in line for line in capsys.readouterr().out.splitlines()) == 1


def test_without_the_images_their_numbers_are_shown(runs, other, tmp_path, tiny_folder, capsys):
    """And wrong images are refused, not shown."""
    away = [other(data_path=None, parameters=dict(data="gone"))]
    away.append(shutil.copytree(runs[0], tmp_path / "first"))
    shutil.copy(away[0] / "config.json", away[1])
    page = compare_runs(away, tmp_path / "both.html").read_text()
    assert "The images are not shown" in page and "right, " in page and "<img" not in page
    assert "<img" in compare_runs(away, tmp_path / "both.html", tiny_folder).read_text()
    with pytest.raises(InputError, match="not the images"):
        compare_runs(away, tmp_path / "both.html", "digits")


@pytest.mark.parametrize(
    "damage, words",
    [
        (None, "1 different runs; name from 2 to 10"),
        (lambda run: shutil.rmtree(run), "not a run's folder"),
        (lambda run: (run / "metrics.json").unlink(), "is the run finished"),
        (lambda run: (run / "predictions.csv").write_text("index"), "cannot be read as predictions"),
        (lambda run: (run / "history.csv").unlink(), "cannot be read"),
        (lambda run: (run / "config.json").write_text('{"parameters": {}}'), "damaged"),
    ],
)
def test_what_is_no_finished_run_is_refused(runs, other, tmp_path, damage, words):
    folder = other() if damage else runs[0]
    if damage:
        damage(folder)
    with pytest.raises(InputError, match=words) as error:
        compare_runs([runs[0], folder], tmp_path / "both.html")
    assert "\n" not in str(error.value) and not (tmp_path / "both.html").exists()


def test_control_characters_of_a_run_do_not_reach_the_terminal(runs, other, tmp_path, capsys):
    """Nor do they end a line: neither those of its data set's name, nor of a number or a setting or its name."""
    text = "\x1b[31m\r<i>"
    folder = other(dict(opt=text), data_name=text)
    change(folder / "metrics.json", model=text, **{text: 1})
    page = compare_runs([runs[0], folder], tmp_path / "both.html").read_text()
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and out.count(r"\x1b[31m\r<i>") == 4 and "<i>" not in page


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((390, False), (1280, True), (1280, False))]


@pytest.mark.parametrize("width, dark", [(390, True), *SLOW])
def test_its_page_in_a_browser(visit, runs, other, tmp_path, width, dark):
    """No request, no complaint, nothing wider than the window, and nothing serious for axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(compare_runs([*runs, other()], tmp_path / "all.html"), width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".tiles li").count() and page.locator("svg").count() == 2
    assert len({round(bar.bounding_box()["width"]) for bar in page.locator(".bar:visible").all()}) <= 1
    page.add_style_tag(content=".scroll { background: var(--ground) !important }")  # axe skips words on a gradient
    result = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response
    assert [
        (rule["id"], rule["nodes"][0]["html"])
        for rule in result["violations"]
        if rule["impact"] in ("serious", "critical")
    ] == []
