"""Presets: the same under every recipe, what overrides what, and schedules in a real fit beside torch's schedulers."""

import pytest
import torch
from test_schedule import Steps

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.recipes import PRESETS, RECIPES, resolve_recipe
from cifar_fastai.training.learner import cifar_learner
from cifar_fastai.training.schedule import fit_scheduled

# What the published solutions' code makes: torch's scheduler, and the momentum of its SGD.
ONE_CYCLES = {
    "amitkml": dict(max_lr=0.37, pct_start=5 / 24, div_factor=8, cycle_momentum=False),
    "gilf641": dict(max_lr=0.1),
    "vivek-a81": dict(max_lr=0.0447, pct_start=0.2, div_factor=10, final_div_factor=50, anneal_strategy="linear"),
    "phaninandula": dict(max_lr=0.02, pct_start=0.2, anneal_strategy="linear"),
}


def resolve(recipe, **overrides):
    return resolve_recipe(recipe, overrides)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_means_the_same_under_every_recipe(name):
    for recipe in ("resnet18", "resnet34", "custom_resnet"):
        assert resolve(recipe, preset=name).to_dict() == RECIPES[name].to_dict() | {"preset": name}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_its_own_checks(name):
    assert resolve(name) == RECIPES[name]


def test_explicit_flag_before_preset_before_recipe():
    assert resolve("resnet18").lr != resolve("resnet18", preset="sujitojha1").lr == 0.01
    assert resolve("resnet18", preset="sujitojha1", lr="0.2", epochs=3).lr == 0.2
    settings = resolve("resnet18", preset="phaninandula", model="resnet34")
    assert (settings.model, settings.lr, settings.bs, settings.anneal) == ("resnet34", 0.02, 512, "linear")
    assert resolve("custom_resnet", preset="vivek-a81").opt == "sgd"  # the recipe's own is adam


def test_a_flag_that_contradicts_a_preset_wins():
    settings = resolve("resnet18", preset="amitkml", clip=1.0)
    assert (settings.clip, settings.clip_value) == (1.0, None)
    settings = resolve("resnet18", preset="gilf641", sched="step")
    assert (settings.sched, settings.mom_min) == ("step", None)
    assert resolve("resnet18", preset="sujitojha1", padding=0, cutout=0).cutout == 0
    assert resolve("resnet18").flip_by == resolve("resnet18", flip=0.5, flip_by="epoch").flip_by == "epoch"
    assert resolve("resnet18", flip=0.5).flip_by == resolve("resnet18", flip=0.3).flip_by == "chance"


def fitted_steps(images, model, name):
    """The `Steps` of a fit with a preset's own numbers, 3 steps an epoch, and how many there are."""
    settings = resolve("resnet18", preset=name)
    dls = cifar_dls(images, bs=16, device="cpu")
    steps, options = Steps(), dict(momentum=settings.momentum, mom_min=settings.mom_min)
    learn = cifar_learner(dls, model, nesterov=False, precision="fp32", **options)
    with learn.no_bar(), learn.no_logging():
        fit_scheduled(learn, settings, settings.lr, [steps])
    return steps, settings.epochs * 3


def torch_steps(name, n_steps):
    """(learning rates, momenta) by step of torch's own scheduler, for 20 epochs."""
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=0.9)
    if name == "sujitojha1":
        scheduler, every = torch.optim.lr_scheduler.StepLR(opt, step_size=6, gamma=0.1), n_steps // 20
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
def test_one_cycle_goes_as_torchs(tiny_images, tiny_model, name):
    """torch's cycle ends with the last of n steps, at n - 1; fastai's with the end of the run, at n.

    So on the way down fastai's step k is torch's step k - 1 to the number, and on the way up it lies between the two.
    """
    steps, n_steps = fitted_steps(tiny_images, tiny_model, name)
    lrs, moms = torch_steps(name, n_steps)
    assert len(steps.lrs) == len(lrs) == n_steps
    up = RECIPES[name].pct_start * n_steps
    for step in range(n_steps):
        before = max(step - 1, 0)
        if step >= up:
            assert (steps.lrs[step], steps.moms[step]) == pytest.approx((lrs[before], moms[before]), rel=1e-6)
        else:
            assert lrs[before] - 1e-9 <= steps.lrs[step] <= lrs[step] + 1e-9
            assert moms[step] - 1e-9 <= steps.moms[step] <= moms[before] + 1e-9
    assert (steps.lrs[0], steps.moms[0]) == pytest.approx((lrs[0], moms[0]))
    assert max(steps.lrs) == pytest.approx(max(lrs), rel=0.02)
    assert torch_steps(name, 100)[0][-1] == pytest.approx(RECIPES[name].lr / RECIPES[name].div_final, rel=1e-4)


def test_step_schedule_is_torchs(tiny_images, tiny_model):
    steps, n_steps = fitted_steps(tiny_images, tiny_model, "sujitojha1")
    lrs, moms = torch_steps("sujitojha1", n_steps)
    assert steps.lrs == pytest.approx(lrs) and steps.moms == moms
    assert [lrs[3 * epoch] for epoch in (0, 5, 6, 12, 18)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
