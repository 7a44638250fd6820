"""Presets: what they resolve to, and their schedules in a real fit beside torch's own schedulers."""

import pytest
import torch
from test_schedule import Steps

from cifar_fastai.config import Recipe, resolve
from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.presets import PRESETS
from cifar_fastai.recipe_pages import recipe_page
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import fit_scheduled

torch.set_num_threads(1)
RECIPES = [recipe_page(name)["RECIPE"] for name in ("resnet18", "resnet34", "custom_resnet", "find_lr")]
RESNET18, RESNET34, CUSTOM, FIND_LR = RECIPES
TABLE = {
    "sujitojha1": dict(
        model="resnet18",
        epochs=20,
        bs=128,
        opt="sgd",
        lr=0.01,
        momentum=0.9,
        mom_min=None,
        nesterov="no",
        wd=0.0,
        sched="step",
        step_size=6,
        gamma=0.1,
        padding=4,
        pad_mode="zeros",
        flip=0.5,
        cutout=16,
        n_holes=1,
        cutout_p=1.0,
        l1=None,
        clip_value=None,
        vflip=0.0,
        rotate=0.0,
    ),
    "amitkml": dict(
        model="resnet18",
        epochs=24,
        bs=128,
        opt="sgd",
        lr=0.37,
        momentum=0.9,
        mom_min=None,
        nesterov="no",
        wd=0.005,
        wd_bn_bias="yes",
        sched="one-cycle",
        pct_start=5 / 24,
        div=8.0,
        div_final=80_000.0,
        anneal="cos",
        clip_value=0.1,
        clip=None,
        padding=4,
        pad_mode="reflect",
        flip=0.5,
        cutout=8,
        n_holes=1,
        max_holes=3,
        cutout_p=0.8,
        l1=None,
    ),
    "gilf641": dict(
        model="resnet18",
        epochs=20,
        bs=128,
        opt="sgd",
        lr=0.1,
        momentum=0.95,
        mom_min=0.85,
        nesterov="no",
        wd=1e-4,
        wd_bn_bias="yes",
        l1=1e-5,
        sched="one-cycle",
        pct_start=0.3,
        div=25.0,
        div_final=250_000.0,
        anneal="cos",
        rotate=15.0,
        flip=0.5,
        vflip=0.5,
        padding=0,
        cutout=0,
        clip_value=None,
    ),
    "vivek-a81": dict(
        model="custom_resnet",
        epochs=24,
        bs=512,
        opt="sgd",
        lr=0.0447,
        momentum=0.95,
        mom_min=0.85,
        nesterov="no",
        sched="one-cycle",
        pct_start=0.2,
        div=10.0,
        div_final=500.0,
        anneal="linear",
        padding=4,
        pad_mode="zeros",
        flip=0.5,
        cutout=8,
    ),
    "phaninandula": dict(
        model="resnet18",
        epochs=20,
        bs=512,
        opt="sgd",
        lr=0.02,
        momentum=0.95,
        mom_min=0.85,
        nesterov="no",
        sched="one-cycle",
        pct_start=0.2,
        div=25.0,
        div_final=250_000.0,
        anneal="linear",
        padding=4,
        pad_mode="zeros",
        cutout=16,
    ),
}
REPORTED = {"sujitojha1": 0.855, "amitkml": 0.776, "gilf641": 0.895, "vivek-a81": 0.887, "phaninandula": 0.878}

# What their code makes: torch's scheduler, and the momentum of the SGD that it is given.
ONE_CYCLES = {
    "amitkml": dict(max_lr=0.37, pct_start=5 / 24, div_factor=8, cycle_momentum=False),
    "gilf641": dict(max_lr=0.1),
    "vivek-a81": dict(max_lr=0.0447, pct_start=0.2, div_factor=10, final_div_factor=50, anneal_strategy="linear"),
    "phaninandula": dict(max_lr=0.02, pct_start=0.2, anneal_strategy="linear"),
}
SGD_MOMENTUM = {"sujitojha1": 0.9, "amitkml": 0.9, "gilf641": 0.9, "vivek-a81": 0.9, "phaninandula": 0.85}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_preset_means_the_same_under_every_recipe(name, recipe):
    cfg = vars(resolve(recipe, {"preset": name}))
    assert {key: cfg[key] for key in TABLE[name]} == pytest.approx(TABLE[name])
    assert cfg["label_smoothing"] == 0 and cfg["mixup"] is cfg["cutmix"] is cfg["ema"] is cfg["peak_epoch"] is None
    assert cfg | {"lr_suggest": None} == vars(resolve(Recipe("plain"), {"preset": name})) | {"lr_suggest": None}


def test_every_preset_is_in_the_table_with_its_source():
    assert set(PRESETS) == set(TABLE)
    assert {name: preset.reported for name, preset in PRESETS.items()} == REPORTED
    for name, preset in PRESETS.items():
        assert preset.source.lower().startswith(f"github.com/{name}/")


def test_explicit_flag_before_preset_before_recipe():
    assert resolve(RESNET18, {}).lr != 0.01
    assert resolve(RESNET18, {"preset": "sujitojha1"}).lr == 0.01
    assert resolve(RESNET18, {"preset": "sujitojha1", "lr": "0.2", "epochs": 3}).lr == 0.2
    assert resolve(RESNET34, {"preset": "phaninandula"}).model == "resnet18"
    cfg = resolve(RESNET18, {"preset": "phaninandula", "model": "resnet34"})
    assert (cfg.model, cfg.lr, cfg.bs, cfg.anneal) == ("resnet34", 0.02, 512, "linear")
    assert resolve(CUSTOM, {"preset": "vivek-a81"}).opt == "sgd"  # the recipe's own is adam


def test_a_flag_that_contradicts_a_preset_wins():
    cfg = resolve(RESNET18, {"preset": "amitkml", "clip": 1.0})
    assert (cfg.clip, cfg.clip_value) == (1.0, None)
    cfg = resolve(RESNET18, {"preset": "gilf641", "sched": "step"})
    assert (cfg.sched, cfg.mom_min) == ("step", None)
    assert resolve(RESNET18, {"preset": "sujitojha1", "padding": 0, "cutout": 0}).cutout == 0
    assert resolve(RESNET18, {}).flip_by == resolve(RESNET18, {"flip": 0.5, "flip_by": "epoch"}).flip_by == "epoch"
    assert resolve(RESNET18, {"flip": 0.5}).flip_by == resolve(RESNET18, {"flip": 0.3}).flip_by == "chance"


def fitted(images, name):
    """The steps of a fit of a tiny network with a preset's own numbers, 3 steps an epoch, and how many there are."""
    cfg = resolve(RESNET18, {"preset": name})
    learn = cifar_learner(
        cifar_dls(images, bs=16, device="cpu", padding=0, cutout=0, flip=0.0),
        TinyLinear(),
        momentum=cfg.momentum,
        mom_min=cfg.mom_min,
        nesterov=False,
        precision="fp32",
    )
    steps = Steps()
    with learn.no_bar(), learn.no_logging():
        fit_scheduled(learn, cfg, cfg.lr, [steps])
    return steps, cfg.epochs * 3


class TinyLinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x[:, :, 0, 0])


def torch_steps(name, n_steps, n_epoch):
    """(learning rates, momenta) by step of torch's own scheduler."""
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=SGD_MOMENTUM[name])
    if name == "sujitojha1":
        scheduler, every = torch.optim.lr_scheduler.StepLR(opt, step_size=6, gamma=0.1), n_steps // n_epoch
    else:
        scheduler, every = torch.optim.lr_scheduler.OneCycleLR(opt, total_steps=n_steps, **ONE_CYCLES[name]), 1
    lrs, moms = [], []
    for step in range(n_steps):
        lrs.append(opt.param_groups[0]["lr"])
        moms.append(opt.param_groups[0]["momentum"])
        opt.step()
        if (step + 1) % every == 0 and step + 1 < n_steps:
            scheduler.step()
    return lrs, moms


@pytest.mark.parametrize("name", ONE_CYCLES)
def test_one_cycle_goes_as_torchs(tiny_images, name):
    """torch's cycle ends with the last of n steps, at n - 1; fastai's with the end of the run, at n.

    So on the way down fastai's step k is torch's step k - 1 to the number, and on the way up it lies between the two.
    """
    steps, n_steps = fitted(tiny_images, name)
    lrs, moms = torch_steps(name, n_steps, PRESETS[name].settings["epochs"])
    assert len(steps.lrs) == len(lrs) == n_steps
    up = PRESETS[name].settings["pct_start"] * n_steps
    for step in range(n_steps):
        before = max(step - 1, 0)
        if step >= up:
            assert (steps.lrs[step], steps.moms[step]) == pytest.approx((lrs[before], moms[before]), rel=1e-6)
        else:
            assert lrs[before] - 1e-9 <= steps.lrs[step] <= lrs[step] + 1e-9
            assert moms[step] - 1e-9 <= steps.moms[step] <= moms[before] + 1e-9
    assert (steps.lrs[0], steps.moms[0]) == pytest.approx((lrs[0], moms[0]))
    assert max(steps.lrs) == pytest.approx(max(lrs), rel=0.02)


def test_step_schedule_is_torchs(tiny_images):
    steps, n_steps = fitted(tiny_images, "sujitojha1")
    lrs, moms = torch_steps("sujitojha1", n_steps, 20)
    assert steps.lrs == pytest.approx(lrs) and steps.moms == moms
    assert [lrs[3 * epoch] for epoch in (0, 5, 6, 12, 18)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize("name", ONE_CYCLES)
def test_it_ends_at_torchs_minimum(name):
    """final_div_factor divides the initial rate."""
    args, settings = ONE_CYCLES[name], PRESETS[name].settings
    initial = args["max_lr"] / args.get("div_factor", 25)
    assert settings["lr"] / settings["div"] == pytest.approx(initial)
    assert settings["lr"] / settings["div_final"] == pytest.approx(initial / args.get("final_div_factor", 1e4))
    assert torch_steps(name, 100, 20)[0][-1] == pytest.approx(settings["lr"] / settings["div_final"], rel=1e-4)
