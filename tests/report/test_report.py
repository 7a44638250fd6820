"""report.html: what is on the page, that it is escaped and complete, and that it stays small."""

import base64
import csv
import hashlib
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from cifar_fastai import cifar_dls, cifar_learner
from cifar_fastai.config import BASE
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import gradcam
from cifar_fastai.evaluation.predictions import predict
from cifar_fastai.report.page import LIMIT, Tiles, write_report
from cifar_fastai.runs.results import error_tiles

HOSTILE = ("<script>alert(1)</script>", "\"'&</script><!--", 'x" onload="alert(1)')


def make_run(folder, classes=("red", "green", "blue"), n=60, wrong=0.3, epochs=3, cams=True, seed=0, **metrics):
    """A run folder with everything that `write_report` reads but figures, and the Tiles of its errors.

    `n` images, about the fraction `wrong` of them misclassified; `metrics` replaces entries of metrics.json.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    true = np.arange(n) % len(classes)
    predicted = np.where(rng.random(n) < wrong, (true + rng.integers(1, len(classes), n)) % len(classes), true)
    confidence, losses = rng.uniform(0.3, 1, n), rng.exponential(2, n)
    names = np.array(classes, dtype=object)
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "target", "predicted", "confidence", "loss"])
        writer.writerows(zip(range(n), names[true], names[predicted], confidence, losses, strict=True))
    columns = "epoch train_loss train_accuracy valid_loss valid_accuracy lr images_per_second seconds".split()
    with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for k in range(epochs):
            writer.writerow([k + 1, 2 / (k + 1), 1 - 0.7 / (k + 1), 1.8 / (k + 1), 1 - 0.6 / (k + 1), 0.01, 900.5, 1.2])
    accuracy = float((true == predicted).mean())
    write_json(
        folder / "metrics.json",
        {
            "dataset": "made-up",
            "model": "resnet18",
            "parameters": 11173962,
            "epochs": 3,
            "seed": 42,
            "device": "cpu",
            "precision": "fp32",
            "eval_split": "test",
            "train_accuracy": 0.7667,
            "valid_accuracy": accuracy,
            "valid_loss": 0.61234,
            "test_accuracy": accuracy,
            "tta_accuracy": accuracy + 0.01,
            "tta_shift_accuracy": None,
            "class_accuracy": dict.fromkeys(classes),
            "images_per_second": 901.2,
            "seconds": 75.3,
            **metrics,
        },
    )
    given = {"epochs": 3, "data": "/some where/it's", "label_smoothing": 0.1, "no_test": True, "out": "runs/x"}
    write_json(
        folder / "config.json",
        {
            "recipe": "resnet18",
            "given": given,
            "parameters": {**BASE, **given},
            "data_fingerprint": "f00d",
            "classes": classes,
            "hardware": "a processor",
            "versions": {"python": "3.12", "torch": "2.9"},
        },
    )
    (folder / "summary.txt").write_text("conv1  64 x 32 x 32  1,728\n", encoding="utf-8")
    errors = np.flatnonzero(true != predicted)
    k = len(errors)
    images = np.kron(rng.integers(0, 256, (k, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    maps = np.kron(rng.random((2, k, 4, 4)), np.ones((8, 8))).astype(np.float32) if cams else (None, None)
    faint = np.arange(k) == 0
    return Tiles(
        images,
        errors,
        names[true[errors]],
        names[predicted[errors]],
        confidence[errors],
        losses[errors],
        *maps,
        *((faint, ~faint) if cams else (None, None)),
        caption="GradCAM of layer3, 8 x 8",
    )


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path, **changes):
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and what carries data-metric."""

    VOID = {"meta", "link", "img", "br", "input", "path"}

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.words, self.open, self.metrics = [], [], [], {}
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("script", "style"):
            self.words.append(data)
            if name := self.open[-1][1].get("data-metric"):
                self.metrics[name] = data

    def all(self, tag, **wanted):
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and all(attrs.get(key.replace("_", "-")) == value for key, value in wanted.items())
        ]

    @property
    def tiles(self):
        return [attrs for attrs in self.all("li") if "data-i" in attrs]

    @property
    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and its page."""
    folder = tmp_path_factory.mktemp("runs") / "resnet18-1"
    tiles = make_run(folder)
    return folder, Page(write_report(folder, tiles))


def read_predictions(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_metrics_json(run):
    folder, page = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert page.metrics["test_accuracy"] == f"{metrics['test_accuracy']:.2%}".replace("%", " %")
    assert page.metrics["tta_accuracy"] == f"{metrics['tta_accuracy']:.2%}".replace("%", " %")
    assert page.metrics["train_accuracy"] == "76.67 %"
    assert page.metrics["valid_loss"] == "0.6123"
    assert page.metrics["seconds"] == "1 min 15 s"
    assert page.metrics["images_per_second"] == "901"
    assert page.metrics["parameters"] == "11,173,962"
    names = "dataset", "device", "precision", "seed"
    assert [page.metrics[name] for name in names] == ["made-up", "cpu", "fp32", "42"]
    assert "tta_shift_accuracy" not in page.metrics  # null in the file


def test_every_error_is_a_tile_and_no_other_image(run):
    folder, page = run
    wrong = {row["index"]: row for row in read_predictions(folder) if row["target"] != row["predicted"]}
    assert {tile["data-i"] for tile in page.tiles} == set(wrong)
    losses = [float(tile["data-l"]) for tile in page.tiles]
    assert losses == sorted(losses, reverse=True)
    for tile in page.tiles:
        row = wrong[tile["data-i"]]
        names = page.data["classes"][int(tile["data-t"])], page.data["classes"][int(tile["data-p"])]
        assert names == (row["target"], row["predicted"])
        assert float(tile["data-c"]) == pytest.approx(float(row["confidence"]), abs=1e-5)
        assert float(tile["data-l"]) == pytest.approx(float(row["loss"]), abs=1e-5)


def test_confusion_matrix_has_a_button_for_every_cell_with_errors(run):
    folder, page = run
    rows = read_predictions(folder)
    classes, matrix = page.data["classes"], np.array(page.data["matrix"])
    assert classes == ["red", "green", "blue"]
    for t, true in enumerate(classes):
        for p, predicted in enumerate(classes):
            n = sum(row["target"] == true and row["predicted"] == predicted for row in rows)
            assert matrix[t, p] == n
            cells = page.all("button", aria_label=f"true {true}, predicted {predicted}: {n}")
            assert len(cells) == (n > 0 and t != p)


def test_class_table_is_recall_precision_and_f1(run):
    folder, page = run
    rows = read_predictions(folder)
    both = sum(row["target"] == row["predicted"] == "green" for row in rows)
    true, taken = (sum(row[key] == "green" for row in rows) for key in ("target", "predicted"))
    text = page.text[page.text.index("Most often taken for") :]
    text = text[text.index("green") :]
    for value in both / true, both / taken, 2 * both / (true + taken):
        assert f"{100 * value:.1f} %" in text[:80]


def test_pictures_are_the_images(run, tmp_path):
    """Tile by tile, the sprite sheet holds the pixels that were given, without loss."""
    tiles = make_run(tmp_path / "run", n=400)
    page = Page(write_report(tmp_path / "run", tiles))
    assert len(page.tiles) > 64, "more than one sheet"
    css = re.findall(r"\.s(\d+) i\{background-image:url\(data:image/webp;base64,([^)]*)\)", page.source)
    sheets = {number: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for number, data in css}
    images = dict(zip(map(str, tiles.indices), tiles.images, strict=True))
    for tile in page.tiles:
        x, y = (32 * int(n) for n in re.match(r"--x:(\d+);--y:(\d+)", tile["style"]).groups())
        sheet = sheets[tile["class"].split()[0].removeprefix("s")]
        assert (sheet[y : y + 32, x : x + 32] == images[tile["data-i"]]).all()


def test_each_view_holds_the_heatmap_of_its_class(tmp_path):
    """The sheets for the predicted and for the true class, tile by tile: JPEG, hence near, and far from each other."""
    tiles = make_run(tmp_path, n=400)
    page = Page(write_report(tmp_path, tiles))
    css = re.findall(r"\.s(\d+) \.([pt])::after\{background-image:url\(data:image/jpeg;base64,([^)]*)\)", page.source)
    sheets = {
        (number, view): np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int) for number, view, data in css
    }
    maps = {"p": tiles.cam_predicted, "t": tiles.cam_true}
    at = {str(index): k for k, index in enumerate(tiles.indices)}
    for tile in page.tiles:
        x, y = (32 * int(n) for n in re.match(r"--x:(\d+);--y:(\d+)", tile["style"]).groups())
        for view, other in ("p", "t"), ("t", "p"):
            drawn = sheets[tile["class"].split()[0].removeprefix("s"), view][y : y + 32, x : x + 32]

            def apart(view, drawn=drawn, k=at[tile["data-i"]]):
                return abs(drawn - (255 * colormaps["inferno"](maps[view][k])[..., :3])).mean()

            assert apart(view) < 12 < apart(other)


def test_errors_carry_the_heatmaps_of_both_their_classes(tiny_images, tiny_model):
    with torch.no_grad():
        tiny_model.linear.weight *= 100  # else next to nothing speaks for any class
    learn = cifar_learner(cifar_dls(tiny_images, bs=6, device="cpu"), tiny_model)
    cfg = SimpleNamespace(cam_layer="layer1", cam_method="GradCAM")
    with learn.no_bar():
        preds = predict(learn)
        tiles = error_tiles(learn, learn.dls.valid, preds, cfg)
    errors = preds.misclassified()
    assert len(tiles) == len(errors) > 3 and tiles.indices.tolist() == preds.indices[errors].tolist()
    x = torch.cat([x for x, _ in learn.dls.valid])[errors]
    by_predicted, by_true = (gradcam(learn, x, ids[errors], "layer1") for ids in (preds.predicted, preds.targets))
    np.testing.assert_allclose(tiles.cam_predicted, by_predicted.maps, atol=1e-5)
    np.testing.assert_allclose(tiles.cam_true, by_true.maps, atol=1e-5)
    assert not np.allclose(tiles.cam_predicted, tiles.cam_true)
    assert tiles.caption == "GradCAM of layer1, 8 x 8 pixels"


@pytest.mark.parametrize("method, used, both", [("EigenCAM", "EigenCAM", False), ("ScoreCAM", "GradCAM", True)])
def test_methods_without_a_class_and_methods_that_take_days(tiny_images, tiny_model, tmp_path, method, used, both):
    learn = cifar_learner(cifar_dls(tiny_images, bs=6, device="cpu"), tiny_model)
    with learn.no_bar():
        tiles = error_tiles(learn, learn.dls.valid, predict(learn), SimpleNamespace(cam_layer=None, cam_method=method))
    assert tiles.caption.startswith(f"{used} of") and (tiles.cam_true is not None) == both
    make_run(tmp_path, n=30)
    names = np.array(["red", "green", "blue"])[np.arange(len(tiles)) % 3], np.array(["blue"] * len(tiles))
    page = Page(write_report(tmp_path, replace(tiles, targets=names[0], predicted=names[1])))
    views = [attrs["data-show"] for attrs in page.all("button") if "data-show" in attrs]
    assert views == (["", "p", "t"] if both else ["", "p"])
    assert ("for the true one" in page.text) == both


def test_command_repeats_the_run(run):
    words = shlex.split(re.search(r"python recipes/.*?(?= Copy)", run[1].text)[0])
    assert words == [
        "python",
        "recipes/resnet18.py",
        "--epochs",
        "3",
        "--data",
        "/some where/it's",
        "--label-smoothing",
        "0.1",
        "--no-test",
    ]


def test_page_asks_for_nothing_and_runs_only_its_own_script(run):
    page = run[1]
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for _, attrs in page.elements:
        for name in "src", "href":
            assert attrs.get(name, "#").startswith(("data:", "#"))
    assert not re.search(r"url\((?!data:)|@import", page.source)


def test_class_names_are_escaped(tmp_path):
    tiles = make_run(tmp_path, classes=HOSTILE, model="<net>", dataset='a"b')
    change_json(tmp_path / "config.json", **{"</dt><script>": "<i>"})
    page = Page(write_report(tmp_path, tiles))
    assert [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)] == []
    assert len(page.all("script")) == 2 and not page.all("net")
    assert page.data["classes"] == list(HOSTILE)
    assert "alert(1)</script>" not in page.source
    assert "<script>alert(1)</script>" in page.text
    assert page.metrics["model"] == "<net>"


def test_page_stays_small_and_says_what_is_left_out(tmp_path):
    """Noise is what compresses worst: of more errors than fit, those with the highest losses are kept."""
    tiles = make_run(tmp_path, n=4_000, wrong=1)
    noise = np.random.default_rng(0).integers(0, 256, (len(tiles), 32, 32, 3), dtype=np.uint8)
    path = write_report(tmp_path, replace(tiles, images=noise))
    assert path.stat().st_size < LIMIT
    page = Page(path)
    n_left = len(tiles) - len(page.tiles)
    assert n_left > 0 and f"{n_left:,} errors of lower loss are left out" in page.text
    worst = tiles.indices[np.argsort(-tiles.losses)[: len(page.tiles)]]
    assert {int(tile["data-i"]) for tile in page.tiles} == set(worst)
    assert len(page.tiles) > 1_500, "there is room for more"


def test_a_run_without_errors(tmp_path):
    page = Page(write_report(tmp_path, make_run(tmp_path, wrong=0)))
    assert "No errors: all 60 images of the test split are classified right." in page.text
    assert page.metrics["test_accuracy"] == "100.00 %" and not page.tiles


def test_validation_split_is_named(tmp_path):
    tiles = make_run(tmp_path, eval_split="valid", test_accuracy=None)
    page = Page(write_report(tmp_path, tiles))
    assert "The test split was not read" in page.text
    assert "valid_accuracy" in page.metrics and "test_accuracy" not in page.metrics
    assert "of the validation split are classified wrong" in page.text


def test_interrupted_run(tmp_path):
    """Two of three epochs, and nothing after them: what is there is shown."""
    make_run(tmp_path, epochs=2)
    for name in ("metrics.json", "predictions.csv", "summary.txt"):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert "The run ended after 2 of 3 epochs." in page.text and "The run was not evaluated." in page.text
    assert "Epoch by epoch" in page.text and not page.tiles


def test_without_tiles_the_figures_stand_in(tmp_path):
    make_run(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "misclassified.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 2400, 3), np.uint8)).save(tmp_path / "schedule.png")
    page = Page(write_report(tmp_path))
    titles = {image["alt"]: (int(image["width"]), image["src"][:15]) for image in page.all("img")}
    assert titles["Misclassified images"] == (40, "data:image/png;")
    assert titles["Schedule of the learning rate"] == (1800, "data:image/webp"), "a large figure is made smaller"
    assert not page.tiles


def test_history_with_blanks_and_values_that_are_no_numbers(tmp_path):
    make_run(tmp_path, train_accuracy=None)
    (tmp_path / "history.csv").write_text(
        "epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,lr,images_per_second,seconds\n"
        "1,nan,,2.0,0.2,0.1,10,1\n2,inf,,1.0,0.3,0.1,10,1\n3,1.5,,,0.3,0.1,10,1\n"
    )
    page = Page(write_report(tmp_path))
    paths = [attrs["d"] for attrs in page.all("path") if attrs["class"] != "rule"]
    assert len(paths) == 4 and not any("nan" in d or "inf" in d for d in paths)
    assert paths[2].count("M") == 1 and paths[0] == ""


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_no_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="config.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_tiles_of_unequal_length(tmp_path):
    tiles = make_run(tmp_path)
    with pytest.raises(ValueError, match="one value for each image"):
        replace(tiles, losses=tiles.losses[1:])


def test_hundred_classes(tmp_path):
    classes = tuple(f"class number {k} of the hundred, with a name that is long" for k in range(100))
    tiles = make_run(tmp_path, classes=classes, n=3_000, wrong=0.5)
    path = write_report(tmp_path, tiles)
    assert path.stat().st_size < LIMIT and len(Page(path).tiles) == len(tiles)
