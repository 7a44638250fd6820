"""Any command line, and any file of a run damaged in any way: an answer, or one line that says what is wrong.

`python -m pytest -m fuzz` takes a minute and always tries the same; FUZZ_EXAMPLES=5000 before it searches further.
"""

import io
import json
import os
import shutil
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from fastai.learner import Learner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_fastai import cli
from cifar_fastai.recipes import PRESETS
from cifar_fastai.runs import train as train_module
from cifar_fastai.runs.explain import explain_run
from cifar_fastai.runs.export import export_run
from cifar_fastai.runs.folder import describe_run
from cifar_fastai.runs.run import load_run
from cifar_fastai.runs.table import keep_result, load_results, results_table
from cifar_fastai.runs.train import train
from cifar_fastai.settings import OPTIONS

pytestmark = pytest.mark.fuzz

FUZZ = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 250)), suppress_health_check=list(HealthCheck))
SEEN = defaultdict(set)  # the exit statuses
N_STEPS = 3  # of a training, which then ends as by Ctrl-C


class Ended(KeyboardInterrupt):
    """Enough was trained."""


@pytest.fixture
def answer(tiny, tmp_path, monkeypatch):
    """Call a function as a command: its exit status, after a check of what it says."""
    steps = [0]

    def count():
        steps[0] += 1
        if steps[0] > N_STEPS:
            raise Ended

    do_step = Learner._do_grad_opt
    monkeypatch.setattr(Learner, "_do_grad_opt", lambda learn: (count(), do_step(learn)))
    monkeypatch.setattr(train_module, "compile_model", lambda *_: "not compiled")
    for module in ("train", "explain"):
        monkeypatch.setattr(f"cifar_fastai.runs.{module}.save_figure", lambda *_: None)
    monkeypatch.setenv("CIFAR10_PATH", "/nowhere")  # nothing is downloaded
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(function):
        steps[0], err = 0, io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(err):
            try:
                status = cli._run(function, False)
            except SystemExit as stop:  # argparse
                return stop.code
        text = err.getvalue()
        assert status in (0, 1, 2, 130) and "--debug" not in text, text
        if status in (1, 2):
            (line,) = text.splitlines()
            assert line.startswith("error: ") and line.isprintable() and len(line) < 2500
        return status

    return call


# The command line -----------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-2, 40), st.floats(), st.integers(), st.sampled_from([1e-320, 1e308, 10**400, 0.5, 1]))
words = st.sampled_from(["", " ", "auto", "yes", "no", "find", "x" * 300, "\x1b[31m", "猫", "a,b", "..", "cuda:1", "-"])
names = sorted({*OPTIONS} - {"out", "data"})


@st.composite
def flags(draw):
    name = draw(st.sampled_from(names))
    option = OPTIONS[name]
    if "bool" in str(option.type):
        return [cli.flag(name)]
    usual = [*option.metadata.get("choices", ()), *(PRESETS if name == "preset" else ()), option.default]
    usual = st.sampled_from([value for value in usual if value is not None] or ["1"])
    return [f"{cli.flag(name)}={draw(st.one_of(usual, usual, numbers, numbers, words))}"]


places = st.sampled_from(["out", "x" * 300, "..", ".", "a/b/c", "\n", "file", "loop", "~"])


@FUZZ
@given(st.lists(flags(), max_size=6), st.one_of(st.none(), places), st.one_of(st.none(), places))
def _try_command(answer, folder, data, lists, out, place):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    arguments = [f"--data={data if place is None else place}", "--epochs=1", "--bs=8", "--model=resnet18"]
    arguments += [word for flag in lists for word in flag] + ([] if out is None else [f"--out={out}"])

    def command():
        train("resnet18", finish=lambda run: None, **cli.parse_settings(arguments))

    SEEN["command line"].add(status := answer(command))
    if status == 2:
        assert sorted(os.listdir(folder)) == ["file", "loop"] and (folder / "file").read_text() == "mine"


def test_any_command_line(answer, tiny_folder, tmp_path):
    _try_command(answer, tmp_path / "here", tiny_folder)
    assert {2, 130} <= SEEN["command line"]


# The files of a run ---------------------------------------------------------------------------------------------------

small = st.one_of(st.none(), st.booleans(), st.integers(-2, 99), st.integers(), st.floats(), st.text(max_size=4))
junk = st.recursive(
    small, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
ACTIONS = {
    "explain": lambda run, picture: explain_run(run, n=2, device="cpu"),
    "explain images": lambda run, picture: explain_run(run, [picture], device="cpu"),
    "export": lambda run, picture: export_run(run, "safetensors", run.parent / "sent"),
    "load_run": lambda run, picture: load_run(run, "cpu"),
    "resume": lambda run, picture: train("resnet18", resume=run, finish=lambda run: None),
    "results": lambda run, picture: keep(run),
}


def keep(run):
    describe_run(run)
    keep_result(run, run.parent / "results")
    results_table(load_results(run.parent / "results"), cli.command_line)


def replaced(value, draw):
    """`value`, nested dicts and lists, with junk in one place."""
    parts = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) and value else ()
    parts = dict(parts)
    if not parts or draw(st.integers(0, 3)) == 0:
        return draw(junk)
    key = draw(st.sampled_from([*parts]))
    if draw(st.integers(0, 5)) == 0:
        del parts[key]
    else:
        parts[key] = replaced(parts[key], draw)
    return parts if type(value) is dict else type(value)(parts.values())


def damage(path, draw):
    """Alter a file: what it holds, some of its bytes, or what it is."""
    kind = draw(st.sampled_from(["content", "content", "content", "bytes", "bytes", "gone", "empty", "folder", "pipe"]))
    if kind == "content" and path.suffix == ".json":
        path.write_text(json.dumps(replaced(json.loads(path.read_text()), draw)))
    elif kind == "content" and path.suffix == ".csv":
        rows = [line.split(",") for line in path.read_text().splitlines()]
        row = draw(st.sampled_from([0, 1, len(rows) - 1]))
        rows[row] = replaced(rows[row], draw)
        path.write_text("\n".join(",".join(map(str, row)) if type(row) is list else str(row) for row in rows))
    elif kind == "content" and path.suffix == ".pth":
        torch.save(replaced(dict(torch.load(path, weights_only=True)), draw), path)
    elif kind in ("content", "bytes"):
        content = bytearray(path.read_bytes())
        at, n = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 40))
        content[at : at + n] = draw(st.binary(max_size=8))
        path.write_bytes(content)
    else:
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)


@FUZZ
@given(st.data(), st.sampled_from(sorted(ACTIONS)))
def _try_damage(answer, folder, picture, data, action):
    original, run = folder / ("stopped" if action == "resume" else "finished"), folder / "run"
    for path in (run, folder / "results"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, run)
    files = sorted(path.name for path in run.iterdir())
    if action == "resume":
        files += ["checkpoint.pth"] * 4
    damage(run / data.draw(st.sampled_from(files)), data.draw)
    SEEN[action].add(answer(lambda: ACTIONS[action](run, picture)))


def test_any_damage_to_a_run(tiny, answer, tiny_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("test_fuzz.N_STEPS", 10**6)
        finished = tiny.train(tmp_path / "finished", epochs=2).folder
        tiny.train(tmp_path / "stopped", stop=("history", 1), epochs=2)
    (finished / "curves.png").write_bytes(b"a picture")
    _try_damage(answer, tmp_path, next(Path(tiny_folder).rglob("*.png")))
    assert all({0, 2} <= SEEN[action] or {130, 2} <= SEEN[action] for action in ACTIONS)
