"""report.html in a real browser: what a reader sees, clicks, taps and types, and what axe-core says of it."""

import pytest
from test_report import HOSTILE, make_run, read_predictions

from cifar_fastai.report.page import write_report

axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CLASSES = ("red", "green", "blue")
FIRST = 20  # tiles before "Show all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "resnet18-1"
    write_report(folder, make_run(folder, n=240), "python recipes/resnet18.py --epochs 3")
    return folder


@pytest.fixture
def page(visit, folder):
    return visit(folder / "report.html")


def shown(page):
    """The indices of the tiles that are shown, in the order on the page."""
    return [
        int(index) for index in page.locator("#tiles > li:visible").evaluate_all("all => all.map(e => e.dataset.i)")
    ]


def view(page, index):
    """What the tile of this index shows: its pictures that are visible, and what a screen reader says."""
    picture = page.locator(f"[data-i='{index}'] .pic")
    layers = picture.locator("i").evaluate_all(
        "all => all.filter(e => getComputedStyle(e).visibility === 'visible').map(e => e.className)"
    )
    return "+".join(layers), picture.get_attribute("aria-label").partition("Showing ")[2]


def errors(folder):
    rows = read_predictions(folder)
    return rows[rows.target != rows.predicted]


def test_cells_classes_and_all_errors(page, folder):
    """Every way to choose shows the errors of predictions.csv, no more and no fewer."""
    rows = errors(folder)
    ranked = rows.sort_values("loss", ascending=False)["index"].tolist()
    assert shown(page) == ranked[:FIRST] and page.inner_text("#status") == f"{len(rows)} errors"
    page.click(f"text=Show all {len(rows)}")
    assert shown(page) == ranked and page.locator("#more").is_hidden()
    assert page.evaluate("+document.activeElement.parentElement.dataset.i") == ranked[FIRST]
    cells = rows.groupby(["target", "predicted"])["index"].apply(set)
    assert len(cells) == 6
    for (true, predicted), indices in cells.items():
        page.click(f"#matrix td button[data-t='{CLASSES.index(true)}'][data-p='{CLASSES.index(predicted)}']")
        assert set(shown(page)) == indices
        assert page.inner_text("#status") == f"{len(indices)} errors: {true} taken for {predicted}"
    for selector, part in (
        ("#matrix th button[data-t='1']", rows[rows.target == "green"]),
        ("#matrix th button[data-p='1']", rows[rows.predicted == "green"]),
        ("[data-all]", rows),
    ):
        page.click(selector)
        assert set(shown(page)) == set(part["index"])
        assert page.get_attribute(selector, "aria-pressed") == "true"


def test_sorting(page, folder):
    orders = {"-l": "loss", "l": "loss", "-c": "confidence", "c": "confidence", "i": "index"}
    for choice, key in orders.items():
        page.select_option("#sort", choice)
        ranked = errors(folder).sort_values(key, ascending=choice[0] != "-")["index"].tolist()
        assert shown(page) == ranked[:FIRST]


def test_mouse_switches_a_tile(page):
    """Resting on a picture lifts the first heatmap and leaving puts it back; a click goes on and stays."""
    index, *_, other = shown(page)
    picture = f"[data-i='{index}'] .pic"
    assert view(page, index) == ("", "image.")
    page.hover(picture)
    assert view(page, index)[0] == "+p"
    page.hover("h1")
    assert view(page, index) == ("", "image.")
    for expected in "+t", "":
        page.click(picture)
        page.hover("h1")
        assert view(page, index)[0] == expected
    page.click("[data-show=t]")
    assert view(page, other)[0] == "+t" and view(page, index)[0] == "+t"


def test_tap_switches_a_tile(page):
    index = shown(page)[2]
    for expected in "+p", "+t", "":
        page.tap(f"[data-i='{index}'] .pic")
        assert view(page, index)[0] == expected
    first = shown(page)[0]  # make_run calls its map for the predicted class negligible: labelled, not drawn
    page.click("[data-show=p]")
    assert view(page, first)[1] == "heatmap for the predicted class, negligible."
    style = "getComputedStyle(document.querySelector('[data-i=\"{}\"] {}'), '::after').{}"
    assert page.evaluate(style.format(first, ".p", "display")) == "none"
    assert "negligible" in page.evaluate(style.format(first, ".pic", "content"))


def test_keyboard_alone(page, folder):
    """Tab reaches the table and the gallery, arrows move in them, keys choose and switch; focus can be seen."""

    def focus():
        return page.evaluate(
            "(e => [e.closest('#matrix, #tiles')?.id, e.dataset.t, e.dataset.p, "
            "e.closest('li')?.dataset.i, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if focus()[0] == name:
                return
        pytest.fail(f"Tab does not reach {name}")

    tab_to("matrix")
    assert focus()[1:3] == ["0", None], "the first class"
    for key in "ArrowRight", "ArrowDown", "ArrowRight":  # past the diagonal, where there is no button
        page.keyboard.press(key)
    assert focus()[1:3] == ["1", "2"] or focus()[1:3] == ["2", "1"]
    true, predicted = (CLASSES[int(n)] for n in focus()[1:3])
    page.keyboard.press("Enter")
    rows = errors(folder)
    assert set(shown(page)) == set(rows[(rows.target == true) & (rows.predicted == predicted)]["index"])
    tab_to("tiles")
    first, second = shown(page)[:2]
    assert focus()[3] == str(first) and focus()[4] == "solid"
    page.keyboard.press("ArrowRight")
    assert focus()[3] == str(second)
    for key, expected in ("Enter", "+p"), ("3", "+t"), ("1", ""):
        page.keyboard.press(key)
        assert view(page, second)[0] == expected


# elements that hide a part of themselves and have no shade that says so; a select and names with an ellipsis may
CUT = """() => [...document.querySelectorAll('body *')].filter(e => {
    const { overflowX, backgroundImage } = getComputedStyle(e);
    return e.clientWidth && e.scrollWidth > e.clientWidth + 1 && overflowX !== 'visible'
        && !backgroundImage.includes('gradient') && !e.matches('select, .matrix th span, .pic');
    }).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious_and_nothing_is_cut(visit, folder, width, dark):
    page = visit(folder / "report.html", width, dark)
    assert page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) < 128") == dark
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.click("[data-show=p]")
    assert page.evaluate("document.documentElement.scrollWidth") == width and page.evaluate(CUT) == []
    page.evaluate("document.querySelector('.bar').nextSibling.textContent = '100.0 %'")  # wider than the others
    bars = page.locator(".bar:visible").all()
    assert len(bars) == (3 if width > 600 else 0) and len({bar.bounding_box()["width"] for bar in bars}) < 2
    # axe does not look at words on a gradient, which the shade of what scrolls is
    page.add_style_tag(content=".scroll { background: var(--ground) !important }")
    result = axe.Axe().run(page, options={"resultTypes": ["violations", "incomplete"]}).response
    serious = [rule for rule in result["violations"] if rule["impact"] in ("serious", "critical")]
    assert [(rule["id"], node["html"]) for rule in serious for node in rule["nodes"]] == []
    assert {rule["id"] for rule in result["incomplete"]} <= {"color-contrast"}  # of words in a drawing


def test_without_javascript_it_is_a_gallery(visit, folder):
    """Every error with its three pictures side by side; no control that would do nothing."""
    page = visit(folder / "report.html", java_script_enabled=False)
    boxes = [picture.bounding_box() for picture in page.locator("#tiles li:first-child i").all()]
    assert len({box["x"] for box in boxes}) == 3 and {box["width"] for box in boxes} == {108}
    assert page.locator("#tiles > li:visible").count() == len(errors(folder))
    assert not page.locator("select:visible, .chips button:visible, #copy:visible, #more:visible").count()
    assert page.locator("#matrix").is_visible()


@pytest.mark.parametrize(
    "case", [{"wrong": 0}, {"epochs": 1}, {"cams": False}, {"classes": ("a", "b")}, {"classes": HOSTILE}]
)
def test_other_runs(visit, tmp_path, case):
    tiles = make_run(tmp_path, **case)
    page = visit(write_report(tmp_path, tiles), 390)
    assert len(shown(page)) == min(FIRST, len(tiles))
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and page.evaluate(CUT) == []
    if HOSTILE in case.values():
        page.click("#matrix td button[data-t='0']")
        assert HOSTILE[0] in page.inner_text("#status") and "taken for" in page.inner_text("#status")
        assert all(HOSTILE[0] in text for text in page.locator("#tiles > li").all_inner_texts())


def test_a_request_or_an_error_would_be_noticed(visit, problems, tmp_path):
    """The check on the check: a page that breaks every rule is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); missing()</script>')
    visit(bad)
    text = str(problems)
    assert "127.0.0.1:9/x.png" in text and "missing is not defined" in text and "'no'" in text
    problems.clear()
