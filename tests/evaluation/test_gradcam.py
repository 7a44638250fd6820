"""Grad-CAM against numpy and the library, on planted evidence, and on models in every state."""

import copy
import functools
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from cifar_fastai.data.loaders import cifar_dls
from cifar_fastai.errors import InputError
from cifar_fastai.evaluation.gradcam import METHODS, cam_layers, default_layer, gradcam
from cifar_fastai.models import custom_resnet, resnet18, resnet34
from cifar_fastai.training.learner import cifar_learner

GRADIENT_FREE = ("EigenCAM", "FEM", "ScoreCAM", "AblationCAM")


class TinyNet(nn.Module):
    """Two stages with batch norm and dropout; maps of 16 x 16 and 8 x 8, and one of 4 x 4 that is too small."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.small = nn.Sequential(nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(6, 3)

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
    """All of the model that must not change."""
    tensors = {name: (id(t), t.dtype, t.tolist()) for name, t in model.state_dict(keep_vars=True).items()}
    grads = {n: (p.requires_grad, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()}
    modules = {name: (id(m), m.training, id(m._compiled_call_impl)) for name, m in model.named_modules()}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tensors, grads, modules, [[dict(getattr(m, kind)) for kind in hooks] for m in model.modules()]


def test_by_hand_in_numpy():
    """Two channels that copy pixels, weighed (2, -1) and (-3, 0.5) over 8 x 8 cells by a linear layer."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2, bias=False))
    head = (rng.normal(size=(2, 2, 8, 8)) + np.array([[2, -1], [-3, 0.5]])[:, :, None, None]).astype(np.float32)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        net[3].weight.copy_(torch.tensor(head).flatten(1))
    x = rng.normal(size=(3, 1, 8, 8)).astype(np.float32)
    activations = np.maximum(np.concatenate([x, -2 * x], 1), 0)  # (3, 2, 8, 8)
    logits = np.einsum("nkij,ckij->nc", activations, head)
    for target in ("predicted", 0, 1):
        ids = logits.argmax(1) if target == "predicted" else np.full(3, target)
        means = head[ids].mean((2, 3), keepdims=True)  # (3, 2, 1, 1): the gradient of a logit, averaged over places
        for method, weights in ("GradCAM", means), ("HiResCAM", head[ids]):
            expected = np.maximum((weights * activations).sum(1), 0)  # (3, 8, 8)
            heat = gradcam(net, x, target, layer="1", method=method)
            assert (heat.targets == ids).all() and heat.map_size == (8, 8) and not heat.negligible.any()
            np.testing.assert_allclose(heat.peaks, expected.max((1, 2)), rtol=1e-5)
            np.testing.assert_allclose(heat.maps, expected / expected.max((1, 2), keepdims=True), atol=1e-6)


def test_in_place_relu_does_not_change_what_was_kept(net, x):
    inplace, apart = gradcam(net, x, 1, "stage.1"), copy.deepcopy(net)
    apart.stage[2] = nn.ReLU()
    np.testing.assert_array_equal(inplace.maps, gradcam(apart, x, 1, "stage.1").maps)


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
def test_evidence_in_each_corner(patch_finder, method):
    x = 0.05 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x[:, 2] -= 0.2  # in the third channel there is nothing
    for k in range(8):
        i, j = 20 * (k % 4 // 2) + 2, 20 * (k % 2) + 2
        x[k, k // 4, i : i + 8, j : j + 8] = 3.0  # a patch 8 x 8: corner k % 4, channel k // 4
    heat = gradcam(patch_finder, x, method=method, bs=3)
    assert heat.layer == "1" and heat.map_size == (8, 8) and not heat.negligible.any()
    assert heat.targets.tolist() == [0] * 4 + [1] * 4 and heat.explains_class == (method not in ("EigenCAM", "FEM"))
    corners, shares = zip(*map(corner_of, heat.maps), strict=True)
    assert corners == (0, 1, 2, 3) * 2 and (min(shares) > 0.9 or method in GRADIENT_FREE)


def test_negligible_maps_are_marked_not_stretched(patch_finder, net, x):
    spot = torch.zeros(2, 3, 32, 32)
    spot[0, 0, 4:12, 4:12] = 1.0  # speaks for class 0, against the others; the second image is black
    for method in METHODS:
        heat = gradcam(patch_finder, spot, 1, method=method)
        assert heat.negligible[1] and (heat.maps[1] == 0).all() and heat.peaks[1] <= 1e-6, method
        assert method in GRADIENT_FREE or heat.negligible[0] and (heat.maps[0] == 0).all(), method
    weak = copy.deepcopy(patch_finder)
    with torch.no_grad():
        weak[4].weight[0] *= 1e-5  # the class hardly heeds the map; the other classes still do
        net.linear.weight.fill_(torch.nan)
    strong, tiny, nan = gradcam(patch_finder, spot, 0), gradcam(weak, spot, 0), gradcam(net, x, 0)
    assert not strong.negligible[0] and tiny.negligible[0] and (tiny.maps == 0).all()
    assert tiny.peaks[0] == pytest.approx(1e-5 * strong.peaks[0], rel=1e-3)
    assert nan.negligible.all() and (nan.maps == 0).all()


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
    flat = torch.ones(1, 3, 32, 32)
    heat = gradcam(patch_finder, flat, 0, layer="0")
    assert not heat.negligible.any() and heat.maps.min() > 0.3 and heat.maps.max() == 1  # less at the zero padding
    assert np.isfinite(gradcam(patch_finder, flat, layer="0", method="FEM").maps).all()


def test_layers(net):
    for factory, layer in (resnet18, "layer3"), (resnet34, "layer3"), (custom_resnet, "layer2"):
        network = factory()
        assert default_layer(network) == layer and cam_layers(network)[layer] == (8, 8)
    names = "conv1 bn1 stage.0 stage.1 stage.2 stage small.0 small.1 small.2 small".split()
    sizes = [(size, size) for size in [16] * 2 + [8] * 4 + [4] * 4]
    assert list(cam_layers(net).items()) == list(zip(names, sizes, strict=True))
    assert default_layer(net) == "stage" and default_layer(net, size=64) == "small"


MAPS = "all maps: conv1 16 x 16, bn1 16 x 16, stage 8 x 8, small 4 x 4$"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer="stagee"), "layer='stagee': no such name; did you mean stage"),
        (dict(layer="zzz"), "layer='zzz': no such name; choose from conv1, bn1, stage, small"),
        (dict(layer="linear"), f"has no map of at least 5 pixels a side, or runs more than once; take stage; {MAPS}"),
        (dict(layer="small"), "layer='small': has no map of at least 5 pixels a side"),
        (dict(x=torch.zeros(1, 3, 8, 8)), "no layer has a map of at least 5"),
        (dict(method="gradcam+"), "method='gradcam\\+': no such name; did you mean GradCAM"),
        (dict(target=3), "target=3: no such class; ids go from 0 to 2"),
        (dict(target=-1), "target=-1: no such class"),
        (dict(target=0.5), 'target=0.5: must be "predicted", a class id'),
        (dict(target="cat"), "target='cat': no such name; choose from predicted"),
        (dict(target=(0, 1)), "one id for each of the 5 images"),
        (dict(target=(0, 1, 2, 3, 0)), "target=3"),
        (dict(x=torch.zeros(3, 32, 32)), "normalised batch"),
        (dict(x=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "normalised batch"),
    ],
)
def test_wrong_arguments(net, x, arguments, message):
    with pytest.raises(InputError, match=message):
        gradcam(net, **{"x": x} | arguments)


class Attention(nn.Module):
    """A transformer on patches of 4 x 4 pixels: 64 tokens, heads of 64 channels, so that all its tensors are square."""

    def __init__(self, side=8):
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 128, 4, stride=4), nn.Parameter(torch.randn(1, side * side, 128))
        self.k_norm, self.weights, self.linear = nn.LayerNorm(64), nn.Softmax(-1), nn.Linear(128, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, 128)
        if self.place is not None:
            tokens = tokens + self.place
        heads = self.k_norm(tokens.unflatten(2, (2, 64)).transpose(1, 2))  # (B, 2, N, 64)
        heads = self.weights(heads @ heads.mT) @ heads
        return self.linear(heads.transpose(1, 2).flatten(2).mean(1))


def test_tokens_and_attention_are_no_maps(x):
    """Neither where the network takes one size of image alone, nor where it takes any."""
    fixed, free = Attention(), Attention()
    free.place = None
    assert cam_layers(fixed) == cam_layers(free) == {"patches": (8, 8)}
    assert gradcam(fixed, x, 0).map_size == (8, 8)
    with pytest.raises(InputError, match="no layer has a map .* all maps: none"):
        default_layer(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)))


def test_maps_of_other_networks(x):
    """Convolutions without padding, enlarged and oblong images, pooling to a fixed size, a module that runs twice."""
    lenet = nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5), nn.Flatten(), nn.Linear(400, 3))
    assert cam_layers(lenet) == {"0": (28, 28), "1": (14, 14), "2": (10, 10)}
    net = nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(6), nn.Flatten(2))
    net.append(nn.Linear(36, 1)).append(nn.Flatten())
    assert cam_layers(net) == {"0": (96, 96), "1": (94, 94), "2": (6, 6)}
    assert gradcam(net, x[:, :, :20], 0, layer="1").map_size == (58, 94)
    relu, pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    twice = nn.Sequential(relu, nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(relu), pool, nn.Flatten(), nn.Linear(3, 2))
    assert cam_layers(twice) == {"1": (32, 32), "2": (32, 32), "3": (1, 1)}
    with pytest.raises(InputError, match="layer='0': .* runs more than once"):
        gradcam(twice, x, layer="0")


def test_a_layer_that_the_classes_do_not_depend_on(x):
    class Aside(TinyNet):
        def forward(self, x):
            self.stage(self.conv1(x))
            return self.linear(x.mean((2, 3)).repeat(1, 2))

    with pytest.raises(InputError, match="layer='stage': the class scores do not depend on it"):
        gradcam(Aside(), x, 0, "stage")


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
    for target in (None, "predicted", predicted, predicted.numpy(), predicted.tolist()):
        heat = gradcam(net, x, target)
        assert (heat.targets == predicted.numpy()).all() and (heat.maps == expected.maps).all()
    assert (gradcam(net, x, np.int64(2)).targets == 2).all()
    assert not np.array_equal(gradcam(net, x, 2).maps, gradcam(net, x, 0).maps)
    none = gradcam(net, x[:0])
    assert none.maps.shape == (0, 32, 32) and len(none.targets) == len(none.negligible) == len(none.peaks) == 0


@pytest.mark.parametrize("method", METHODS)
def test_leaves_all_as_it_was(net, x, method, capfd):
    """A model as training leaves it: modes mixed, frozen and with gradients, a hook of the user's own.

    An error of the model comes through, too; the library alone would swallow an IndexError.
    """
    net.train().bn1.eval()
    net.linear.weight.requires_grad_(False)
    net.conv1.weight.grad = torch.full_like(net.conv1.weight, 0.5)
    net.stage.register_forward_hook(lambda module, inputs, output: None)
    before, x_before, rng = state(net), x.clone(), torch.get_rng_state()
    expected = gradcam(copy.deepcopy(net).eval(), x, 0, method=method)
    with warnings.catch_warnings(action="error"):
        heat = gradcam(net, x, 0, method=method)
    assert before == state(net) and torch.equal(x, x_before) and x.grad is None
    assert torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    np.testing.assert_array_equal(heat.maps, expected.maps)
    assert capfd.readouterr() == ("", "")

    def fail(module, inputs):
        if len(inputs[0]) > 1:
            raise IndexError("broken")

    net.linear.register_forward_pre_hook(fail)
    before = state(net)
    with pytest.raises(IndexError, match="broken"):
        gradcam(net, x, 0, method=method)
    assert before == state(net)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("method", ["GradCAM", "AblationCAM"])
def test_whatever_is_around(net, x, around, method):
    expected = gradcam(net, x, 0, method=method)
    with around():
        inside = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # of inference mode, perhaps
        heat = gradcam(net, inside, 0, method=method)
        assert cam_layers(net)["stage"] == (8, 8)
    np.testing.assert_array_equal(heat.maps, expected.maps)


def test_hooks_run_and_are_not_copied(net, x):
    """A hook may hold what cannot be copied; hooks of weight_norm and pruning are part of what the model computes."""
    expected, lock, calls = gradcam(net, x, 0).maps, threading.Lock(), []
    net.stage.register_forward_hook(functools.partial(lambda lock, module, inputs, output: calls.append(output), lock))
    net.kept = net.stage(net.conv1(x).repeat(1, 1, 1, 1))  # an output with its graph
    np.testing.assert_array_equal(gradcam(net, x, 0).maps, expected)
    assert len(calls) > 1
    prune.ln_structured(net.stage[0], "weight", 3, n=2, dim=0)
    assert not np.allclose(gradcam(net, x, 0, layer="stage").maps, expected, atol=1e-3)
    net.lock = lock
    with pytest.raises(InputError, match="the model cannot be copied .*lock"):
        gradcam(net, x)


@pytest.mark.parametrize("how", ["in place", "a part", "wrapped"])
@pytest.mark.parametrize("method", ["GradCAM", "AblationCAM"])
def test_compiled(net, x, how, method):
    """The same maps, without a run of what was compiled, which stays compiled."""
    expected, runs = gradcam(net, x, 0, method=method), []

    def count(graph, inputs):
        return lambda *values: runs.append(1) or graph(*values)

    if how == "wrapped":
        net = torch.compile(net, backend=count)
    else:
        (net if how == "in place" else net.stage).compile(backend=count)
    with torch.no_grad():
        net(x)
        before, n_runs = state(net), len(runs)
        np.testing.assert_array_equal(gradcam(net, x, 0, method=method).maps, expected.maps)
        assert before == state(net) and len(runs) == n_runs > 0
        net(x)
    assert len(runs) > n_runs
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, torch.channels_last])
def test_weights_of_every_kind(net, x, kind):
    net.to(**{"memory_format" if kind == torch.channels_last else "dtype": kind})
    before, expected = state(net), gradcam(copy.deepcopy(net).float(), x, 0)
    np.testing.assert_allclose(gradcam(net, x, 0).maps, expected.maps, atol=1e-5)
    assert before == state(net)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_learner_after_training(tiny_images, precision):
    dls = cifar_dls(tiny_images, bs=16, val_bs=18, device="cpu")
    learn = cifar_learner(dls, TinyNet(), precision=precision)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.01)
        x, y = dls.valid.one_batch()  # TensorImage, TensorCategory
        before = state(learn.model)
        heat = gradcam(learn, x, y)
        assert (heat.targets == y.numpy()).all() and heat.layer == default_layer(learn) == "stage"
        assert before == state(learn.model)
        expected = gradcam(copy.deepcopy(learn.model), torch.tensor(x.numpy()), y.numpy())
        np.testing.assert_allclose(heat.maps, expected.maps, atol=1e-5)
        assert (gradcam(learn, x, "green").targets == 1).all()
        with pytest.raises(InputError, match="target='grey': no such name; did you mean green"):
            gradcam(learn, x, "grey")
        learn.fit(1, lr=0.01)  # goes on as before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(net, x, method):
    expected = gradcam(net, x, 0, method=method)
    with torch.autocast("cuda", torch.float16):
        heat = gradcam(net.cuda(), x, 0, method=method)
    np.testing.assert_allclose(heat.maps, expected.maps, atol=1e-2)
    assert (heat.negligible == expected.negligible).all()


@pytest.mark.parametrize("size, layer", [(16, "layer2"), (32, "layer3"), (64, "layer4")])
def test_the_default_layer_follows_the_size_of_the_images(size, layer):
    """The deepest map of at least five pixels."""
    assert default_layer(resnet18(10, 8), size).split(".")[0] == layer
