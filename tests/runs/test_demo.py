"""The demo page in a browser and by its programming interface."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny_runs import Tiny

from cifar_fastai import errors, predict_files
from cifar_fastai.commands import demo
from cifar_fastai.errors import InputError
from cifar_fastai.runs.run import load_network

gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """The folder of a finished run on the tiny network, which has its name in this module."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_FASTAI_CACHE", str(folder / "cache"))
        yield Tiny(tiny_folder, patch).train(folder / "run", epochs=1).folder


@pytest.fixture(scope="module")
def address(run):
    """The address of the page of `run`, served by a thread."""
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
        demo(str(run), device="cpu")
    yield pages[0].local_url
    pages[0].close(verbose=False)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    return path


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    with closing(Client(address, verbose=False)) as client:
        yield client


def ask(client, file, k=2, layer="layer1", method="GradCAM", target="", alpha=0.5):
    """({class: probability}, HTML) that the page answers for a file."""
    from gradio_client import handle_file

    bars, html = client.predict(handle_file(file), k, layer, method, target, alpha, api_name="/answer")
    return {row["label"]: row["confidence"] for row in bars.get("confidences") or ()} if bars else {}, html


def test_a_picture_in_the_browser(visit, problems, address, run, photo):
    page = visit(address)
    page.set_default_timeout(30_000)
    for source in "Upload file", "Capture from camera", "Paste from clipboard":
        page.get_by_role("button", name=source, exact=True).wait_for()
    page.locator("input[type=file]").first.set_input_files(photo)
    caption = page.locator(".views figcaption")
    caption.first.wait_for()
    assert (
        "640 x 427, cropped" in caption.first.inner_text() and "GradCAM of layer1, 8 x 8" in caption.last.inner_text()
    )
    learn = load_network(run, "cpu")
    with learn.no_bar():
        (expected,) = predict_files(learn, photo)
    bars = page.locator("[data-testid$=confidence-set]")
    assert [text.split() for text in bars.all_inner_texts()] == [[name, f"{p:.0%}"] for name, p in expected.top3]
    page.get_by_label("number input for How many classes").fill("1")
    page.wait_for_function("document.querySelectorAll('[data-testid$=confidence-set]').length === 1")
    source, other = caption.last.inner_text(), next(name for name in expected.classes if name != expected.top3[0][0])
    assert expected.top3[0][0] in source
    page.get_by_label("Class to explain").click()
    page.get_by_role("option", name=other).click()
    page.locator(f".views figcaption:has-text('for {other}')").wait_for()
    page.get_by_label("number input for Opacity").fill("0")
    page.wait_for_function("new Set([...document.querySelectorAll('.views img')].map(e => e.src)).size === 1")
    page.locator(".gallery-item").nth(2).click()
    page.wait_for_function("!document.querySelector('.views figcaption').innerText.includes('640')")
    problems[:] = [text for text in problems if text != "Method not implemented."]  # a warning of Gradio's on uploads


@pytest.mark.parametrize("width, dark", [(390, True), pytest.param(1280, False, marks=pytest.mark.slow)])
def test_the_errors_by_keyboard(visit, address, run, width, dark):
    rows = pd.read_csv(run / "predictions.csv")
    rows = rows[rows.target != rows.predicted].sort_values("loss", ascending=False)
    page = visit(address, width, dark)
    page.set_default_timeout(30_000)
    page.get_by_role("tab", name="Try a picture").focus()
    for key in "Tab", "Enter":
        page.keyboard.press(key)
    tiles = page.locator("ul.errors li")
    tiles.first.wait_for()
    shown = lambda: [int(re.search(r"#(\d+)", text)[1]) for text in tiles.all_inner_texts()]  # noqa: E731
    assert shown() == rows["index"].tolist() and page.locator("ul.errors img").count() == len(rows) > 2
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert f"{len(rows)} of {len(rows)} errors among 18 images." in page.inner_text("[role=status]")
    page.get_by_label("number input for How many errors").fill("2")
    page.wait_for_function("document.querySelectorAll('ul.errors li').length === 2")
    name = rows.target.iloc[-1]
    page.get_by_label("True class").click()
    page.get_by_role("option", name=name).click()
    part = rows[rows.target == name]
    page.locator(f"[role=status]:has-text('{len(part)} of {len(rows)}')").wait_for()
    assert shown() == part["index"].tolist()[:2]


def test_what_is_no_picture_is_answered_in_one_line(client, tmp_path):
    (tmp_path / "<b>.png").write_text("no picture")
    Image.new("1", (8000, 6300)).save(tmp_path / "large.png")
    for name, words in ("<b>.png", "not an image"), ("large.png", "more than 50,000,000 pixels"):
        bars, html = ask(client, tmp_path / name)
        assert (
            bars == {} and words in html and 'role="alert"' in html and "/" not in html.split(":")[0].split("<b>")[-1]
        )
        assert "<b>.png" not in html


def test_twenty_at_once_and_fifty_megapixels_get_an_answer(client, photo, tmp_path):
    Image.new("RGB", (7000, 7000)).save(tmp_path / "large.jpg")
    with ThreadPoolExecutor(20) as pool:
        answers = [*pool.map(lambda k: ask(client, [photo, tmp_path / "large.jpg"][k % 20 == 19]), range(20))]
    assert all(len(bars) == 2 and "<img" in html for bars, html in answers)
    assert len({str(bars) for bars, _ in answers[:19]}) == 1 and "7000 x 7000" in answers[19][1]


@pytest.mark.parametrize("host, port", [("192.0.2.1", None), ("no such host", None), (None, 99999), (None, "busy")])
def test_an_address_that_cannot_be_served_at_is_one_line(run, address, host, port, capfd):
    port = int(address.rpartition(":")[2].strip("/")) if port == "busy" else port
    with pytest.raises(InputError, match="no page can be served there") as error:
        demo(str(run), host, port, device="cpu")
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_the_card_of_a_space_has_numbers_settings_and_the_command(run, tmp_path):
    demo(str(run), space=str(tmp_path / "space"))
    card, metrics = (tmp_path / "space" / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    assert f"{metrics['test_accuracy']:.2%}" in card and "## Settings" in card and "## Limits" in card
    command = re.search("This repeats the run: `(.+)`", card)[1]
    assert command.startswith("python recipes/resnet18.py") and str(run.parent) not in card


def test_without_gradio_or_a_run_it_ends_in_one_line(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not a run's folder"):
        demo(str(tmp_path))
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "file").touch()
    with pytest.raises(InputError, match="choose a new folder"):
        demo(str(run), space=str(tmp_path / "space"))
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'gradio is not installed: pip install "cifar_fastai\[demo\]"'):
        demo(str(run))
