"""Every parameter as a user sets it: what is refused, with which words, before anything is read or written."""

import math
import runpy
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cifar_fastai.cli import flag
from cifar_fastai.errors import InputError
from cifar_fastai.recipes import PRESETS, RECIPES
from cifar_fastai.settings import OPTIONS, Settings, check_values, choices, resolve

FOLDER = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a recipe with these arguments in an empty folder: (exit status, stdout, stderr, files that are there now)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(arguments, recipe="resnet18"):
        arguments = arguments.replace("{400 zeros}", 400 * "0").replace("{300 letters}", 300 * "n")
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *arguments.split()])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(FOLDER / f"{recipe}.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return stop.value.code, out, err, [path.name for path in tmp_path.rglob("*")]

    return run


# --------------------------------------------------------------- bad values

BAD = """
--epochs 0                                      | --epochs 0: must be at least 1 and at most 10000
--epochs two                                    | argument --epochs: invalid int value: 'two'
--epochs                                        | argument --epochs: expected one argument
--bs 0                                          | --bs 0: must be at least 1
--lr 0                                          | --lr 0.0: must be above 0
--lr nan                                        | --lr nan: must be above 0
--lr fast                                       | --lr fast: must be a number or find
--lr find --lr-suggest vally                    | --lr-suggest vally: no such name; did you mean valley?
--lr 0.1 --lr-suggest slide                     | --lr-suggest slide: goes with --lr find, not 0.1
--model resnet19                                | --model resnet19: no such name; did you mean resnet18
--width 15                                      | --width 15: must be at least 16
--preset Gilf641                                | --preset Gilf641: no such name; did you mean gilf641?
--preset=                                       | --preset '': no such name; choose from zoo94, kuangliu, sujitojha1
--opt adamm                                     | --opt adamm: no such name; did you mean adam
--momentum 0                                    | --momentum 0.0: must be above 0, or --nesterov must be no
--mom-min 0.95                                  | --mom-min 0.95: must not be above --momentum (0.9)
--mom-min 0.8 --sched step                      | --mom-min 0.8: goes with --sched one-cycle, not step
--nesterov maybe                                | --nesterov maybe: no such name; did you mean yes?
--nesterov yes --opt adam                       | --nesterov yes: needs --opt sgd or muon, not adam
--wd -1                                         | --wd -1.0: must be at least 0 and at most 1
--wd-bn-bias true                               | --wd-bn-bias true: no such name; choose from yes, no
--sched onecycle                                | --sched onecycle: no such name; did you mean one-cycle
--sched plateau                                 | --sched plateau: needs --valid-pct, because the test split may not
--sched plateau --valid-pct 0.1 --opt lamb      | --sched plateau: needs an optimizer of torch, which --opt lamb is not
--pct-start 0.3 --sched step                    | --pct-start 0.3: goes with --sched one-cycle or flat-cos, not step
--pct-start 0.3 --peak-epoch 2                  | --peak-epoch 2.0, --pct-start 0.3: both set the peak
--peak-epoch 3 --epochs 3                       | --peak-epoch 3.0: must lie before --epochs (3)
--peak-epoch 2 --sched flat-cos                 | --peak-epoch 2.0: goes with --sched one-cycle, not flat-cos
--div inf                                       | --div inf: must be at least 1 and at most 1000000000000.0
--epochs 1{400 zeros}                           | --epochs 10000000000
--clip-value 1e308                              | --clip-value 1e+308: must be at least 1e-06 and at most 1000000.0
--mixup 1e-320                                  | --mixup 1e-320: must be at least 1e-06
--resume {300 letters}                          | File name too long
--div 10 --sched none                           | --div 10.0: goes with --sched one-cycle, not none
--div-final 10 --sched step                     | --div-final 10.0: goes with --sched one-cycle or flat-cos, not step
--anneal cosine                                 | --anneal cosine: no such name; did you mean cos
--anneal cos --sched flat-cos                   | --anneal cos: goes with --sched one-cycle, not flat-cos
--step-size 3                                   | --step-size 3: goes with --sched step, not one-cycle
--gamma 0.5                                     | --gamma 0.5: goes with --sched step or plateau, not one-cycle
--plateau-patience 3                            | --plateau-patience 3: goes with --sched plateau, not one-cycle
--valid-pct 1.5                                 | --valid-pct 1.5: must be above 0 and below 1
--split-seed -1                                 | --split-seed -1: must be at least 0 and at most 4294967295
--subset 0                                      | --subset 0: must be at least 1
--size 15                                       | --size 15: must be at least 16 and at most 128
--no-test                                       | --no-test: needs --valid-pct
--save-best                                     | --save-best: needs --valid-pct
--patience 3                                    | --patience 3: needs --valid-pct
--label-smoothing 1                             | --label-smoothing 1.0: must be at least 0 and below 1
--l1=-1e-5                                      | --l1 -1e-05: must be at least 0
--l1 -1e-5                                      | argument --l1: expected one argument
--clip 1 --clip-value 1                         | --clip 1.0, --clip-value 1.0: use one of them
--mixup 0.2 --cutmix 1                          | --mixup 0.2, --cutmix 1.0: do not work together; use one of them
--ema 1                                         | --ema 1.0: must be above 0 and below 1
--padding 32                                    | --padding 32: must be at least 0 and at most 31
--pad-mode mirror                               | --pad-mode mirror: no such name; choose from zeros, reflect
--pad-mode reflect --padding 0                  | --pad-mode reflect: needs --padding
--n-holes 2 --cutout 0                          | --n-holes 2: needs --cutout
--n-holes 3 --max-holes 2                       | --max-holes 2: must be at least --n-holes (3)
--cutout-p 1.1                                  | --cutout-p 1.1: must be at least 0 and at most 1
--flip 2                                        | --flip 2.0: must be at least 0 and at most 1
--flip 0.3 --flip-by epoch                      | --flip-by epoch: flips half of the images, which is not --flip 0.3
--flip-by turns                                 | --flip-by turns: no such name; choose from chance, epoch
--vflip -0.5                                    | --vflip -0.5: must be at least 0 and at most 1
--rotate 181                                    | --rotate 181.0: must be at least 0 and at most 180
--n-images 0                                    | --n-images 0: must be at least 1 and at most 100
--n-cols 0                                      | --n-cols 0: must be at least 1 and at most 20
--cam-layer=                                    | --cam-layer '': must be printable and not empty
--cam-layer layer3,                             | --cam-layer layer3,: give names of layers, separated by commas
--cam-target wrong                              | --cam-target wrong: no such name; choose from predicted, true
--cam-method GradCam                            | --cam-method GradCam: no such name;
--cam-alpha 1.5                                 | --cam-alpha 1.5: must be at least 0 and at most 1
--seed -1                                       | --seed -1: must be at least 0 and at most 4294967295
--device gpu                                    | --device gpu: give auto, cpu, cuda, cuda:N or mps
--device cuda:99                                | --device cuda:99: torch sees 0 CUDA devices; try auto
--precision fp8                                 | --precision fp8: no such name; did you mean fp
--precision fp16 --device cpu                   | --precision fp16: not available on a CPU; use bf16 or fp32
--compile true                                  | --compile true: no such name; choose from auto, yes, no
--sync-bn true                                  | --sync-bn true: no such name; choose from auto, yes, no
--data=                                         | --data '': must be printable and not empty
--out=                                          | --out '': must be printable and not empty
--log tensorbord                                | --log tensorbord: give tensorboard or wandb, or both
--tensorboard yes                               | unrecognized arguments: yes
--no-tta --no-explain yes                       | unrecognized arguments: yes
--resume nowhere                                | --resume nowhere: no such folder
--resume latest                                 | --resume
--epocs 3                                       | unrecognized arguments: --epocs 3
resnet34                                        | unrecognized arguments: resnet34
"""
CASES = [tuple(part.strip() for part in line.split("|")) for line in BAD.strip().splitlines()]


def test_every_parameter_is_among_them():
    words = {word.partition("=")[0] for arguments, _ in CASES for word in arguments.split()}
    assert {flag(name) for name in OPTIONS} <= words and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("arguments, message", CASES, ids=[arguments for arguments, _ in CASES])
def test_bad_values_are_refused_before_anything_is_read_or_written(command, monkeypatch, arguments, message):
    monkeypatch.setattr("cifar_fastai.runs.train.load_images", lambda *_, **__: pytest.fail("data were read"))
    status, out, err, files = command(arguments)
    assert message in err and "Traceback" not in err and (status, out, files) == (2, "", [])
    assert "usage:" in err or err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "recipe, arguments, message",
    [
        ("resnet34", "--epochs 0", "--epochs 0: must be at least 1"),
        ("custom_resnet", "--model resnet-18", "--model resnet-18: no such name; did you mean resnet18"),
        ("find_lr", "--epochs 0", "--epochs 0: must be at least 1"),
        ("find_lr", "--start-lr 0", "--start-lr 0"),
        ("find_lr", "--start-lr 1 --end-lr 0.1", "--start-lr 1.0, --end-lr 0.1"),
        ("find_lr", "--end-lr inf", "--end-lr inf"),
        ("find_lr", "--num-it 0", "--num-it 0"),
        ("find_lr", "--num-it 1{400 zeros}", "--num-it 1000000"),
        ("find_lr", "--end-lr 1e308", "--end-lr 1e+308"),
        ("find_lr", "--out {300 letters}.png", "File name too long"),
        ("explain", "{300 letters}", "File name too long"),
        ("explain", "a\x1b[31mb", r"a\x1b[31mb: not a run's folder"),
        ("results", "{300 letters}", "File name too long"),
        ("sweep", "{300 letters}", "File name too long"),
        ("find_lr", "--num-it many", "argument --num-it: invalid int value"),
        ("find_lr", "--out a/b.png", "--out a/b.png"),
    ],
)
def test_other_recipes_refuse_too(command, recipe, arguments, message):
    status, out, err, files = command(arguments, recipe)
    assert message in err and (status, out, files) == (2, "", [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--bs 49", "--bs 49: there are 48 images to train on"),
        ("--bs 37 --valid-pct 0.25", "--bs 37: there are 36 images to train on"),
        ("--bs 5 --subset 4", "--bs 5: there are 4 images to train on"),
        ("--subset 49", "--subset 49: there are 48 images to train on"),
        ("--subset 37 --valid-pct 0.25", "--subset 37: there are 36 images to train on"),
        ("--subset 1", "--subset 1: there are 48 images to train on, and cutting them into 1 and 47 would lose one"),
        ("--valid-pct 0.01", "--valid-pct 0.01: there are 48 images to train on, and cutting them into 48 and 0 would"),
        ("--valid-pct 0.99", "--valid-pct 0.99: there are 48 images to train on, and cutting them into 0 and 48 would"),
        ("--data nowhere", "nowhere"),
        ("--cutout 33", "--cutout 33: the images have 32 pixels a side"),
        ("--size 16 --padding 16", "--padding 16: more than a mirror image of 16 pixels a side"),
        ("--size 64 --model custom_resnet", "--model custom_resnet: needs images of 32 to 63 pixels a side, not 64"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(command, tiny_folder, arguments, message):
    status, out, err, files = command(f"--data {tiny_folder} {arguments}")
    assert message in err and err.count("\n") == 1 and (status, out, files) == (2, "", [])


# --------------------------------------------------------------- good values

GOOD = """
--lr 1e-8 | --lr find --lr-suggest minimum | --momentum 0 --nesterov no | --mom-min 0 | --opt adam --nesterov no
--mom-min 0.9 --momentum 0.9 | --opt larc | --peak-epoch 0.5 --epochs 1 | --peak-epoch 19.99 | --sched none
--sched flat-cos --pct-start 0.7 --div-final 10 | --sched step --step-size 1 --gamma 0.999 | --cam-method GradCAM++
--sched plateau --valid-pct 0.1 --plateau-patience 0 --gamma 0.5 | --valid-pct 0.001 --no-test --save-best --patience 1
--padding 31 --pad-mode reflect | --n-holes 64 --max-holes 64 | --flip 1 | --cam-layer layer2,layer3.1.conv2
--device cuda:15 | --device mps | --precision bf16 | --compile no | --tensorboard | --log wandb,tensorboard | --debug
"""


@pytest.mark.parametrize("arguments", [case.strip() for case in GOOD.replace("\n", "|").split("|") if case.strip()])
def test_good_values_and_combinations_are_taken(command, monkeypatch, arguments):
    calls, words = {}, arguments.split()
    monkeypatch.setattr("cifar_fastai.runs.train.train", lambda *args, **kwargs: calls.update(kwargs))
    assert command(arguments)[0] == 0
    del calls["finish"], calls["resume"], calls["recipe"]
    settings, _ = resolve(RECIPES["resnet18"], calls)
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--") and word != "--debug":
            result = getattr(settings, word[2:].replace("-", "_"))
            assert result is True if value.startswith("--") else str(result) == value or result == float(value)


def test_every_bound_is_tried_by_number():
    """Each number just inside its range is taken, and the next one outside is not."""

    def is_taken(value):
        try:
            return check_values(**{name: value}) == {name: value}
        except InputError:
            return False

    for name, option in OPTIONS.items():
        kinds = get_args(option.type) or (option.type,)
        for bound, included, outwards in (("ge", True, -1), ("gt", False, -1), ("le", True, 1), ("lt", False, 1)):
            if bound in option.metadata:
                limit = option.metadata[bound] if int in kinds else float(option.metadata[bound])
                assert is_taken(limit) == included, name
                assert not is_taken(limit + outwards if int in kinds else math.nextafter(limit, outwards * math.inf))
                assert not any(map(is_taken, (math.nan, math.inf, -math.inf)))


# --------------------------------------------------------------- help, calls from a notebook


@pytest.mark.parametrize("recipe", ["resnet18", "resnet34", "custom_resnet", "find_lr"])
def test_help_shows_the_recipes_own_defaults_and_every_name(command, recipe):
    status, out, err, files = command("--help", recipe)
    text = " ".join(out.split())
    assert (status, err, files) == (0, "", [])
    settings = dict(RECIPES["resnet18"].to_dict(), lr="find") if recipe == "find_lr" else RECIPES[recipe].to_dict()
    for name, value in settings.items():
        assert flag(name) in text and (value in (None, 0) or f"(default: {value})" in text)
    for name, following in (("lr", "--lr-suggest"), ("epochs", "--bs"), ("div", "--div-final")):
        assert f"(default: {settings[name]})" in text.split("options:")[1].split(f"--{name} ")[1].split(following)[0]
    for names in [PRESETS, *(choices(name) for name in OPTIONS if "choices" in OPTIONS[name].metadata)]:
        assert ", ".join(names) in text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(epoch=3), "parameter='epoch': no such name; did you mean epochs"),
        (dict(epochs="3"), "epochs='3': must be a whole number"),
        (dict(epochs=3.0), "epochs=3.0: must be a whole"),
        (dict(epochs=True), "epochs=True: must be a whole number"),
        (dict(wd="high"), "wd='high': must be a number"),
        (dict(lr=[0.1]), r"lr=\[0.1\]: must be a number"),
        (dict(no_test="yes"), "no_test='yes': must be True or"),
        (dict(data=3), "data=3: must be text"),
        (dict(out="a\nb"), r"out='a\\nb': must be printable"),
        (dict(sched=True), "sched='yes': no such name"),
    ],
)
def test_calls_from_python_are_checked_too(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        resolve(Settings(), overrides)
    assert error.value.status == 2


def test_numbers_of_numpy_and_paths_become_plain_and_none_is_not_set():
    overrides = dict(lr=np.float32(0.5), epochs=np.int64(3), wd=0, data=Path("a/b"), nesterov=False, bs=None)
    settings, converted = resolve(Settings(bs=7), overrides)
    assert converted == dict(lr=0.5, epochs=3, wd=0.0, data="a/b", nesterov="no")
    assert [type(value) for value in converted.values()] == [str, int, float, str, float]
    assert settings == Settings(bs=7, **converted)


def test_defaults_are_neutral():
    """A parameter that a recipe does not name changes nothing: every default is a value of plain SGD."""
    plain = resolve(Settings(), {})[0]
    off = "l1 clip clip_value mixup cutmix ema mom_min peak_epoch valid_pct subset patience label_smoothing wd padding"
    off += " cutout flip vflip rotate log tensorboard no_test"
    assert not any(getattr(plain, name) for name in off.split())
    assert (plain.opt, plain.sched, plain.nesterov, plain.flip_by) == ("sgd", "none", "no", "chance")
