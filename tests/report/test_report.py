"""report.html: what is on the page, that it is escaped and complete, and that it stays small."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from cifar_fastai import cifar_dls, cifar_learner
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.plots.charts import MOST_CONFUSED
from cifar_fastai.report.page import LIMIT, write_report
from cifar_fastai.report.tiles import Tiles
from cifar_fastai.runs.results import error_tiles

HOSTILE = ("<script>alert(1)</script>", "\"'&</script><!--", 'x" onload="alert(1)')
COMMAND = "python recipes/resnet18.py --epochs 3 --data '/some where/<it>'"


def make_run(folder, classes=("red", "green", "blue"), n=60, wrong=0.3, epochs=3, cams=True, **metrics):
    """A run folder with everything that `write_report` reads but figures, and the Tiles of its errors.

    `n` images, about the fraction `wrong` of them misclassified; `metrics` replaces entries of metrics.json.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    true, names = np.arange(n) % len(classes), np.array(classes, dtype=object)
    predicted = np.where(rng.random(n) < wrong, (true + rng.integers(1, len(classes), n)) % len(classes), true)
    table = pd.DataFrame({"index": range(n), "target": names[true], "predicted": names[predicted]})
    table = table.assign(confidence=rng.uniform(0.3, 1, n), loss=rng.exponential(2, n))
    table.to_csv(folder / "predictions.csv", index=False)
    epoch = np.arange(1, epochs + 1)
    history = dict(epoch=epoch, train_loss=2 / epoch, train_accuracy=1 - 0.7 / epoch, valid_loss=1.8 / epoch)
    history |= dict(valid_accuracy=1 - 0.6 / epoch, lr=3e-05, images_per_second=900.5, seconds=1.2)
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    accuracy = float((true == predicted).mean())
    texts = dict(dataset="made-up", model="resnet18", device="cpu", precision="fp32", eval_split="test")
    numbers = dict(parameters=11173962, epochs=3, seed=42, images_per_second=901.2, seconds=75.3, valid_loss=0.61234)
    numbers |= dict(train_accuracy=0.7667, valid_accuracy=accuracy, test_accuracy=accuracy)
    numbers |= dict(tta_accuracy=accuracy - 0.01, tta_shift_accuracy=None, class_accuracy=dict.fromkeys(classes))
    write_json(folder / "metrics.json", texts | numbers | metrics)
    config = dict(
        recipe="resnet18", given={"epochs": 3, "cutout": 8, "out": "runs/one"}, classes=classes, hardware="a processor"
    )
    config |= dict(parameters={"epochs": 3, "cutout": 8, "opt": "muon"}, versions={"python": "3.12", "torch": "2.9"})
    write_json(folder / "config.json", config)
    (folder / "summary.txt").write_text("conv1  64 x 32 x 32  1,728\n", encoding="utf-8")
    errors = table[table.target != table.predicted].sort_values("loss", ascending=False)
    k = len(errors)
    images = np.kron(rng.integers(0, 256, (k, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    maps = dict(zip(("cam_predicted", "cam_true"), np.kron(rng.random((2, k, 4, 4)), np.ones((8, 8))), strict=True))
    worst = np.arange(k) == 0
    maps |= dict(negligible_predicted=worst, negligible_true=~worst, caption="GradCAM of layer3, 8 x 8")
    return Tiles(images, *errors.to_numpy(dtype=object).T, **maps if cams else {})


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def read_predictions(folder):
    return pd.read_csv(folder / "predictions.csv")


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and what carries data-metric."""

    VOID = {"meta", "link", "img", "br", "path", "use", "rect"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.words, self.open, self.metrics = [], [], [], {}
        self.feed(self.source)
        assert not self.open, "an element that is not closed"
        self.text = " ".join(" ".join(self.words).split())
        self.tiles = [attrs for attrs in self.all("li") if "data-i" in attrs]
        self.data = json.loads(re.search(r'json" id="data">(.*?)</script>', self.source, re.S)[1])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("script", "style"):
            self.words.append(data)
            self.metrics[self.open[-1][1].get("data-metric")] = data

    def all(self, tag, **attributes):
        pairs = [(key.replace("_", "-"), value) for key, value in attributes.items()]
        return [attrs for name, attrs in self.elements if name == tag and all(attrs.get(k) == v for k, v in pairs)]

    def sheets(self, kind):
        """{(number, view): pixels} of the sprite sheets; view is "i" for images, "p" and "t" for heatmaps."""
        rule = rf"\.s(\d+) \.?([ipt])\S*?\{{background-image:url\(data:image/{kind};base64,([^)]*)"
        open_image = lambda data: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))  # noqa: E731
        return {(number, view): open_image(data) for number, view, data in re.findall(rule, self.source)}

    def tile(self, sheets, tile, view):
        """The 32 x 32 pixels that a tile shows."""
        x, y = (32 * int(n) for n in re.match(r"--x:(\d+);--y:(\d+)", tile["style"]).groups())
        return sheets[tile["class"].split()[0].removeprefix("s"), view][y : y + 32, x : x + 32]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and its page."""
    folder = tmp_path_factory.mktemp("runs") / "resnet18-1"
    return folder, Page(write_report(folder, make_run(folder), COMMAND))


def test_numbers_are_those_of_metrics_json(run):
    folder, page = run
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in "test_accuracy", "tta_accuracy":
        assert page.metrics[name] == f"{metrics[name]:.2%}".replace("%", " %")
    expected = dict(train_accuracy="76.67 %", valid_loss="0.6123", seconds="1 min 15 s", images_per_second="901")
    expected |= dict(parameters="11,173,962", dataset="made-up", device="cpu", precision="fp32", seed="42")
    assert expected.items() <= page.metrics.items()
    assert "tta_shift_accuracy" not in page.metrics  # null in the file
    assert "−1.00 points" in page.text and "3e−05" in page.text, "a minus sign, not a hyphen"
    assert "3 settings, 2 of them set for this run" in page.text and COMMAND in page.text


def test_sections_come_in_order_and_short_heads_are_upright(run, tmp_path):
    sections = [attrs["id"] for attrs in run[1].all("section")]
    assert sections == ["errors", "classes", "training", "settings"]
    assert [link["href"] for link in run[1].all("a")] == [f"#{name}" for name in sections]
    assert run[1].all("table", id="matrix")[0]["class"] == "matrix upright"
    make_run(tmp_path, classes=("airplane", "automobile", "bird", "caterpillar"))
    assert Page(write_report(tmp_path)).all("table", id="matrix")[0]["class"] == "matrix"


def test_every_error_is_a_tile_and_no_other_image(run):
    folder, page = run
    rows = read_predictions(folder)
    errors = rows[rows.target != rows.predicted].sort_values("loss", ascending=False)
    assert [int(tile["data-i"]) for tile in page.tiles] == errors["index"].tolist()
    classes = page.data["classes"]
    for tile, row in zip(page.tiles, errors.itertuples(), strict=True):
        assert (classes[int(tile["data-t"])], classes[int(tile["data-p"])]) == (row.target, row.predicted)
        assert float(tile["data-c"]) == pytest.approx(row.confidence, abs=1e-5)
        assert float(tile["data-l"]) == pytest.approx(row.loss, abs=1e-5)


def test_class_table_is_recall_precision_and_f1(run):
    folder, page = run
    rows = read_predictions(folder)
    true, predicted = rows.target == "green", rows.predicted == "green"
    both = (true & predicted).sum()
    other = rows[true & ~predicted].predicted.value_counts()
    row = page.text[page.text.index("Most often taken for") :]
    row = row[row.index("green") :][:80]
    for value in both / true.sum(), both / predicted.sum(), 2 * both / (true.sum() + predicted.sum()):
        assert f"{100 * value:.1f} %" in row
    assert f"({other.iloc[0]})" in row


def test_curves_are_drawn_as_svg_in_the_colours_of_the_page(run, tmp_path):
    folder, page = run
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.S)
    assert len(drawings) == 2 and "loss" in drawings[0] and "accuracy (%)" in drawings[1]
    assert all("currentColor" in svg and "#000000" not in svg and "var(--accent)" in svg for svg in drawings)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    make_run(tmp_path)
    assert re.findall(r"<svg.*?</svg>", write_report(tmp_path).read_text(), re.S) == drawings, "the same each time"


def test_pictures_are_the_images_and_views_the_heatmaps(tmp_path):
    """Sprite sheets hold the images without loss, and as JPEG the heatmap of each view's class."""
    tiles = make_run(tmp_path, n=400)
    page = Page(write_report(tmp_path, tiles))
    assert len(page.tiles) > 64, "more than one sheet"
    images, maps = page.sheets("webp"), page.sheets("jpeg")
    for k, tile in enumerate(page.tiles):
        np.testing.assert_array_equal(page.tile(images, tile, "i"), tiles.images[k])
        heat = [255 * colormaps["inferno"](cam[k])[..., :3] for cam in (tiles.cam_predicted, tiles.cam_true)]
        for view, right, wrong in ("p", *heat), ("t", *heat[::-1]):
            drawn = page.tile(maps, tile, view).astype(float)
            assert abs(drawn - right).mean() < 12 < abs(drawn - wrong).mean()


@pytest.mark.parametrize("method, used", [("GradCAM", "GradCAM"), ("EigenCAM", "EigenCAM"), ("ScoreCAM", "GradCAM")])
def test_errors_carry_the_heatmaps_of_both_their_classes(tiny_images, tiny_model, tmp_path, method, used):
    """EigenCAM explains no class; ScoreCAM would take days."""
    with torch.no_grad():
        tiny_model.linear.weight *= 100  # else next to nothing speaks for any class
    learn = cifar_learner(cifar_dls(tiny_images, bs=6, device="cpu"), tiny_model)
    with learn.no_bar():
        preds, settings = predict(learn), SimpleNamespace(cam_layer="layer1", cam_method=method)
        tiles = error_tiles(learn, learn.dls.valid, preds, settings)
    errors = preds.misclassified()
    assert len(tiles) == len(errors) > 3 and tiles.indices.tolist() == preds.indices[errors].tolist()
    assert tiles.caption == f"{used} of layer1, 8 x 8 pixels"
    x = torch.cat([x for x, _ in learn.dls.valid])[errors]
    for ids, maps in (preds.predicted, tiles.cam_predicted), (preds.targets, tiles.cam_true):
        if maps is not None:
            np.testing.assert_allclose(maps, gradcam(learn, x, ids[errors], "layer1", used).maps, atol=1e-5)
    both = tiles.cam_true is not None
    make_run(tmp_path, n=30)
    page = Page(write_report(tmp_path, tiles))
    views = [attrs["data-show"] for attrs in page.all("button") if "data-show" in attrs]
    assert views == (["", "p", "t"] if both else ["", "p"]) and ("for the true one" in page.text) == both
    assert both == (method != "EigenCAM")


def test_page_asks_for_nothing_and_runs_only_its_own_script(run):
    page = run[1]
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{digest}'" in policy
    for _, attrs in page.elements:
        for name in "src", "href", "xlink:href":
            assert attrs.get(name, "#").startswith(("data:", "#"))
    assert not re.search(r"url\((?!data:|#)|@import", page.source)


def test_names_are_escaped(tmp_path):
    tiles = make_run(tmp_path, classes=HOSTILE, model="<net>", dataset='a"b')
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"</dt><script>": "<i>"})
    page = Page(write_report(tmp_path, tiles))
    assert [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)] == []
    assert len(page.all("script")) == 2 and not page.all("net")
    assert page.data["classes"] == list(HOSTILE) and page.metrics["model"] == "<net>"
    assert "alert(1)</script>" not in page.source and "<script>alert(1)</script>" in page.text


def test_page_stays_small_and_says_what_is_left_out(tmp_path):
    """Noise is what compresses worst: of more errors than fit, those with the highest losses are kept."""
    tiles = make_run(tmp_path, n=4_000, wrong=1)
    noise = np.random.default_rng(0).integers(0, 256, (len(tiles), 32, 32, 3), dtype=np.uint8)
    path = write_report(tmp_path, replace(tiles, images=noise))
    page = Page(path)
    kept, left_out = len(page.tiles), len(tiles) - len(page.tiles)
    assert path.stat().st_size < LIMIT and kept > 1_500, "there is room for more"
    assert left_out > 0 and f"{left_out:,} errors of lower loss are left out" in page.text
    assert [int(tile["data-i"]) for tile in page.tiles] == tiles.indices[:kept].tolist()


def test_a_run_without_errors_and_one_without_a_test_split(tmp_path):
    page = Page(write_report(tmp_path, make_run(tmp_path, wrong=0)))
    assert "No errors: all 60 images of the test split are classified right." in page.text
    assert page.metrics["test_accuracy"] == "100.00 %" and not page.tiles
    page = Page(write_report(tmp_path, make_run(tmp_path, eval_split="valid", test_accuracy=None)))
    assert "The test split was not read" in page.text and "of the validation split are classified wrong" in page.text
    assert "valid_accuracy" in page.metrics and "test_accuracy" not in page.metrics
    assert "Validation loss" in page.text and "valid: 80.0 %" in page.text and "Test " not in page.text
    page = Page(write_report(tmp_path, make_run(tmp_path, best_epoch=2, best_valid_accuracy=0.875)))
    assert page.metrics["best_valid_accuracy"] == "87.50 %" and "epoch 2, in best.pth" in page.text
    assert f'load_run("{tmp_path.name}", weights="best.pth")' in page.text


def test_interrupted_run(tmp_path):
    """Two of three epochs, and nothing after them: what is there is shown."""
    make_run(tmp_path, epochs=2)
    for name in ("metrics.json", "predictions.csv", "summary.txt"):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert "Test loss" in page.text
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"eval_split": "valid"})
    page = Page(write_report(tmp_path))
    assert "Validation loss" in page.text and "Test loss" not in page.text
    assert "The run ended after 2 of 3 epochs." in page.text and "The run was not evaluated." in page.text
    assert "Epoch by epoch" in page.text and not page.tiles


def test_figures_stand_in_for_the_tiles_as_far_as_there_is_room(tmp_path):
    tiles = make_run(tmp_path)
    for name, size in ("misclassified", 30), ("gradcam", 1_000):
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    assert [image["alt"] for image in Page(write_report(tmp_path)).all("img")] == ["Misclassified images"]
    assert not Page(write_report(tmp_path, tiles)).all("img"), "the explorer shows the same"


def test_history_with_blanks_and_values_that_are_no_numbers(tmp_path):
    make_run(tmp_path)
    (tmp_path / "history.csv").write_text(
        "epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr,images_per_second,seconds\n"
        "1,nan,,2.0,0.2,0.1,10,1\n2,inf,,1.0,0.3,0.1,10,1\n3,1.5,,,0.3,0.1,10,1\n"
    )
    page = Page(write_report(tmp_path))
    assert "train: not measured" in page.text and "test: 30.0 %" in page.text


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_no_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="config.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_thousand_classes_are_shown_as_the_most_confused_pairs(tmp_path):
    """A table of a million cells would take all memory."""
    classes = tuple(f"class {k}" for k in range(1000))
    tiles = make_run(tmp_path, classes=classes, n=3_000, wrong=0.05)
    path = write_report(tmp_path, tiles)
    page, rows = Page(path), read_predictions(tmp_path)
    errors = rows[rows.target != rows.predicted].value_counts(["target", "predicted"]).to_dict()
    assert path.stat().st_size < LIMIT / 2 and len(page.tiles) == len(tiles)
    triples = [(classes[t], classes[p], n) for t, p, n in page.data["errors"]]
    assert {(t, p): n for t, p, n in triples} == errors and len(triples) == len(errors)
    assert [n for *_, n in triples] == sorted(errors.values(), reverse=True)
    cells = [attrs for attrs in page.all("button") if re.match("true .*, predicted", attrs.get("aria-label", ""))]
    assert [(int(cell["data-t"]), int(cell["data-p"])) for cell in cells] == [
        (t, p) for t, p, _ in page.data["errors"][:MOST_CONFUSED]
    ]


def test_hundred_classes(tmp_path):
    classes = tuple(f"class number {k} of the hundred, with a name that is long" for k in range(100))
    tiles = make_run(tmp_path, classes=classes, n=3_000, wrong=0.5)
    path = write_report(tmp_path, tiles)
    assert path.stat().st_size < LIMIT and len(Page(path).tiles) == len(tiles)
