"""Every parameter as a user gives it: what is refused, with which words, before anything is read or written."""

import math
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_fastai import config, names
from cifar_fastai.config import BASE, CHOICES, RANGES, Recipe, resolve
from cifar_fastai.errors import InputError
from cifar_fastai.presets import PRESETS
from cifar_fastai.recipe_pages import recipe_page

RECIPES = {name: recipe_page(name) for name in ("resnet18", "resnet34", "custom_resnet", "find_lr")}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a recipe with these arguments in an empty folder: (exit status, stdout, stderr, files that are there now)."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(arguments, recipe="resnet18"):
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            RECIPES[recipe]["main"]()
        out, err = capsys.readouterr()
        return stop.value.code, out, err, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    return run


# --------------------------------------------------------------- bad values

BAD = """
--epochs 0                                      | --epochs 0: must be at least 1 and at most 10000
--epochs -3                                     | --epochs -3: must be at least 1
--epochs 10001                                  | must be at least 1 and at most 10000
--epochs two                                    | argument --epochs: invalid int value: 'two'
--epochs 1.5                                    | argument --epochs: invalid int value: '1.5'
--epochs                                        | argument --epochs: expected one argument
--bs 0                                          | --bs 0: must be at least 1
--bs -128                                       | --bs -128: must be at least 1
--bs 65537                                      | --bs 65537: must be at least 1 and at most 65536
--lr -0.1                                       | --lr -0.1: must be above 0 and at most 100
--lr 0                                          | --lr 0.0: must be above 0
--lr -0.0                                       | --lr -0.0: must be above 0
--lr nan                                        | --lr nan: must be above 0
--lr inf                                        | --lr inf: must be above 0
--lr 101                                        | --lr 101.0: must be above 0 and at most 100
--lr fast                                       | --lr fast: neither a number nor find
--lr finds                                      | --lr finds: neither a number nor find
--lr=                                           | --lr : neither a number nor find
--lr find --lr-suggest vally                    | --lr-suggest vally: no such name; did you mean valley?
--lr 0.1 --lr-suggest slide                     | --lr-suggest: goes with --lr find, not 0.1
--model resnet19                                | --model resnet19: no such name; did you mean resnet18
--model vgg                                     | --model vgg: no such name; choose from resnet18, resnet34
--preset amitkm                                 | --preset amitkm: no such name; did you mean amitkml?
--preset Gilf641                                | --preset Gilf641: no such name; did you mean gilf641?
--preset=                                       | --preset : no such name; choose from sujitojha1
--opt adamm                                     | --opt adamm: no such name; did you mean adam
--opt lion                                      | --opt lion: no such name; did you mean muon?
--momentum 1                                    | --momentum 1.0: must be at least 0 and below 1
--momentum -0.1                                 | --momentum -0.1: must be at least 0 and below 1
--momentum nan                                  | --momentum nan: must be
--momentum 0                                    | --momentum 0: Nesterov's needs one above 0, or give --nesterov no
--mom-min 1.5                                   | --mom-min 1.5: must be at least 0 and below 1
--mom-min 0.95                                  | --mom-min 0.95: must not be above --momentum (0.9)
--mom-min 0.8 --sched step                      | --mom-min: goes with --sched one-cycle, not step
--nesterov maybe                                | --nesterov maybe: no such name; did you mean yes?
--nesterov yes --opt adam                       | --nesterov yes: only --opt sgd and muon have it, not adam
--wd -1                                         | --wd -1.0: must be at least 0 and at most 1
--wd 1.1                                        | --wd 1.1: must be at least 0 and at most 1
--wd-bn-bias true                               | --wd-bn-bias true: no such name; choose from yes, no
--sched onecycle                                | --sched onecycle: no such name; did you mean one-cycle
--sched plateau                                 | --sched plateau: needs --valid-pct, as the test split may not
--sched plateau --valid-pct 0.1 --opt lamb      | --sched plateau: works with torch's optimizers (sgd, adam
--pct-start 0                                   | --pct-start 0.0: must be above 0 and below 1
--pct-start 1                                   | --pct-start 1.0: must be above 0 and below 1
--pct-start 0.3 --sched step                    | --pct-start: goes with --sched one-cycle or flat-cos, not step
--pct-start 0.3 --peak-epoch 2                  | --peak-epoch and --pct-start: both say where the peak is
--peak-epoch 0                                  | --peak-epoch 0.0: must be above 0
--peak-epoch nan                                | --peak-epoch nan: must be above 0
--peak-epoch 3 --epochs 3                       | --peak-epoch 3: must lie before --epochs (3)
--peak-epoch 20.5                               | --peak-epoch 20.5: must lie before --epochs (20)
--peak-epoch 2 --sched flat-cos                 | --peak-epoch: goes with --sched one-cycle, not flat-cos
--div 0.5                                       | --div 0.5: must be at least 1
--div inf                                       | --div inf: must be at least 1 and finite
--div 10 --sched none                           | --div: goes with --sched one-cycle, not none
--div-final 0                                   | --div-final 0.0: must be at least 1
--div-final 10 --sched step                     | --div-final: goes with --sched one-cycle or flat-cos, not step
--anneal cosine                                 | --anneal cosine: no such name; did you mean cos
--anneal cos --sched flat-cos                   | --anneal: goes with --sched one-cycle, not flat-cos
--step-size 0 --sched step                      | --step-size 0: must be at least 1
--step-size 3                                   | --step-size: goes with --sched step, not one-cycle
--gamma 0 --sched step                          | --gamma 0.0: must be above 0 and below 1
--gamma 1 --sched step                          | --gamma 1.0: must be above 0 and below 1
--gamma 0.5                                     | --gamma: goes with --sched step or plateau, not one-cycle
--plateau-patience -1                           | --plateau-patience -1: must be at least 0
--plateau-patience 3                            | --plateau-patience: goes with --sched plateau, not one-cycle
--valid-pct 1.5                                 | --valid-pct 1.5: must be above 0 and below 1
--valid-pct 0                                   | --valid-pct 0.0: must be above 0 and below 1
--valid-pct 1                                   | --valid-pct 1.0: must be above 0 and below 1
--valid-pct nan                                 | --valid-pct nan: must be above 0 and below 1
--valid-pct ten                                 | argument --valid-pct: invalid float value: 'ten'
--split-seed -1                                 | --split-seed -1: must be at least 0 and at most 4294967295
--subset 0                                      | --subset 0: must be at least 1
--no-test                                       | --no-test: needs --valid-pct, as nothing may be chosen on the
--save-best                                     | --save-best: needs --valid-pct
--patience 3                                    | --patience: needs --valid-pct
--patience 0 --valid-pct 0.1                    | --patience 0: must be at least 1
--label-smoothing 1                             | --label-smoothing 1.0: must be at least 0 and below 1
--label-smoothing -0.1                          | --label-smoothing -0.1: must be at least 0 and below 1
--l1=-1e-5                                      | --l1 -1e-05: must be at least 0
--l1 -1e-5                                      | argument --l1: expected one argument
--l1 inf                                        | --l1 inf: must be at least 0 and finite
--clip 0                                        | --clip 0.0: must be above 0
--clip-value -1                                 | --clip-value -1.0: must be above 0
--clip 1 --clip-value 1                         | --clip and --clip-value: take one of them
--mixup 0                                       | --mixup 0.0: must be above 0
--cutmix -1                                     | --cutmix -1.0: must be above 0
--mixup 0.2 --cutmix 1                          | --mixup and --cutmix: take one of them, together they do not work
--ema 1                                         | --ema 1.0: must be above 0 and below 1
--ema 0                                         | --ema 0.0: must be above 0 and below 1
--padding -1                                    | --padding -1: must be at least 0 and at most 31
--padding 32                                    | --padding 32: must be at least 0 and at most 31
--pad-mode mirror                               | --pad-mode mirror: no such name; choose from zeros, reflect
--pad-mode reflect --padding 0                  | --pad-mode: needs --padding above 0
--cutout 33                                     | --cutout 33: must be at least 0 and at most 32
--cutout -8                                     | --cutout -8: must be at least 0 and at most 32
--n-holes 0                                     | --n-holes 0: must be at least 1 and at most 64
--n-holes 2 --cutout 0                          | --n-holes: needs --cutout above 0
--n-holes 3 --max-holes 2                       | --max-holes 2: must be at least --n-holes (3)
--max-holes 65                                  | --max-holes 65: must be at least 1 and at most 64
--cutout-p 1.1                                  | --cutout-p 1.1: must be at least 0 and at most 1
--flip 2                                        | --flip 2.0: must be at least 0 and at most 1
--flip yes                                      | argument --flip: invalid float value: 'yes'
--flip 0.3 --flip-by epoch                      | --flip-by epoch: mirrors each image half of the time, not --flip 0.3
--flip-by turns                                 | --flip-by turns: no such name; choose from chance, epoch
--vflip -0.5                                    | --vflip -0.5: must be at least 0 and at most 1
--rotate 181                                    | --rotate 181.0: must be at least 0 and at most 180
--rotate -15                                    | --rotate -15.0: must be at least 0 and at most 180
--n-images 0                                    | --n-images 0: must be at least 1 and at most 100
--n-images 101                                  | --n-images 101: must be at least 1 and at most 100
--n-cols 0                                      | --n-cols 0: must be at least 1 and at most 20
--cam-layer=                                    | --cam-layer '': must be printable and not empty
--cam-layer layer3,                             | --cam-layer layer3,: give names of layers, separated by commas
--cam-layer layer3;layer4                       | --cam-layer layer3;layer4: give names of layers, separated by commas
--cam-target wrong                              | --cam-target wrong: no such name; choose from predicted, true
--cam-method GradCam                            | --cam-method GradCam: no such name; 
--cam-alpha 1.5                                 | --cam-alpha 1.5: must be at least 0 and at most 1
--seed -1                                       | --seed -1: must be at least 0 and at most 4294967295
--seed 4294967296                               | --seed 4294967296: must be at least 0 and at most 4294967295
--device gpu                                    | --device gpu: give auto, cpu, cuda, cuda:N or mps
--device=                                       | --device '': must be printable and not empty
--device cuda:                                  | --device cuda:: give auto, cpu, cuda, cuda:N or mps
--device cuda:-1                                | --device cuda:-1: give auto, cpu, cuda, cuda:N or mps
--device cuda:128                               | --device cuda:128: give auto, cpu, cuda, cuda:N or mps
--device cpu:0                                  | --device cpu:0: give auto, cpu, cuda, cuda:N or mps
--device cuda:99                                | --device cuda:99: torch sees 0 CUDA devices; try --device auto
--precision fp8                                 | --precision fp8: no such name; did you mean fp
--precision fp16 --device cpu                   | --precision fp16: on a CPU take bf16 or fp32
--compile true                                  | --compile true: no such name; choose from auto, yes, no
--data=                                         | --data '': must be printable and not empty
--out=                                          | --out '': must be printable and not empty
--resume nowhere                                | --resume nowhere: no such folder
--resume latest                                 | --resume
--epocs 3                                       | unrecognized arguments: --epocs 3
--tensorboard yes                               | unrecognized arguments: yes
resnet34                                        | unrecognized arguments: resnet34
"""
CASES = [tuple(part.strip() for part in line.split("|")) for line in BAD.strip().splitlines()]


def test_there_are_enough_of_them():
    assert len(CASES) == len(set(CASES)) >= 70
    given = " ".join(arguments for arguments, _ in CASES)
    untested = [name for name in BASE if f"--{name.replace('_', '-')}" not in given]
    assert untested == ["debug"]


@pytest.mark.parametrize("arguments, message", CASES, ids=[arguments for arguments, _ in CASES])
def test_bad_values_are_refused_before_anything_is_read_or_written(command, monkeypatch, arguments, message):
    def read(*args, **kwargs):
        raise AssertionError("data were read")

    monkeypatch.setattr("cifar_fastai.runs.train.load_images", read)
    status, out, err, files = command(arguments.split())
    assert message in err and "Traceback" not in err
    assert (status, out, files) == (2, "", [])
    if "usage:" not in err:
        assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("recipe", ["resnet34", "custom_resnet", "find_lr"])
def test_every_recipe_refuses(command, recipe):
    status, out, err, files = command(["--epochs", "0", "--lr", "-1"], recipe)
    assert (status, out, files) == (2, "", []) and err == ("error: --epochs 0: must be at least 1 and at most 10000\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--start-lr 0", "--start-lr 0"),
        ("--start-lr 1 --end-lr 0.1", "--start-lr 1, --end-lr 0.1"),
        ("--end-lr inf", "--end-lr inf"),
        ("--end-lr nan", "--end-lr nan"),
        ("--num-it 0", "--num-it 0"),
        ("--num-it many", "argument --num-it: invalid int value"),
        ("--out a/b.png", "--out a/b.png"),
    ],
)
def test_find_lr_refuses_its_own(command, arguments, message):
    status, out, err, files = command(arguments.split(), "find_lr")
    assert message in err and (status, out, files) == (2, "", [])


# --------------------------------------------------------------- what depends on the data


@pytest.fixture
def pictures(tmp_path):
    """A folder of 2 classes with 12 train and 4 test images."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / "pictures" / split / label / f"{i}.png")
    return str(tmp_path / "pictures")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--bs 13", "--bs 13: there are 12 images to train on"),
        ("--bs 10 --valid-pct 0.25", "--bs 10: there are 9 images to train on"),
        ("--bs 5 --subset 4", "--bs 5: there are 4 images to train on"),
        ("--subset 13", "--subset 13: there are 12 images to train on"),
        ("--subset 1", "--subset 1: give at least one image for each of 2 classes"),
        ("--subset 10 --valid-pct 0.25", "--subset 10: there are 9 images to train on"),
        ("--valid-pct 0.01", "--valid-pct 0.01: cuts 0 of 12 train images"),
        ("--valid-pct 0.99", "--valid-pct 0.99: cuts 12 of 12 train images"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(command, pictures, arguments, message):
    status, out, err, files = command(["--data", pictures, *arguments.split()])
    assert message in err and err.count("\n") == 1
    assert (status, out, files) == (2, "", [])


def test_data_that_are_not_there(command):
    status, out, err, files = command(["--data", "nowhere"])
    assert "nowhere" in err and (status, out, files) == (2, "", [])


# --------------------------------------------------------------- good values

GOOD = """
--epochs 1 | --epochs 10000 | --bs 1 | --bs 65536 | --lr 1e-8 | --lr 100 | --lr find --lr-suggest minimum
--momentum 0 --nesterov no | --momentum 0.999 | --mom-min 0 | --mom-min 0.9 --momentum 0.9 | --opt adam --nesterov no
--opt larc | --wd 0 | --wd 1 | --pct-start 0.001 | --pct-start 0.999 | --peak-epoch 0.5 --epochs 1
--peak-epoch 19.99 | --div 1 | --div-final 1 | --sched flat-cos --pct-start 0.7 --div-final 10
--sched step --step-size 1 --gamma 0.999 | --sched plateau --valid-pct 0.1 --plateau-patience 0 --gamma 0.5
--sched none | --valid-pct 0.001 --no-test --save-best --patience 1 | --split-seed 0 | --split-seed 4294967295
--subset 1 | --label-smoothing 0 | --label-smoothing 0.99 | --l1 0 | --clip 1e-6 | --clip-value 1e9
--mixup 0.1 | --cutmix 10 | --ema 0.99999 | --padding 0 | --padding 31 --pad-mode reflect | --cutout 0 | --cutout 32
--n-holes 64 --max-holes 64 | --n-holes 2 --max-holes 2 | --cutout-p 0 | --cutout-p 1 | --flip 0 | --flip 1
--vflip 1 | --rotate 0 | --rotate 180 | --n-images 1 --n-cols 20 | --n-images 100 --n-cols 1
--cam-layer layer3 | --cam-layer layer2,layer3.1.conv2 | --cam-layer layer2, layer3 | --cam-method GradCAM++
--cam-alpha 0 | --cam-alpha 1 | --seed 0 | --seed 4294967295 | --device cpu | --device cuda | --device cuda:0
--device cuda:15 | --device mps | --precision bf16 | --compile no | --tensorboard | --debug
"""
BOUNDARIES = [case.strip() for case in GOOD.replace("\n", "|").split("|") if case.strip()]


@pytest.mark.parametrize("arguments", BOUNDARIES)
def test_values_at_the_bounds_are_taken(monkeypatch, arguments):
    given = {}
    flags = arguments.replace(", ", ",").split()
    monkeypatch.setattr(
        "cifar_fastai.runs.train.train", lambda recipe, kwargs: given.update(recipe=recipe, kwargs=kwargs)
    )
    monkeypatch.setattr(sys, "argv", ["resnet18.py", *flags])
    with pytest.raises(SystemExit) as stop:
        RECIPES["resnet18"]["main"]()
    assert stop.value.code == 0
    cfg = vars(resolve(given["recipe"], given["kwargs"]))
    for flag, value in zip(flags, [*flags[1:], "--"], strict=True):
        if flag.startswith("--"):
            found = cfg[flag[2:].replace("-", "_")]
            assert found is True if value.startswith("--") else str(found) == value or found == float(value)


def test_every_bound_is_tried_by_number():
    """Each number just inside its range is taken, and the next one outside is not."""
    for name, allowed in RANGES.items():
        whole = signature(config.parameters).parameters[name].annotation is int
        for bound, excluded, out in ((allowed.low, allowed.above, -1), (allowed.high, allowed.below, 1)):
            if math.isinf(bound):
                continue
            assert (bound in allowed) != excluded
            assert (bound + out if whole else math.nextafter(bound, out * math.inf)) not in allowed
        assert math.nan not in allowed and math.inf not in allowed and -math.inf not in allowed


# --------------------------------------------------------------- help, suggestions, calls from a notebook


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_recipes_own_defaults(command, recipe):
    status, out, err, files = command(["--help"], recipe)
    text = " ".join(out.split())
    assert (status, err, files) == (0, "", [])
    settings = RECIPES[recipe]["RECIPE"].settings
    for name, value in settings.items():
        assert f"--{name.replace('_', '-')}" in text
        if value not in (None, 0):
            assert f"(default: {value})" in text
    described = text.split("options:")[1]
    for flag, following in (("lr", "--lr-suggest"), ("epochs", "--bs"), ("div", "--div-final")):
        assert f"(default: {settings[flag]})" in described.split(f"--{flag} (")[1].split(following)[0]


def test_names_in_the_help_are_those_that_are_taken(command):
    text = " ".join(command(["--help"])[1].split())
    for known in [PRESETS, *(CHOICES[flag] for flag in CHOICES if flag != "cam_method")]:
        assert all(name in text for name in known)


@pytest.mark.parametrize(
    "given, near", [("resnet-18", "resnet18"), ("RESNET34", "resnet34"), ("custom", "custom_resnet")]
)
def test_near_names_are_suggested(given, near):
    with pytest.raises(InputError, match=f"did you mean .*{near}"):
        names.check_name("--model", given, names.MODEL_NAMES)


def test_a_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr("cifar_fastai.config.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard: the package is not installed; pip install tensorboard"):
        resolve(Recipe("test"), dict(tensorboard=True))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(epoch=3), "parameter epoch: no such name; did you mean epochs"),
        (dict(epochs="3"), "--epochs '3': must be a whole number"),
        (dict(epochs=3.0), "--epochs 3.0: must be a whole"),
        (dict(epochs=True), "--epochs True: must be a whole number"),
        (dict(wd="high"), "--wd 'high': must be a number"),
        (dict(lr=[0.1]), r"--lr \[0.1\]: neither a number nor"),
        (dict(no_test="yes"), "--no-test 'yes': must be True or"),
        (dict(data=3), "--data 3: must be text"),
        (dict(model=b"resnet18"), "--model b'resnet18': must be text"),
        (dict(out="a\nb"), r"--out 'a\\nb': must be printable"),
        (dict(sched=True), "--sched yes: no such name"),
    ],
)
def test_calls_from_a_notebook_are_checked_too(given, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(Recipe("test"), given)
    assert caught.value.status == 2


def test_numbers_of_numpy_and_paths_become_plain():
    cfg = resolve(Recipe("test"), dict(lr=np.float32(0.5), epochs=np.int64(3), wd=0, data=Path("a/b"), nesterov=False))
    assert [type(value) for value in (cfg.lr, cfg.epochs, cfg.wd, cfg.data)] == [float, int, float, str]
    assert (cfg.lr, cfg.epochs, cfg.wd, cfg.data, cfg.nesterov) == (0.5, 3, 0.0, "a/b", "no")


def test_what_is_not_given_is_the_recipes(monkeypatch):
    recipe = Recipe("test", dict(epochs=7))
    assert vars(resolve(recipe, dict(lr=None, epochs=None))) == BASE | dict(epochs=7)
    assert resolve(recipe, dict(padding=0, flip=0.0, momentum=0, nesterov="no")).padding == 0  # zero is a value
