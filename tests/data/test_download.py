"""Downloads from a local server that behaves badly: each mirror in turn, continued, checked, and never for ever."""

import http.server
import multiprocessing
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from tiny_data import encoded, random_pixels, tiny_files, write_tar

from cifar_fastai.data import download, images
from cifar_fastai.data.cache import DOWNLOADS
from cifar_fastai.data.images import CIFAR10_CLASSES, load_images
from cifar_fastai.errors import InputError


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the first part of the path; `server.log` gets (path, Range, bytes sent)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        kind, content, log = self.path.split("/")[1], self.server.content, self.server.log
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first and kind != "without-ranges" else 0
        log.append(entry := [self.path, self.headers.get("Range"), 0])
        if kind == "hangs":
            self.server.stop.wait(20)
        elif kind == "forbidden":
            self.send_error(403, "Forbidden\x1b[2J" if "/escape/" in self.path else None)
        elif kind == "refused":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif start > len(content) or (start and start == len(content)):
            self.send_error(416)
        else:
            content = {"other": b"<html>log in</html>" * 99, "altered": self.server.altered}.get(kind, content)[start:]
            self.send_response(206 if start else 200)
            if kind != "no-length":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            drops, stalls = kind in ("drops", "drops-once") and (kind == "drops" or not start), kind == "stalls"
            short = {"truncates": len(content) // 2, "drops": 30_000, "drops-once": 30_000, "stalls": 30_000}
            content = content[: short[kind]] if drops or stalls or kind == "truncates" else content
            if kind == "truncates" and start:
                content = b""
            self.wfile.write(content)
            entry[2] = len(content)
            if stalls:
                self.server.stop.wait(20)
        self.close_connection = True


def in_order(pixels, labels):
    return pixels, labels, pixels[0].T.tolist() == random_pixels(0).swapaxes(0, 1).tolist()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """`server.mirrors(*kinds)` lets "cifar10" have mirrors of these kinds; 30 images pass for the official ones."""
    monkeypatch.setattr("fastai.data.external.fastai_path", lambda kind: tmp_path / "fastai" / kind)
    monkeypatch.setattr(download, "PROBE", 0.5)
    monkeypatch.setattr(images, "CIFAR10_SPLITS", (20, 10))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "CIFAR10_URL", "CIFAR100_URL"):
        monkeypatch.delenv(name, raising=False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files = tiny_files(CIFAR10_CLASSES, 2, 1)
    others = {name: encoded(random_pixels(1000 + seed)) for seed, name in enumerate(files)}
    httpd.content = write_tar(tmp_path / "official.tgz", files).read_bytes()
    httpd.altered = write_tar(tmp_path / "altered.tgz", others).read_bytes()
    monkeypatch.setattr(images, "in_official_order", in_order)
    httpd.log, httpd.stop = [], threading.Event()
    base = f"http://127.0.0.1:{httpd.server_port}"

    def mirrors(*kinds, data="cifar10"):
        urls = tuple(kind if "://" in kind else f"{base}/{kind}/cifar-10-python.tar.gz" for kind in kinds)
        monkeypatch.setitem(download.MIRRORS, data, urls)
        return urls

    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield SimpleNamespace(mirrors=mirrors, httpd=httpd, log=httpd.log, size=len(httpd.content), base=base)
    httpd.stop.set()
    httpd.shutdown()
    httpd.server_close()


FAILURES = {
    "hangs": "no answer within 0.5 s|timed out",
    "forbidden": "HTTP Error 403: Forbidden",
    "forbidden/escape": r"HTTP Error 403: Forbidden\\x1b\[2J",  # a terminal would obey it
    "refused": "Connection refused",
    "truncates": r"the connection was lost after [\d,]+ of [\d,]+ bytes",
    "stalls": "timed out",
    "other": "not an archive, or a damaged one",
    "altered": "20 train and 10 test images, but not CIFAR-10's",
    "http://127.0.0.1:9/a.tgz": "Connection refused",
    "http://no.such.host.invalid/a.tgz": ".+",
    "nonsense://a.tgz": "unknown url type",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_bad_mirror_is_named_and_the_next_one_serves(server, own_cache, kind):
    bad, good = server.mirrors(kind, "good")
    server.mirrors(bad)
    began = time.monotonic()
    with pytest.raises(InputError, match=f"^CIFAR-10 is not available: .*{re.escape(bad)}: .*({FAILURES[kind]})"):
        load_images("cifar10")
    assert time.monotonic() - began < 8
    assert bad in load_images("auto").note
    wrong = [path.name for path in (own_cache / DOWNLOADS).glob("*.wrong")]
    assert len(wrong) == (kind in ("other", "altered")) and not list(own_cache.glob("*.npz"))
    server.mirrors(bad, good)
    loaded = load_images("auto")
    assert (loaded.name, loaded.source, loaded.note) == ("CIFAR-10", good, None)  # which the header shows
    n = len(server.log)
    assert load_images("cifar10").source == good and len(server.log) == n  # from the cache
    assert not [path for path in (own_cache / DOWNLOADS).iterdir() if path.name.endswith("gz")]


def test_a_transfer_that_drops_goes_on_where_it_stopped(server):
    server.mirrors("drops-once")
    assert load_images("cifar10").n_train == 20
    assert [(first, sent) for _, first, sent in server.log] == [
        (None, 30_000),
        ("bytes=30000-", server.size - 30_000),
    ]


@pytest.mark.parametrize("kind", ["good", "no-length", "without-ranges"])
@pytest.mark.parametrize("kept", [0.3, 1.0, 1.2])
def test_the_next_start_continues_a_part(server, own_cache, kind, kept):
    """Also where the part is as long as the file, or longer, or the server ignores ranges."""
    [url] = server.mirrors(kind)
    (own_cache / DOWNLOADS).mkdir(parents=True)
    content = server.httpd.content + bytes(server.size)
    part = own_cache / DOWNLOADS / f"{download.quote(url, safe='')}.part"
    part.write_bytes(content[: int(kept * server.size)])
    assert load_images("cifar10").source == url
    sent = sum(n for *_, n in server.log)
    assert sent == (server.size - int(kept * server.size) if kept < 1 and kind != "without-ranges" else server.size)


def test_a_mirror_that_always_drops_is_left_after_some_tries(server, own_cache, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 2)
    monkeypatch.setattr(server.httpd, "content", server.httpd.content + bytes(200_000))
    server.mirrors("drops")
    with pytest.raises(InputError, match="the connection was lost after 60,000 of"):
        load_images("cifar10")
    assert [path.stat().st_size for path in (own_cache / DOWNLOADS).glob("*.part")] == [60_000]


def test_ones_own_mirror_comes_first(server, monkeypatch, tmp_path):
    server.mirrors("forbidden")
    monkeypatch.setenv("CIFAR10_URL", f"{server.base}/own/repacked.tar.gz")
    assert load_images("cifar10").source.endswith("/own/repacked.tar.gz") and len(server.log) == 1
    monkeypatch.setenv("CIFAR10_URL", f"{server.base}/forbidden/a.tgz?key=secret")
    with pytest.raises(InputError, match="/forbidden/a.tgz: HTTP Error 403") as refusal:
        load_images("cifar10", cache_dir=tmp_path / "empty")
    assert "secret" not in str(refusal.value) and any("secret" in path for path, *_ in server.log)
    monkeypatch.setenv("CIFAR10_URL", (tmp_path / "official.tgz").as_uri())
    assert load_images("cifar10", cache_dir=tmp_path / "empty").source.startswith("file://")


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    server.mirrors("good")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=f"file/cache/{DOWNLOADS}: cannot be written .*; CIFAR_FASTAI_CACHE"):
        load_images("cifar10", cache_dir=tmp_path / "file" / "cache")


def test_the_bar_shows_size_and_time_left(server, capsys, monkeypatch):
    server.mirrors("good")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_images("cifar10")
    out, err = capsys.readouterr()
    assert out == "" and re.search(rf"127.0.0.1:\d+: .*/{server.size / 1000:.1f}k \[\d\d:\d\d<.*B/s\]", err), err


def _load(barrier, results, url, cache):
    images.CIFAR10_SPLITS, images.in_official_order = (20, 10), in_order
    images._fastai_copies, download.MIRRORS["cifar10"] = lambda: [], (url,)
    barrier.wait()
    results.put(load_images("cifar10", cache_dir=cache).source)


def test_processes_at_once_download_once(server, own_cache):
    [url] = server.mirrors("good")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_load, args=(barrier, results, url, own_cache)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [url] * 3 and len(server.log) == 1


def test_no_look_up_blocks(monkeypatch):
    """A resolver that hangs, for which urllib has no timeout."""
    monkeypatch.setattr(download, "PROBE", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: time.sleep(5))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0.3 s"):
        download._open(download.Request("http://slow.invalid/"))
    assert time.monotonic() - began < 3
