"""A page in the browser for a finished run: its network on any picture, and its errors; also as a Space."""

import base64
import hashlib
import os
import socket
import sys
from functools import lru_cache
from importlib.metadata import distribution
from itertools import islice
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import gradio as gr
import numpy as np
from matplotlib import colormaps
from PIL import Image

from cifar_fastai.data.decode import MAX_PHOTO_BYTES
from cifar_fastai.data.photos import load_image
from cifar_fastai.errors import InputError, reason
from cifar_fastai.evaluation.gradcam import METHODS, MIN_MAP, cam_layers, default_layer, gradcam
from cifar_fastai.evaluation.image_files import class_probs, image_batch
from cifar_fastai.evaluation.predictions import Predictions
from cifar_fastai.files import private_folder, read_json
from cifar_fastai.report.page import describe_metrics, get_template
from cifar_fastai.report.tiles import image_uri
from cifar_fastai.runs.export import export_run, model_card
from cifar_fastai.runs.folder import describe_run, public_config, read_config
from cifar_fastai.runs.run import load_network, load_reported

PICTURES, MAX_PICTURES = "pictures.npz", 1000  # in a folder that goes to a machine without the data
APP = """\
import sys, pathlib
FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(next(FOLDER.glob("cifar_fastai-*.whl"))))  # Python imports from it as from a folder
from cifar_fastai.runs.demo import serve_demo
serve_demo(FOLDER)
"""
SORTS = ["highest loss", "lowest loss", "highest confidence", "lowest confidence"]


def serve_demo(run, host=None, port=None, data=None, device="auto"):
    """Serve the page of a finished run, by default on 127.0.0.1 and the first free port from 7860, until Ctrl-C.

    The page asks no other host for anything. `data`: where the images are, if they have moved. InputError for no run,
    and for an address that cannot be served at.
    """
    _check_address(host, port)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(private_folder("gradio")))  # by default one for all users
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none of them is loaded
    look = dict(theme=gr.themes.Default(primary_hue="blue", **fonts), css=get_template("demo.css").render())
    page, look["footer_links"] = build_page(run, data, device), []
    limits = dict(share=False, ssr_mode=False, pwa=False, run_history=False, max_file_size=MAX_PHOTO_BYTES)
    page.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, **look, **limits)
    print(f"open {page.local_url} in a browser; Ctrl-C ends the page", flush=True)
    page.block_thread()


def _check_address(host, port):
    """InputError unless a server can listen there; Gradio tries a hundred ports, with a complaint for each."""
    host = host or "127.0.0.1"
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0]
        socket.create_server((address[0], port or 0, *address[2:]), family=family).close()
    except (OSError, OverflowError, UnicodeError) as error:
        values = dict(host=host) if port is None else dict(host=host, port=port)
        raise InputError(f"no page can be served there ({reason(error)})", **values) from None


def choose_pictures(run, predictions, data=None):
    """{position in `predictions`: image uint8 (S, S, 3)} of ten examples, evenly over the classes, then of the errors.

    From `PICTURES` in the run's folder or from the data set; empty where neither is there. InputError for wrong `data`.
    """
    if (path := Path(run) / PICTURES).exists():
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["positions"].tolist(), file["images"], strict=True))
    if (images := load_reported(read_config(run), predictions, data)) is None:
        return {}
    examples = np.argsort(predictions.targets, kind="stable")[np.linspace(0, len(predictions) - 1, 10, dtype=int)]
    return {k: images[k] for k in [*examples.tolist(), *predictions.errors.tolist()]}


def build_page(run, data=None, device="auto"):
    """The page of a finished run as a Gradio app; it reads the weights, never the pickle."""
    summary, learn, template = describe_run(run), load_network(run, device), get_template("demo.html").module
    size, classes = learn.dls.images.size, tuple(map(str, learn.dls.vocab))
    predictions = Predictions.from_csv(Path(run) / "predictions.csv", classes)
    pictures = choose_pictures(run, predictions, data)

    @lru_cache(maxsize=256)  # the sliders change neither the picture nor the heatmap
    def explain(path, layer, method, target):
        image, note = load_image(Path(path), size)
        with learn.no_bar():
            probs, x = class_probs(learn, [image])[0], image_batch(learn, [image])
        return image, note, probs, gradcam(learn, x, target or int(probs.argmax()), layer, method)

    def answer(path, k, layer, method, target, alpha):
        """({class: probability} of the `k` most probable classes, the image and its heatmap as HTML)."""
        if not path:
            return None, ""
        try:
            image, note, probs, heatmaps = explain(path, layer, method, target)
        except InputError as error:
            return None, template.problem(str(error).replace(path, Path(path).name))
        heat, alpha = 255 * colormaps["inferno"](heatmaps.maps[0])[..., :3], alpha * ~heatmaps.negligible[0]
        overlay = ((1 - alpha) * image + alpha * heat).round().astype(np.uint8)
        views = template.views(image_uri(image), image_uri(overlay), note, heatmaps, classes[heatmaps.targets[0]])
        return {classes[c]: float(probs[c]) for c in np.argsort(-probs, kind="stable")[:k]}, views

    def show_errors(n, true, predicted, sort):
        """The first `n` errors of a true and a predicted class, or any, as HTML."""
        matches = predictions.misclassified(None, true or None, predicted or None)
        values = (predictions.losses if "loss" in sort else predictions.confidence)[matches]
        matches = matches[np.argsort(-values if "highest" in sort else values, kind="stable")]
        tiles = {k: k in pictures and image_uri(pictures[k]) for k in matches[:n].tolist()}
        return template.errors(tiles, len(matches), predictions, not pictures)

    layers = [(f"{name} ({h} x {w})", name) for name, (h, w) in cam_layers(learn, size).items() if min(h, w) >= MIN_MAP]
    some, wide = [("any", ""), *((name, name) for name in classes)], dict(min_width=200)
    with gr.Blocks(title=summary, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(template.head(Path(run).resolve().name, summary))
        with gr.Tab("Try a picture"):
            with gr.Row():
                with gr.Column():
                    picture = gr.Image(label="Picture", type="filepath", format="png", height=300)
                    if pictures:
                        gr.Examples([Image.fromarray(image) for image in [*pictures.values()][:10]], picture)
                with gr.Column():
                    bars = gr.Label(label="Most probable classes")
                    k = gr.Slider(1, len(classes), min(5, len(classes)), step=1, label="How many classes")
            views = gr.HTML()
            with gr.Row():
                layer = gr.Dropdown(layers, value=default_layer(learn, size), label="Layer", **wide)
                method = gr.Dropdown(list(METHODS), label="Method", **wide)
                target = gr.Dropdown([("predicted class", ""), *some[1:]], label="Class to explain", **wide)
                alpha = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", **wide)
        with gr.Tab("Errors and numbers"):
            gr.HTML(template.numbers(describe_metrics(read_json(Path(run) / "metrics.json"))))
            with gr.Row():
                n = gr.Slider(1, 200, 24, step=1, label="How many errors", **wide)
                true, predicted = (gr.Dropdown(some, label=f"{kind} class") for kind in ("True", "Predicted"))
                sort = gr.Dropdown(SORTS, label="Sorted by")
            errors = gr.HTML()
        picture.preprocess = lambda file: file and file.path  # Gradio's own fails on some files in other words
        # on load, and when any of these changes
        gr.on(None, answer, [picture, k, layer, method, target, alpha], [bars, views], trigger_mode="always_last")
        gr.on(None, show_errors, [n, true, predicted, sort], errors, trigger_mode="always_last")
    return page


def write_space(run, folder, data=None, command_line=None):
    """Write a Space with the page of a finished run into `folder`, which is new or empty.

    app.py, requirements.txt, the weights as safetensors, README.md, this package as a wheel, and images from the data
    set where it is on this machine, in the place `data` if it has moved. `command_line`: as for `write_results`.
    InputError for what is no finished run.
    """
    folder, title, package = Path(folder), describe_run(run).partition(":")[0], distribution("cifar_fastai")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError("exists; choose a new folder", space=str(folder))
    predictions = Predictions.from_csv(Path(run) / "predictions.csv", tuple(read_config(run)["classes"]))
    pictures = dict(islice(choose_pictures(run, predictions, data).items(), MAX_PICTURES))
    fields = dict(title=title, sdk="gradio", sdk_version=distribution("gradio").version, app_file="app.py")
    command = command_line and command_line(public_config(run))
    card = model_card(run, command, python_version="{}.{}".format(*sys.version_info), **fields)
    export_run(run, "safetensors", folder)
    requires = [line.partition(";") for line in package.requires]
    requires = [name.strip() for name, _, extra in requires if "extra" not in extra]
    requires += [f"{name}>={distribution(name).version}" for name in ("gradio", "safetensors")]
    for name, text in ("app.py", APP), ("requirements.txt", "\n".join([*requires, ""])), ("README.md", card):
        (folder / name).write_text(text, encoding="utf-8")
    np.savez_compressed(folder / PICTURES, positions=list(pictures), images=list(pictures.values()))
    _write_wheel(package, folder)


def _write_wheel(package, folder):
    """Write this package, as it runs, into `folder` as a wheel (PEP 427)."""
    name, root = f"cifar_fastai-{package.version}", Path(__file__).parents[1]
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    files = {f"cifar_fastai/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths}
    about = "Wheel-Version: 1.0\nGenerator: cifar_fastai\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = package.read_text("METADATA") or package.read_text("PKG-INFO")  # the latter in a checkout
    files |= {f"{name}.dist-info/METADATA": metadata.encode()}
    files |= {f"{name}.dist-info/WHEEL": about.encode()}
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(file).digest()) for path, file in files.items()}
    rows = [f"{path},sha256={digest.decode().rstrip('=')},{len(files[path])}\n" for path, digest in digests.items()]
    files[f"{name}.dist-info/RECORD"] = "".join([*rows, f"{name}.dist-info/RECORD,,\n"]).encode()
    with ZipFile(folder / f"{name}-py3-none-any.whl", "w", ZIP_DEFLATED) as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
