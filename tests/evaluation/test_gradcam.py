"""Grad-CAM against one worked out in numpy, against planted evidence, and on learners in every state."""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import GRADIENT_FREE, METHODS, cam_layers, default_layer, gradcam
from cifar_fastai.models import custom_resnet, resnet18, resnet34
from cifar_fastai.training.learner import cifar_learner

torch.set_num_threads(1)


class TinyNet(nn.Module):
    """Two stages with batch norm and dropout; maps of 16 x 16 and 8 x 8, and one of 4 x 4 that is too small."""

    def __init__(self, n_classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.small = nn.Sequential(nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, n_classes)

    def forward(self, x):
        x = self.stage(F.relu(self.bn1(self.conv1(x))))
        return self.linear(self.drop(self.small(x).mean((2, 3)))) * 20


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = TinyNet()
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.randn(8, 3, 32, 32))  # batch norm's statistics are those of such images
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def state(model):
    """All that must be afterwards as it was before."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: (id(t), t.dtype, t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "frozen": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: (id(p.grad), p.grad is None or p.grad.clone()) for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "modules": {name: id(m) for name, m in model.named_modules()},
        "hooks": {name: [dict(getattr(m, kind)) for kind in hooks] for name, m in model.named_modules()},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------------ by hand


def test_by_hand_in_numpy():
    """Two channels that copy pixels, weighed (2, -1) and (-3, 0.5) over 8 x 8 cells by a linear layer."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2, bias=False))
    head = rng.normal(size=(2, 2, 8, 8)).astype(np.float32) + np.array([[2, -1], [-3, 0.5]])[:, :, None, None]
    head = head.astype(np.float32)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        net[3].weight.copy_(torch.tensor(head).flatten(1))
    x = rng.normal(size=(3, 1, 8, 8)).astype(np.float32)
    activations = np.maximum(np.concatenate([x, -2 * x], 1), 0)  # (3, 2, 8, 8)
    logits = np.einsum("nkij,ckij->nc", activations, head)
    for target in ("predicted", 0, 1):
        ids = logits.argmax(1) if target == "predicted" else np.full(3, target)
        weights = head[ids].mean((2, 3))  # (3, 2): the gradient of a logit, averaged over places
        expected = np.maximum((weights[:, :, None, None] * activations).sum(1), 0)  # (3, 8, 8)
        found = gradcam(net, x, target, layer="1")
        assert (found.targets == ids).all() and found.map_size == (8, 8) and not found.negligible.any()
        np.testing.assert_allclose(found.peaks, expected.max((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found.maps, expected / expected.max((1, 2), keepdims=True), atol=1e-6)
        hires = np.maximum((head[ids] * activations).sum(1), 0)  # no average: HiResCAM
        found = gradcam(net, x, target, layer="1", method="HiResCAM")
        np.testing.assert_allclose(found.maps, hires / hires.max((1, 2), keepdims=True), atol=1e-6)


def test_agrees_with_the_library_alone(net, x):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    plain = copy.deepcopy(net)
    theirs = GradCAM(plain, [plain.stage[0]])(x, [ClassifierOutputTarget(1)] * 5)
    ours = gradcam(net, x, 1, layer="stage.0")
    some = (ours.maps.min((1, 2)) == 0) & ~ours.negligible  # elsewhere the library takes the minimum away
    assert some.any()
    np.testing.assert_allclose(ours.maps[some], theirs[some], atol=1e-4)


def test_in_place_relu_does_not_change_what_was_kept(net, x):
    inplace, apart = gradcam(net, x, 1, "stage.1"), copy.deepcopy(net)
    apart.stage[2] = nn.ReLU()
    np.testing.assert_array_equal(inplace.maps, gradcam(apart, x, 1, "stage.1").maps)


# ------------------------------------------------------------------------------------------------ planted evidence


@pytest.fixture(scope="module")
def patch_finder():
    """A net whose class k is the brightness of channel k anywhere, set by hand."""
    conv = nn.Conv2d(3, 3, 5, stride=4, padding=2, bias=False)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[range(3), range(3)] = 1
        net[4].weight.copy_(10 * torch.eye(3) - 1)
    return net


def corner_of(heat):
    """Which quarter of the (32, 32) map holds most of it, and how much of it."""
    quarters = np.array([heat[i : i + 16, j : j + 16].sum() for i in (0, 16) for j in (0, 16)]) / heat.sum()
    return int(quarters.argmax()), quarters.max()


@pytest.mark.parametrize("method", METHODS)
def test_evidence_in_each_corner_is_found(patch_finder, method):
    x = 0.05 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, 2] -= 0.2  # in the third channel there is nothing
    for k in range(8):
        i, j = 20 * (k % 4 // 2) + 2, 20 * (k % 2) + 2
        x[k, k // 4, i : i + 8, j : j + 8] = 3.0  # a patch 8 x 8: corner k % 4, channel k // 4
    heat = gradcam(patch_finder, x, method=method, bs=3)
    assert heat.layer == "1" and heat.map_size == (8, 8) and not heat.negligible.any()
    assert heat.targets.tolist() == [0] * 4 + [1] * 4
    for k in range(8):
        corner, share = corner_of(heat.maps[k])
        assert corner == k % 4, (method, k)
        assert share > 0.9 or method in GRADIENT_FREE, (method, k, share)


def test_two_objects_and_the_class_that_is_asked_for(patch_finder):
    x = torch.zeros(1, 3, 32, 32)
    x[:, 0, 2:10, 2:10] = x[:, 1, 22:30, 22:30] = 2.0
    assert corner_of(gradcam(patch_finder, x, 0).maps[0]) == (0, 1)
    assert corner_of(gradcam(patch_finder, x, 1).maps[0]) == (3, 1)


# -------------------------------------------------------------------------------------------------- negligible maps


def test_an_all_zero_map_is_marked(patch_finder):
    x = torch.zeros(2, 3, 32, 32)
    x[0, 0, 4:12, 4:12] = 1.0  # speaks for class 0, against the others; the second image is black
    for method in METHODS:
        heat = gradcam(patch_finder, x, 1, method=method)
        assert heat.negligible[1] and (heat.maps[1] == 0).all() and heat.peaks[1] <= 1e-6, method
        if method not in GRADIENT_FREE:
            assert heat.negligible[0] and (heat.maps[0] == 0).all(), method


def test_a_tiny_map_is_marked_not_stretched(patch_finder):
    net, x = copy.deepcopy(patch_finder), torch.zeros(1, 3, 32, 32)
    x[:, 0, 4:12, 4:12] = 1.0
    strong = gradcam(net, x, 0)
    with torch.no_grad():
        net[4].weight[0] *= 1e-5  # the class hardly heeds the map; the other classes still do
    tiny = gradcam(net, x, 0)
    assert not strong.negligible[0] and tiny.negligible[0] and (tiny.maps == 0).all()
    assert tiny.peaks[0] == pytest.approx(1e-5 * strong.peaks[0], rel=1e-3)


def test_rounding_errors_are_marked():
    """Two channels whose evidence cancels to the last bits, though their activations are large."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1000.0, 3000.1]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
        net[3].weight.fill_(3.00010)
        net[3].weight[:, 64:] = -1.0
    heat = gradcam(net, torch.rand(4, 3, 8, 8), 0)
    assert heat.negligible.all() and (heat.maps == 0).all()


def test_a_flat_map_stays_flat(patch_finder):
    """The library takes the minimum away and stretches what remains: rounding errors, here."""
    heat = gradcam(patch_finder, torch.ones(1, 3, 32, 32), 0, layer="0")
    assert not heat.negligible.any() and heat.maps.min() > 0.3 and heat.maps.max() == 1  # less at the zero padding
    flat = gradcam(patch_finder, torch.ones(1, 3, 32, 32), layer="0", method="FEM")
    assert np.isfinite(flat.maps).all()


def test_weights_that_are_no_numbers(net, x):
    with torch.no_grad():
        net.linear.weight.fill_(torch.nan)
    heat = gradcam(net, x, 0)
    assert heat.negligible.all() and (heat.maps == 0).all()


# ----------------------------------------------------------------------------------------------- layers and names


def test_default_layers_of_the_networks():
    for factory, layer in (resnet18, "layer3"), (resnet34, "layer3"), (custom_resnet, "layer2"):
        with torch.device("meta"):
            model = factory()
        sizes = cam_layers(model.to_empty(device="cpu") if factory is custom_resnet else factory())
        assert default_layer(factory()) == layer and sizes[layer] == (8, 8)
        assert min(list(sizes.values())[-1]) <= 4 and list(sizes)[0] in ("conv1", "prep.0")


def test_layers_in_order(net):
    assert cam_layers(net) == {
        "conv1": (16, 16),
        "bn1": (16, 16),
        "stage.0": (8, 8),
        "stage.1": (8, 8),
        "stage.2": (8, 8),
        "stage": (8, 8),
        "small.0": (4, 4),
        "small.1": (4, 4),
        "small.2": (4, 4),
        "small": (4, 4),
    }
    assert default_layer(net) == "stage" and default_layer(net, size=64) == "small"


@pytest.mark.parametrize("layer", ["conv1", "bn1", "stage", "stage.0", "stage.2"])
def test_any_named_layer(net, x, layer):
    heat = gradcam(net, x, 0, layer)
    assert heat.layer == layer and heat.map_size == cam_layers(net)[layer] and heat.maps.shape == (5, 32, 32)


def test_a_small_map_is_refused_with_all_sizes(net, x):
    with pytest.raises(InputError, match="small: its map is 4 x 4, less than 5 pixels; take stage;") as e:
        gradcam(net, x, layer="small")
    assert str(e.value).endswith("all maps: conv1 16 x 16, bn1 16 x 16, stage 8 x 8, small 4 x 4")
    with pytest.raises(InputError, match="no layer has a map of at least 5"):
        default_layer(net, size=8)


def test_wrong_names(net, x):
    with pytest.raises(InputError, match="layer stagee: no such layer; did you mean stage"):
        gradcam(net, x, layer="stagee")
    with pytest.raises(InputError, match="layer zzz: no such layer; choose from conv1 16 x 16"):
        gradcam(net, x, layer="zzz")
    with pytest.raises(InputError, match="layer linear: gives no map"):
        gradcam(net, x, layer="linear")
    with pytest.raises(InputError, match=r"method gradcam\+: no such name; did you mean GradCAM"):
        gradcam(net, x, method="gradcam+")
    with pytest.raises(InputError, match="method qqq: no such name; choose from GradCAM, GradCAM"):
        gradcam(net, x, method="qqq")
    wrong = {
        3: "target 3: no such class; ids go from 0 to 2",
        -1: "target -1",
        0.5: 'give "predicted',
        "cat": "target cat",
        (0, 1): "2 class ids for 5",
        (0, 1, 2, 3, 0): "target 3",
    }
    for target, said in wrong.items():
        with pytest.raises(InputError, match=said):
            gradcam(net, x, target)
    with pytest.raises(InputError, match="give a normalised batch"):
        gradcam(net, x[0])
    with pytest.raises(InputError, match="give a normalised batch"):
        gradcam(net, (x * 9).to(torch.uint8))


def test_a_layer_that_the_classes_do_not_depend_on(net, x):
    class Side(TinyNet):
        def forward(self, x):
            self.stage(self.conv1(x))
            return self.linear(x.mean((2, 3)).repeat(1, 2))

    side = Side()
    before = state(side)
    with pytest.raises(InputError, match="layer stage: the class scores do not depend on it"):
        gradcam(side, x, 0, "stage")
    assert same(before, state(side))


def test_a_module_that_runs_twice_is_no_layer(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(self.relu(self.conv(self.relu(x))).mean((2, 3)))

    assert cam_layers(Twice()) == {"conv": (32, 32)} and default_layer(Twice()) == "conv"
    with pytest.raises(InputError, match="layer relu: gives no map .* or runs more than once"):
        gradcam(Twice(), x, layer="relu")


# ------------------------------------------------------------------------------------------- batches and targets


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_at_a_time_gives_the_same(net, x, method):
    whole, parts = gradcam(net, x, method=method), gradcam(net, x, method=method, bs=2)
    np.testing.assert_allclose(whole.maps, parts.maps, atol=2e-3)
    assert (whole.targets == parts.targets).all() and (whole.negligible == parts.negligible).all()
    assert whole.maps.dtype == np.float32 and whole.maps.shape == (5, 32, 32)
    assert whole.maps.min() >= 0 and (whole.maps.max((1, 2)) == ~whole.negligible).all()


def test_targets_of_every_kind(net, x):
    with torch.no_grad():
        predicted = net(x).argmax(1)
    expected = gradcam(net, x)
    assert (expected.targets == predicted.numpy()).all()
    for target in (None, "predicted", predicted, predicted.numpy(), predicted.tolist()):
        heat = gradcam(net, x, target)
        assert (heat.targets == expected.targets).all() and (heat.maps == expected.maps).all()
    assert (gradcam(net, x, np.int64(2)).targets == 2).all()
    assert not np.array_equal(gradcam(net, x, 2).maps, gradcam(net, x, 0).maps)


def test_no_images(net, x):
    heat = gradcam(net, x[:0])
    assert heat.maps.shape == (0, 32, 32) and len(heat.targets) == len(heat.negligible) == len(heat.peaks) == 0


# ---------------------------------------------------------------------------------------------------- every state


@pytest.fixture
def messy(net):
    """A model as training leaves it: modes mixed, some layers frozen, some with gradients, a hook of the user's own."""
    net.train()
    net.bn1.eval()
    net.linear.weight.requires_grad_(False)
    net.conv1.weight.grad = torch.full_like(net.conv1.weight, 0.5)
    net.small[0].weight.grad = torch.zeros_like(net.small[0].weight)
    net.stage.register_forward_hook(lambda module, inputs, output: None)
    return net


@pytest.mark.parametrize("method", METHODS)
def test_leaves_all_as_it_was(messy, x, method, capfd):
    before, x_before, rng = state(messy), x.clone(), torch.get_rng_state()
    expected = gradcam(copy.deepcopy(messy).eval(), x, 0, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heat = gradcam(messy, x, 0, method=method)
    assert same(before, state(messy)) and torch.equal(x, x_before) and x.grad is None
    assert torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    np.testing.assert_array_equal(heat.maps, expected.maps)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("method", "n"),
    [*((method, n) for method in METHODS for n in (0, 1)), ("ScoreCAM", 2), ("AblationCAM", 2), ("AblationCAM", 3)],
)
def test_leaves_all_as_it_was_after_an_error(messy, x, method, n, monkeypatch):
    """The forward pass breaks off after `n` good ones: the first finds the sizes, the second gives the activations."""
    before, calls = state(messy), []

    def fail(self, inputs):
        calls.append(1)
        if len(calls) > n:
            raise IndexError("broken")
        return forward(self, inputs)

    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", fail)
    with pytest.raises(IndexError, match="broken"):  # which the library alone would swallow
        gradcam(messy, x, 0, method=method)
    assert same(before, state(messy))


def test_an_error_in_the_method_itself(messy, x, monkeypatch):
    before = state(messy)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[gradcam.__module__], "_scale", fail)
    with pytest.raises(KeyboardInterrupt):
        gradcam(messy, x, 0)
    assert same(before, state(messy))


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.set_grad_enabled(False),
    ],
)
@pytest.mark.parametrize("method", ["GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM"])
def test_whatever_is_around(net, x, around, method):
    expected = gradcam(net, x, 0, method=method)
    with around():
        inside = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # of inference mode, perhaps
        heat = gradcam(net, inside, 0, method=method)
        assert cam_layers(net)["stage"] == (8, 8)
    np.testing.assert_array_equal(heat.maps, expected.maps)


def test_frozen_layers(net, x):
    expected = gradcam(net, x, 0)
    for p in net.parameters():
        p.requires_grad_(False)
    before = state(net)
    np.testing.assert_array_equal(gradcam(net, x, 0).maps, expected.maps)
    assert same(before, state(net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types(net, x, dtype):
    net = net.to(dtype)
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    before = state(net)
    expected = gradcam(copy.deepcopy(net).float(), x, 0)
    np.testing.assert_array_equal(gradcam(net, x.to(dtype).float(), 0).maps.shape, expected.maps.shape)
    np.testing.assert_array_equal(gradcam(net, x, 0).maps, expected.maps)
    assert same(before, state(net))


@pytest.mark.parametrize("how", ["in place", "a part", "wrapped"])
@pytest.mark.parametrize("method", ["GradCAM", "AblationCAM"])
def test_compiled(net, x, how, method):
    expected = gradcam(copy.deepcopy(net), x, 0, method=method)
    if how == "wrapped":
        net = torch.compile(net, backend="eager")
    else:
        (net if how == "in place" else net.stage).compile(backend="eager")
    with torch.no_grad():
        out = net(x)
    before, compiled = state(net), getattr(net, "_compiled_call_impl", None)
    np.testing.assert_array_equal(gradcam(net, x, 0, method=method).maps, expected.maps)
    assert same(before, state(net)) and getattr(net, "_compiled_call_impl", None) is compiled
    with torch.no_grad():
        torch.testing.assert_close(net(x), out)
    torch._dynamo.reset()


def test_channels_last(net, x):
    expected = gradcam(net, x, 0)
    heat = gradcam(net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 0)
    np.testing.assert_allclose(heat.maps, expected.maps, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_learner_after_training(tiny_images, precision):
    dls = cifar_dls(tiny_images, bs=16, val_bs=18, device="cpu")
    learn = cifar_learner(dls, TinyNet(), precision=precision)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.01)
    x, y = dls.valid.one_batch()  # TensorImage, TensorCategory
    learn.model.train()
    before = state(learn.model)
    heat = gradcam(learn, x, y)
    assert (heat.targets == y.numpy()).all() and heat.maps.shape == (18, 32, 32) and default_layer(learn) == "stage"
    assert same(before, state(learn.model))
    expected = gradcam(copy.deepcopy(learn.model).float(), torch.tensor(x.numpy()), y.numpy())
    np.testing.assert_allclose(heat.maps, expected.maps, atol=1e-5)
    assert (gradcam(learn, x, "green").targets == 1).all()
    with pytest.raises(InputError, match="target grey: no such class; choose from predicted, red, green, blue"):
        gradcam(learn, x, "grey")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.01)  # goes on as if nothing had been


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(net, x, method):
    expected = gradcam(net, x, 0, method=method)
    with torch.autocast("cuda", torch.float16):
        heat = gradcam(net.cuda(), x, 0, method=method)
    np.testing.assert_allclose(heat.maps, expected.maps, atol=1e-2)
    assert (heat.negligible == expected.negligible).all()
