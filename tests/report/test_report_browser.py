"""report.html in a real browser: what a reader sees, clicks and types. Needs Chromium (Debian: chromium)."""

import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections import Counter
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
        (their_in, self.out), (self.inp, their_out) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (their_in, their_out)]
        os.close(their_in), os.close(their_out)
        log = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self.pid = os.posix_spawn(
            BROWSER,
            [BROWSER, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, log, 0o600),
                (os.POSIX_SPAWN_OPEN, 2, f"{profile}.log", log, 0o600),
                (os.POSIX_SPAWN_DUP2, theirs[0], 3),
                (os.POSIX_SPAWN_DUP2, theirs[1], 4),
            ],
        )
        for fd in theirs:
            os.close(fd)
        self.buffer, self.number, self.session, self.events, self.problems = b"", 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self.session = None
        with suppress(OSError, RuntimeError, TimeoutError):
            self.send("Browser.close")
        os.close(self.out), os.close(self.inp)
        for _ in range(100):
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

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
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "about:")):
            if params["request"]["url"] != params["documentURL"]:  # the page itself
                self.problems.append(params["request"]["url"])

    def open(self, path, width=1280, height=900, dark=False, script=True):
        """Load a file and wait for it."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )
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
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        virtual = code.get(key) or ord(key.upper())
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=virtual,
                **(text if kind == "keyDown" else {}),
            )


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


def shown(page, key=None):
    """How many tiles are shown, or the values of one of their data attributes in the order on the page."""
    return page.run(f"{SHOWN}.length" if key is None else f"{SHOWN}.map(tile => tile.dataset.{key})")


def view(page, index):
    """What the tile of this index shows: its pictures that are visible, and what a screen reader says."""
    return page.run(f"""(() => {{ const button = document.querySelector('[data-i="{index}"] button');
        const seen = [...button.children].filter(e => getComputedStyle(e).visibility === 'visible');
        return [seen.map(e => e.className).join('+'), button.ariaLabel.match(/Showing (.*)/)[1]]; }})()""")


def errors(folder):
    return [row for row in read_predictions(folder) if row["target"] != row["predicted"]]


def test_numbers(page, folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    text = page.run(
        "Object.fromEntries([...document.querySelectorAll('[data-metric]')].map(e => [e.dataset.metric, e.innerText]))"
    )
    assert text["test_accuracy"] == f"{100 * metrics['test_accuracy']:.2f} %"
    assert text["tta_accuracy"] == f"{100 * metrics['tta_accuracy']:.2f} %"
    assert text["parameters"] == f"{metrics['parameters']:,}"
    assert text["valid_loss"] == f"{metrics['valid_loss']:.4g}"


def test_cells_classes_and_all_errors(page, folder):
    """Every way to choose shows the errors of predictions.csv, no more and no fewer."""
    rows, classes = errors(folder), ("red", "green", "blue")
    assert shown(page) == len(rows)
    cells = Counter((row["target"], row["predicted"]) for row in rows)
    assert len(cells) == 6
    for (true, predicted), n in cells.items():
        t, p = classes.index(true), classes.index(predicted)
        page.click(f"#matrix td button[data-t='{t}'][data-p='{p}']")
        assert shown(page) == n
        wanted = {row["index"] for row in rows if row["target"] == true and row["predicted"] == predicted}
        assert set(shown(page, "i")) == wanted
        assert page.run("document.getElementById('status').textContent") == f"{n} errors: {true} taken for {predicted}"
    page.click("#matrix th button[data-t='1']")
    assert shown(page) == sum(row["target"] == "green" for row in rows)
    page.click("#matrix th button[data-p='1']")
    assert shown(page) == sum(row["predicted"] == "green" for row in rows)
    assert page.run("document.querySelectorAll('[aria-pressed=true][data-p]').length") == 1
    page.click("[data-all]")
    assert shown(page) == len(rows)


@pytest.mark.parametrize(
    "choice, key", [("-l", "loss"), ("l", "loss"), ("-c", "confidence"), ("c", "confidence"), ("i", "index")]
)
def test_sorting(page, folder, choice, key):
    page.run(f"(e => {{ e.value = '{choice}'; e.dispatchEvent(new Event('change')); }})(document.all.sort)")
    rows = sorted(errors(folder), key=lambda row: float(row[key]), reverse=choice.startswith("-"))
    wanted = [row["index"] for row in rows]
    assert shown(page, "i") == wanted


def test_mouse_switches_a_tile(page):
    """Resting on a picture lifts the first heatmap and leaving puts it back; a click goes on and stays."""
    index = shown(page, "i")[3]
    other = shown(page, "i")[-1]
    picture = f"[data-i='{index}'] .pic"
    assert view(page, index) == ["", "image."]
    page.hover(picture)
    assert view(page, index) == ["+p", "heatmap for the predicted class."]
    page.hover("h1")
    assert view(page, index) == ["", "image."]
    page.click(picture)
    page.hover("h1")
    assert view(page, index)[0] == "+t"
    page.click(picture)
    assert view(page, index)[0] == ""
    page.click("[data-show=t]")
    assert view(page, other)[0] == "+t" and view(page, index)[0] == "+t"


def test_tap_switches_a_tile(page):
    index = shown(page, "i")[2]
    x, y = page.hover(f"[data-i='{index}'] .pic")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    seen = []
    for _ in range(3):
        page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        page.run("new Promise(done => setTimeout(done, 50))")
        seen.append(view(page, index)[0])
    assert seen == ["+p", "+t", ""]


def test_negligible_heatmap_is_labelled_and_not_drawn(page, folder):
    first = errors(folder)[0]["index"]  # whose map for the predicted class make_run calls negligible
    page.click("[data-show=p]")
    assert view(page, first)[1] == "heatmap for the predicted class, negligible."
    drawn = f"getComputedStyle(document.querySelector('[data-i=\"{first}\"] .p'), '::after').display"
    label = f"getComputedStyle(document.querySelector('[data-i=\"{first}\"] .pic'), '::after').content"
    assert page.run(drawn) == "none" and "negligible" in page.run(label)


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
    t, p = (("red", "green", "blue")[int(n)] for n in focus()[1:3])
    page.press("Enter")
    assert shown(page) == sum((row["target"], row["predicted"]) == (t, p) for row in errors(folder))
    tab_to("tiles")
    first, second = shown(page, "i")[:2]
    assert focus()[3] == first and focus()[4] == "solid"
    page.press("ArrowRight")
    assert focus()[3] == second
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
        found = []
        for node in nodes:
            with suppress(RuntimeError):  # no box: not shown
                found.append(chromium.send("DOM.getBoxModel", nodeId=node)["model"])
        return found

    pictures = boxes("#tiles li:first-child i")
    assert len(boxes("#tiles > li")) == len(errors(folder))
    assert len({box["content"][0] for box in pictures}) == 3 and {box["width"] for box in pictures} == {128}
    assert not boxes("select") and not boxes(".chips button") and not boxes("#copy") and boxes("#matrix")


def test_hostile_class_names(chromium, tmp_path):
    path = write_report(tmp_path, make_run(tmp_path, classes=HOSTILE))
    chromium.open(path)
    chromium.click("#matrix td button[data-t='0']")
    text = chromium.run("document.getElementById('status').textContent")
    assert HOSTILE[0] in text and "taken for" in text
    assert chromium.run(f"{SHOWN}.every(tile => tile.innerText.includes({json.dumps(HOSTILE[0])}))")
    assert chromium.problems == []


@pytest.mark.parametrize("case", [{"wrong": 0}, {"epochs": 1}, {"cams": False}, {"classes": ("a", "b")}])
def test_other_runs(chromium, tmp_path, case):
    tiles = make_run(tmp_path, **case)
    chromium.open(write_report(tmp_path, tiles), width=375)
    assert chromium.run(f"{SHOWN}.length") == len(tiles)
    assert chromium.run("document.documentElement.scrollWidth") == 375 and chromium.problems == []


def test_a_request_or_an_error_would_be_noticed(chromium, tmp_path):
    """The check on the check: a page that breaks every rule is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no"); missing()</script>')
    chromium.open(bad)
    text = str(chromium.problems)
    assert "127.0.0.1:9/x.png" in text and "missing is not defined" in text and "'no'" in text
