"""The console script: the commands, what they refuse, and the wheel that brings them, in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.request import urlopen

import pandas as pd
import pytest
from PIL import Image

from cifar_fastai import cli, load_run, predict_files
from cifar_fastai.commands import COMMANDS, main
from cifar_fastai.runs.explain import predict_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Call the console script with a command line, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        monkeypatch.setattr(sys, "argv", ["/bin/cifar-fastai", *line.split()])
        try:
            status = main() or 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_alone_it_lists_the_commands_in_a_line_each(script):
    status, out, err = script("")
    assert (status, err) == (0, "") and script("--help")[1] == out
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(COMMANDS)
    assert all(len(line) < 120 and text.endswith(".") for line, (_, text) in zip(out.splitlines(), lines, strict=False))


@pytest.mark.parametrize("command", [*COMMANDS, "train resnet34"])
def test_every_command_has_help_and_a_page_in_recipes(script, command):
    status, out, err = script(f"{command} --help")
    name = command.split()[0]
    assert (status, err) == (0, "") and out.startswith(f"usage: cifar-fastai {command}") and "--debug" in out
    assert " ".join(COMMANDS[name].__doc__.split()) in " ".join(out.split())
    page = ROOT / "recipes" / f"{'resnet18' if name == 'train' else name.replace('-', '_')}.py"
    assert re.search(r"^    start\(.+\)$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "line, message",
    [
        ("nonsense", "nonsense: no such name; choose from train"),
        ("explian", "explian: no such name; did you mean explain?"),
        ("train nonsense", "nonsense: no such name; choose from resnet18, resnet34, custom_resnet"),
        ("train zoo94", "zoo94: no such name"),  # a preset, which no page has
        ("train --epochs 3", "--epochs: no such name; choose from resnet18"),
        ("train", "'': no such name; choose from resnet18"),
        ("train resnet18 --epochs 0", "--epochs 0: must be at least 1"),
        ("train resnet18 --log tensorbord", "--log tensorbord: give tensorboard or wandb"),
        ("predict cat.png", "no finished run under runs; name its folder with --run"),
        ("export nowhere", "nowhere: not a run's folder"),
        ("export nowhere --to onxx", "--to onxx: no such name; did you mean onnx?"),
    ],
)
def test_what_it_refuses(script, tmp_path, line, message):
    status, out, err = script(line)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_a_command_to_go_on_with_is_that_of_whoever_started(monkeypatch, capsys, tmp_path):
    def stop():
        error = OSError(28, "No space left on device")
        error.resume = tmp_path
        raise error

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cifar-fastai").touch(0o755)
    config = dict(recipe="resnet34", given=dict(epochs=3, no_tta=True, data=None))
    for path, name in ((os.defpath, str(folder / "cifar-fastai")), (str(folder), "cifar-fastai")):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(sys, "argv", [str(folder / "cifar-fastai"), "train", "resnet34", "--epochs", "3"])
        cli._run(stop, False)
        assert capsys.readouterr().err.endswith(f"; go on with: {name} train resnet34 --resume {tmp_path}\n")
        assert cli.command_line(config) == "cifar-fastai train resnet34 --epochs 3 --no-tta"
    monkeypatch.setattr(sys, "argv", ["recipes/resnet34.py"])
    cli._run(stop, False)
    assert capsys.readouterr().err.endswith(f" recipes/resnet34.py --resume {tmp_path}\n")
    assert cli.command_line(config) == "python recipes/resnet34.py --epochs 3 --no-tta"
    for name, value in dict(LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    cli._run(stop, False)
    assert capsys.readouterr().err.endswith(f"; go on with: the same command on each machine and --resume {tmp_path}\n")


def test_predict_gives_a_table_of_the_newest_runs_classes(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tiny.train("runs/one", epochs=1).folder
    files = ["=1+1.png", "cat.png"]
    for name, colour in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (64, 48), colour).save(name)
    capsys.readouterr()
    predict_run(files, csv="classes.csv", device="cpu")
    text, rows = capsys.readouterr().out, pd.read_csv("classes.csv")
    assert "test accuracy" in text.splitlines()[0] and "64 x 48, cropped" in text
    learn, _ = load_run(run, "cpu")
    with learn.no_bar():
        predictions = predict_files(learn, files)
    assert list(rows["file"]) == ["'=1+1.png", "cat.png"], "which a spreadsheet does not compute"
    for (_, row), item in zip(rows.iterrows(), predictions, strict=True):
        pairs = [(row[f"class_{k}"], row[f"probability_{k}"]) for k in (1, 2, 3)]
        assert pairs == [(name, pytest.approx(value)) for name, value in item.top3]
        assert f"{item.file}  " in text and f"{pairs[0][0]} {pairs[0][1]:.1%}" in text


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an environment with the wheel of this checkout, which sees the tests' other packages."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "cifar_fastai", root / "cifar_fastai", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", root, root]
    subprocess.run(build, check=True, cwd=root)
    (wheel,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    (site,) = (root / "env").glob("[lL]ib/**/site-packages")
    # a .pth file here adds the folder alone: an editable install there, a .pth file itself, has no effect
    (site / "tests.pth").write_text(sysconfig.get_paths()["purelib"])
    (python,) = (root / "env").glob("*/python")
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    shutil.rmtree(root / "cifar_fastai")
    return python.parent


@pytest.mark.slow
def test_the_wheel_trains_explains_predicts_and_exports(installed, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words, status=0):
        words = [installed / words[0], *words[1:]]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    place = Path(run("python", "-c", "import cifar_fastai; print(cifar_fastai.__file__)").strip())
    assert place.is_relative_to(installed.parent)
    names = {path.relative_to(ROOT) for path in (ROOT / "cifar_fastai").rglob("*") if path.suffix in (".py", ".npy")}
    names |= {path.relative_to(ROOT) for path in (ROOT / "cifar_fastai" / "report" / "templates").iterdir()}
    assert not [name for name in names if not (place.parents[1] / name).is_file()]
    assert "explain" in run("cifar-fastai") and "no such name" in run("cifar-fastai", "train", "nonsense", status=2)
    flags = "train resnet18 --data digits --epochs 1 --width 16 --bs 64 --device cpu --compile no --out run"
    assert "test accuracy" in run("cifar-fastai", *flags.split())
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "cifar-fastai train resnet18 --data digits" in report
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    assert "black.png" in run("cifar-fastai", "predict", "black.png", "--run", "run", "--device", "cpu")
    assert "explain.png" in run("cifar-fastai", "explain", "run", "--n", "2", "--device", "cpu")
    assert "360 test images" in run("cifar-fastai", "export", "run")
    assert "files: run" in run("cifar-fastai", "export", "run", "--to", "safetensors")
    words = [installed / "cifar-fastai", "demo", "run", "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env) as demo:
        try:
            url = re.match(r"open (http://127\.0\.0\.1:\d+/) ", demo.stdout.readline())[1]
            assert b"resnet18" in urlopen(url, timeout=60).read()
        finally:
            demo.terminate()
    assert "compare.html" in run("cifar-fastai", "results", "run", shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    assert "cache:" in run("cifar-fastai", "data") and (tmp_path / "run" / "onnx" / "model.onnx").exists()
