"""A run's network for other programs: ONNX, or safetensors, each with a model card."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cifar_fastai.api import predict
from cifar_fastai.data.images import COPIES
from cifar_fastai.data.loaders import reported_dl
from cifar_fastai.errors import InputError, RunError, check_choice, check_extra, escaped, reason
from cifar_fastai.evaluation.predictions import images_at
from cifar_fastai.files import atomic_write, check_regular, read_json, write_json
from cifar_fastai.runs.folder import public_config
from cifar_fastai.runs.run import load_network, load_run
from cifar_fastai.settings import OPTIONS, PLACES
from cifar_fastai.training.recorder import in_epochs

__all__ = ["ONNX_EXAMPLE", "export_run", "model_card"]

FORMATS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}  # and what they need
TIE = 1e-4  # two classes whose probabilities differ by less may change places by rounding
ONNX_EXAMPLE = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map
size, classes = int(about["size"]), json.loads(about["classes"])
image = ImageOps.fit(Image.open(sys.argv[1]).convert("RGB"), (size, size))
x = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255  # (1, 3, size, size)
probs = session.run(None, {"images": x})[0][0]
print({classes[k]: round(float(probs[k]), 4) for k in np.argsort(-probs)[:3]})
"""
_LOAD_EXAMPLE = """\
from cifar_fastai import load_run
learn, config = load_run("FOLDER")  # finds the images as the run did; data="PLACE" names them
"""


class _FromPixels(nn.Module):
    """The probabilities (N, C) of images float32 (N, 3, H, W) in 0..1."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        for name, values in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images):
        return self.model((images - self.mean) / self.std).softmax(1)


def export_run(run, to="onnx", out=None, data=None, command_line=None):
    """Write the network of a finished run as `to`, "onnx" or "safetensors", with README.md; returns their folder.

    The folder is `out`, by default onnx or safetensors in the run's folder. model.onnx takes images float32
    (N, 3, H, W) in 0..1, any N, and gives probabilities (N, C); it is compared with the network in fp32 on all images
    of the reported split, whose place is `data` if they have moved. `load_run` reads the folder of model.safetensors.
    `command_line`: as for `write_results`. Raises InputError for what is no finished run, RunError where ONNX Runtime
    gives another class.
    """
    check_extra(to, *FORMATS[check_choice(tuple(FORMATS), to=to)])
    config, folder = public_config(run), Path(out or Path(run) / to)
    if any((folder / name).exists() for name in ("model.pth", "checkpoint.pth")):
        raise InputError("holds a run; choose another folder", out=str(folder))
    if (
        folder.exists()
        and not (folder / f"model.{to}").exists()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise InputError(f"exists, and not from an export to {to}; choose a new folder", out=str(folder))
    card = model_card(run, command_line and command_line(config))
    files = [name for name in ("metrics.json", "history.csv", "predictions.csv") if (Path(run) / name).exists()]
    files = {name: check_regular(Path(run) / name).read_bytes() for name in files}
    if to == "onnx":
        content, about = _to_onnx(run, config, data)
        files, note = {}, f"{about}.\n\n```python\n{ONNX_EXAMPLE}```\n"
        print(about)
    else:
        content, note = _to_safetensors(run), f"```python\n{_LOAD_EXAMPLE}```\n"
    folder.mkdir(parents=True, exist_ok=True)
    files |= {f"model.{to}": content, "README.md": f"{card}\n## Use\n\n{note}".encode()}
    for name, content in files.items():
        with atomic_write(folder / name, "wb") as file:
            file.write(content)
    if to == "safetensors":
        write_json(folder / "config.json", config)
    print(f"files: {escaped(folder)}")
    return folder


def _to_safetensors(run):
    from safetensors.torch import save

    weights = load_network(run, "cpu").model.state_dict()
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})


def _to_onnx(run, config, data):
    """(content of model.onnx, how it was compared in words)."""
    import onnx
    import onnxruntime

    learn, _ = load_run(run, "cpu", data)
    learn.to_fp32()
    split, dl = reported_dl(learn.dls, config["parameters"].get("valid_pct"), config["parameters"].get("no_test"))
    size = learn.dls.images.size
    network = _FromPixels(learn.model, config["mean"], config["std"]).eval()
    options = dict(input_names=["images"], output_names=["probabilities"], dynamo=True, verbose=False)
    with warnings.catch_warnings(action="ignore"):  # torch's, about its own parts
        program = torch.onnx.export(
            network, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("N")},), **options
        )
    model = program.model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with learn.no_bar():
        predictions = predict(learn, dl)
    batches = []
    for positions in np.array_split(np.arange(len(predictions)), len(predictions) // 500 + 1):
        images = images_at(dl, positions)[1].transpose(0, 3, 1, 2).astype(np.float32) / 255  # (K, 3, H, W)
        batches.append(session.run(None, {"images": images})[0])
    about = describe_agreement(np.concatenate(batches), predictions, split)
    props = dict(classes=json.dumps(config["classes"]), size=str(size), checked=about)
    onnx.helper.set_model_props(model, props)
    return model.SerializeToString(), about


def describe_agreement(probs, predictions, split):
    """How another program's `probs` (N, C) differ from the network's `predictions`, in words.

    Raises RunError where it gives another class that is not, but for rounding, as probable as the network's.
    """
    others = probs.argmax(1) != predictions.predicted
    margins = (predictions.confidence - predictions.probs[np.arange(len(probs)), probs.argmax(1)])[others]
    difference = float(np.abs(probs - predictions.probs).max())
    if not (margins < TIE).all() or not np.isfinite(difference):
        raise RunError(f"ONNX Runtime gives other classes than the network on {others.sum():,} {split} images")
    ties = f" ({len(margins)} tied between two classes)" if len(margins) else ""
    about = f"On {len(probs):,} {split} images{ties} ONNX Runtime gives the classes of the network in fp32; "
    return about + f"the probabilities differ by at most {difference:.1e}"


def model_card(run, command=None, **fields):
    """README.md of a finished run as the Hugging Face Hub reads it: data, accuracy, settings and limits, in Markdown.

    `command`: the one that repeats the run; `fields`: more of the YAML at its top. Raises InputError for what is no
    finished run.
    """
    config, path = public_config(run), Path(run) / "metrics.json"
    metrics, parameters = read_json(path), config["parameters"]
    limits = ["It names one of these classes for any picture, also for one that shows none of them."]
    try:
        split = "valid" if metrics["test_accuracy"] is None else "test"
        data, classes, network = metrics["dataset"], ", ".join(map(_code, config["classes"])), _code(metrics["model"])
        size = parameters.get("size") or 32
        limits += [f"It sees {size} x {size} pixels; photographs are cut and resized to that."]
        limits += ["Settings may have been selected on these images."] if split == "valid" else []
        limits += [f"{data}: {COPIES[data]}."] if data in COPIES else []
        names = {f"{split}_accuracy": "as they are", "tta_accuracy": "with flip TTA"}
        names |= {"tta_shift_accuracy": "with flip and shift TTA"}
        values = {name: value for name, value in parameters.items() if name in OPTIONS.keys() - PLACES}
        settings = ", ".join(f"{name}={value}" for name, value in values.items() if value != OPTIONS[name].default)
        text = [
            f"# {network} on {_code(data)}\n",
            f"{metrics['parameters']:,} parameters, trained with cifar_fastai for {in_epochs(metrics['epochs'])} with",
            f"seed {metrics['seed']} on {_code(metrics['hardware'])} in {_code(metrics['precision'])}, in",
            f"{metrics['seconds'] / 60:.1f} minutes. Classes: {classes}.\n",
            f"| {split} images | accuracy |\n|---|---|",
            *(f"| {names[key]} | {metrics[key]:.2%} |" for key in names if metrics[key] is not None),
            f"\n## Settings\n\n{_code(settings)}\n",
            *([f"This repeats the run: {_code(command)}\n"] if command else []),
            "## Limits\n",
            *(f"- {limit}" for limit in limits),
        ]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); is the run finished?") from None
    fields = dict(pipeline_tag="image-classification", tags=["image-classification", "fastai", "cifar_fastai"]) | fields
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", *text, ""])


def _code(text):
    """A text from outside as code in Markdown, where it means nothing else; `|` would end the cell of a table."""
    return f"`{escaped(text).replace('`', '_').replace('|', '_')}`"
