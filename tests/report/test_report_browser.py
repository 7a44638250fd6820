"""report.html in a real browser: what a reader sees, clicks and types. Needs Chromium (Debian: chromium)."""

import json
import os
import select
import shutil
import subprocess
from contextlib import suppress

import pytest
from test_report import HOSTILE, make_run, read_predictions

from cifar_fastai.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium")


class Chromium:
    """Headless Chromium, driven through its DevTools pipe: messages of JSON that end in a zero byte.

    `problems` collects what no report may cause: errors and warnings on the console, exceptions, requests.
    """

    FLAGS = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
    ).split()

    def __init__(self, profile):
        (commands, self.out), (self.inp, answers) = os.pipe(), os.pipe()
        pipes = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'  # the numbers that Chromium expects
        command = ["bash", "-c", pipes, BROWSER, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(commands, answers), **silent)
        os.close(commands), os.close(answers)
        self.buffer, self.number, self.session, self.events, self.problems = b"", 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.inp)

    def send(self, method, **params):
        """Call `method` and return its result; events that come meanwhile are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self, seconds=60):
        while b"\0" not in self.buffer:
            if not select.select([self.inp], [], [], seconds)[0]:
                raise TimeoutError(f"the browser has been silent for {seconds} s")
            data = os.read(self.inp, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, event, params):
        self.events.append(event)
        if event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(params["args"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "about:")) and url != params["documentURL"]:  # the page itself
                self.problems.append(url)

    def open(self, path, width=1280, dark=False, script=True):
        """Load a file and wait for it."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear(), self.problems.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.receive()

    def run(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector):
        """Move the mouse to the middle of an element and click, as a hand would."""
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector):
        x, y, hit = self.run(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center', inline: 'center'}});
            const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;
            return [x, y, e.contains(document.elementFromPoint(x, y))]; }})()"""
        )
        assert hit, f"{selector} is covered by another element"
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def press(self, key):
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        event = {"key": key, "windowsVirtualKeyCode": code.get(key) or ord(key)}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "resnet18-1"
    write_report(folder, make_run(folder, n=240))
    return folder


@pytest.fixture
def page(chromium, folder):
    """The report, open; at the end it must have caused no error and asked for nothing."""
    chromium.open(folder / "report.html")
    yield chromium
    chromium.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert chromium.problems == []


SHOWN = "[...document.querySelectorAll('#tiles > li')].filter(tile => tile.checkVisibility())"
STATUS = "document.getElementById('status').textContent"
CLASSES = ("red", "green", "blue")


def shown(page):
    """The indices of the tiles that are shown, in the order on the page."""
    return page.run(f"{SHOWN}.map(tile => +tile.dataset.i)")


def view(page, index):
    """What the tile of this index shows: its pictures that are visible, and what a screen reader says."""
    return page.run(f"""(() => {{ const button = document.querySelector('[data-i="{index}"] button');
        const seen = [...button.children].filter(e => getComputedStyle(e).visibility === 'visible');
        return [seen.map(e => e.className).join('+'), button.ariaLabel.match(/Showing (.*)/)[1]]; }})()""")


def errors(folder):
    rows = read_predictions(folder)
    return rows[rows.target != rows.predicted]


def test_cells_classes_and_all_errors(page, folder):
    """Every way to choose shows the errors of predictions.csv, no more and no fewer."""
    rows = errors(folder)
    cells = rows.groupby(["target", "predicted"])["index"].apply(set)
    assert len(cells) == 6
    for (true, predicted), indices in cells.items():
        page.click(f"#matrix td button[data-t='{CLASSES.index(true)}'][data-p='{CLASSES.index(predicted)}']")
        assert set(shown(page)) == indices
        assert page.run(STATUS) == f"{len(indices)} errors: {true} taken for {predicted}"
    for selector, part in (
        ("#matrix th button[data-t='1']", rows[rows.target == "green"]),
        ("#matrix th button[data-p='1']", rows[rows.predicted == "green"]),
        ("[data-all]", rows),
    ):
        page.click(selector)
        assert set(shown(page)) == set(part["index"])
        assert page.run(f"document.querySelector(`{selector}`).ariaPressed") == "true"


def test_sorting(page, folder):
    orders = {"-l": "loss", "l": "loss", "-c": "confidence", "c": "confidence", "i": "index"}
    for choice, key in orders.items():
        page.run(f"(e => {{ e.value = '{choice}'; e.dispatchEvent(new Event('change')); }})(document.all.sort)")
        assert shown(page) == errors(folder).sort_values(key, ascending=choice[0] != "-")["index"].tolist()


def test_mouse_switches_a_tile(page):
    """Resting on a picture lifts the first heatmap and leaving puts it back; a click goes on and stays."""
    index, *_, other = shown(page)
    picture = f"[data-i='{index}'] .pic"
    assert view(page, index) == ["", "image."]
    page.hover(picture)
    assert view(page, index)[0] == "+p"
    page.hover("h1")
    assert view(page, index) == ["", "image."]
    for expected in "+t", "":
        page.click(picture)
        page.hover("h1")
        assert view(page, index)[0] == expected
    page.click("[data-show=t]")
    assert view(page, other)[0] == "+t" and view(page, index)[0] == "+t"


def test_tap_switches_a_tile(page):
    index = shown(page)[2]
    x, y = page.hover(f"[data-i='{index}'] .pic")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    for expected in "+p", "+t", "":
        page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        page.run("new Promise(done => setTimeout(done, 50))")
        assert view(page, index)[0] == expected
    first = shown(page)[0]  # make_run calls its map for the predicted class negligible: labelled, not drawn
    page.click("[data-show=p]")
    assert view(page, first)[1] == "heatmap for the predicted class, negligible."
    style = "getComputedStyle(document.querySelector('[data-i=\"{}\"] {}'), '::after').{}"
    assert page.run(style.format(first, ".p", "display")) == "none"
    assert "negligible" in page.run(style.format(first, ".pic", "content"))


def test_keyboard_alone(page, folder):
    """Tab reaches the table and the gallery, arrows move in them, keys choose and switch; focus can be seen."""

    def focus():
        return page.run(
            "(e => [e.closest('#matrix, #tiles')?.id, e.dataset.t, e.dataset.p, "
            "e.closest('li')?.dataset.i, getComputedStyle(e).outlineStyle])(document.activeElement)"
        )

    def tab_to(name):
        for _ in range(40):
            page.press("Tab")
            if focus()[0] == name:
                return
        pytest.fail(f"Tab does not reach {name}")

    tab_to("matrix")
    assert focus()[1:3] == ["0", None], "the first class"
    for key in "ArrowRight", "ArrowDown", "ArrowRight":  # past the diagonal, where there is no button
        page.press(key)
    assert focus()[1:3] == ["1", "2"] or focus()[1:3] == ["2", "1"]
    true, predicted = (CLASSES[int(n)] for n in focus()[1:3])
    page.press("Enter")
    rows = errors(folder)
    assert set(shown(page)) == set(rows[(rows.target == true) & (rows.predicted == predicted)]["index"])
    tab_to("tiles")
    first, second = shown(page)[:2]
    assert focus()[3] == str(first) and focus()[4] == "solid"
    page.press("ArrowRight")
    assert focus()[3] == str(second)
    page.press("Enter")
    assert view(page, second)[0] == "+p"
    page.press("3")
    assert view(page, second)[0] == "+t"
    page.press("1")
    assert view(page, second)[0] == ""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 375])
def test_text_can_be_read(chromium, folder, width, dark):
    """Nothing sticks out of the window, and words stand out from their ground by 4.5 to 1."""
    chromium.open(folder / "report.html", width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) < 128") == dark
    low = chromium.run(r"""(() => {
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = color => { const [r, g, b] = color.match(/[\d.]+/g).map(v => linear(v / 255));
                                 return .2126 * r + .7152 * g + .0722 * b + .05; };
        const clear = 'rgba(0, 0, 0, 0)', low = [];
        const ground = e => { const color = e ? getComputedStyle(e).backgroundColor : 'rgb(255, 255, 255)';
                              return color === clear ? ground(e.parentElement) : color; };
        const onPaper = color => {                     // what a half transparent cell is on the page's ground
          const canvas = new OffscreenCanvas(1, 1).getContext('2d');
          for (const style of [getComputedStyle(document.body).backgroundColor, color]) {
            canvas.fillStyle = style;
            canvas.fillRect(0, 0, 1, 1);
          }
          return `rgb(${canvas.getImageData(0, 0, 1, 1).data.slice(0, 3).join()})`; };
        const words = 'p, dt, dd, h1, h2, h3, a, summary, small, caption, td, th, button, label, .tiles span';
        for (const e of document.querySelectorAll(words)) {
          if (!e.innerText.trim()) continue;
          const ink = light(onPaper(getComputedStyle(e).color)), paper = light(onPaper(ground(e)));
          const ratio = Math.max(ink, paper) / Math.min(ink, paper);
          if (ratio < 4.5) low.push([e.outerHTML.slice(0, 80), ratio]);
        }
        return low; })()""")
    assert low == [] and chromium.problems == []


def test_without_javascript_it_is_a_gallery(chromium, folder):
    """Every error with its three pictures side by side; no control that would do nothing."""
    chromium.open(folder / "report.html", script=False)
    tree = chromium.send("DOM.getDocument")["root"]["nodeId"]

    def boxes(selector):
        nodes = chromium.send("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"]
        models = []
        for node in nodes:
            with suppress(RuntimeError):  # no box: not shown
                models.append(chromium.send("DOM.getBoxModel", nodeId=node)["model"])
        return models

    pictures = boxes("#tiles li:first-child i")
    assert len(boxes("#tiles > li")) == len(errors(folder))
    assert len({box["content"][0] for box in pictures}) == 3 and {box["width"] for box in pictures} == {128}
    assert not boxes("select") and not boxes(".chips button") and not boxes("#copy") and boxes("#matrix")


CASES = [{"wrong": 0}, {"epochs": 1}, {"cams": False}, {"classes": ("a", "b")}, {"classes": HOSTILE}]


@pytest.mark.parametrize("case", CASES)
def test_other_runs(chromium, tmp_path, case):
    tiles = make_run(tmp_path, **case)
    chromium.open(write_report(tmp_path, tiles), width=375)
    assert chromium.run(f"{SHOWN}.length") == len(tiles)
    assert chromium.run("document.documentElement.scrollWidth") == 375
    if HOSTILE in case.values():
        chromium.click("#matrix td button[data-t='0']")
        text = chromium.run(STATUS)
        assert HOSTILE[0] in text and "taken for" in text
        assert chromium.run(f"{SHOWN}.every(tile => tile.innerText.includes({json.dumps(HOSTILE[0])}))")
    assert chromium.problems == []


def test_a_request_or_an_error_would_be_noticed(chromium, tmp_path):
    """The check on the check: a page that breaks every rule is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); missing()</script>')
    chromium.open(bad)
    text = str(chromium.problems)
    assert "127.0.0.1:9/x.png" in text and "missing is not defined" in text and "'no'" in text
