"""Winograd's convolutions give what torch's give for a quarter of the multiplications, and nothing else changes."""

import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from cifar_fastai.training import winograd
from cifar_fastai.training.compiling import compile_model, uncompile
from cifar_fastai.training.winograd import conv3x3, plain_convolutions, winograd_convolutions


@pytest.fixture
def uncompiled():
    """The transforms as Python runs them: the same sums, without a minute of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("chunk", [1, 3 * 36 * 5 * 2 * 3, winograd._CHUNK], ids=["one image", "three", "all"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_values_and_gradients_are_those_of_torch_in_double_precision(uncompiled, monkeypatch, chunk, channels_last):
    monkeypatch.setattr(winograd, "_CHUNK", chunk)
    compare(n=7, n_in=3, n_out=5, channels_last=channels_last)


def test_the_widest_layer_of_resnet18(uncompiled):
    compare(n=1, n_in=512, n_out=512, height=4, width=4)


def compare(n, n_in, n_out, height=8, width=12, channels_last=True):  # 2 x 3 tiles: no square
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.randn(n, n_in, height, width).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(n_out, n_in, 3, 3).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(n, n_out, height, width)

    y = conv3x3(x, weight)
    y.backward(grad)

    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.conv2d(exact_x, exact_weight, padding=1)
    exact.backward(grad.double())
    for ours, theirs in ((y, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("channels_last", [True, False])
def test_what_the_compiler_is_told_is_so(uncompiled, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = (torch.randn(shape).contiguous(memory_format=layout) for shape in ((3, 5, 8, 12), (7, 5, 3, 3)))
    torch.library.opcheck(conv3x3, (x, weight))
    torch.library.opcheck(conv3x3, (x.requires_grad_(), weight.requires_grad_()))
    torch.library.opcheck(winograd.conv3x3_backward, (torch.randn(3, 7, 8, 12), x.detach(), weight.detach()))


def test_one_tile_by_hand(uncompiled):
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1
    weight = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    expected = torch.zeros(4, 4)
    expected[:2, :2] = torch.tensor([[5.0, 4], [2, 1]])  # the pixel in a corner meets the filter's middle first
    torch.testing.assert_close(conv3x3(x, weight)[0, 0], expected, rtol=0, atol=1e-4)


def test_a_quarter_of_the_multiplications_in_both_directions(uncompiled):
    x, weight = torch.randn(8, 32, 8, 12, requires_grad=True), torch.randn(16, 32, 3, 3, requires_grad=True)
    with profile(record_shapes=True) as seen:
        conv3x3(x, weight).sum().backward()
    shapes = [
        event.input_shapes[-4:-2] if event.name == "aten::baddbmm_" else event.input_shapes
        for event in seen.events()
        if event.name in ("aten::bmm", "aten::baddbmm_")
    ]
    products = [math.prod(left) * right[-1] for left, right in shapes]  # (36, n, k) with (36, k, m)
    written_out = (8 * 8 * 12) * 9 * 32 * 16  # for the output; as many for the gradient of x and for that of weight
    assert products == [written_out // 4] * 3


WIDE = dict(in_channels=16, out_channels=16, kernel_size=3, padding=1)
OTHER = [dict(kernel_size=1, padding=0), dict(kernel_size=5), dict(stride=2), dict(padding=0), dict(dilation=2)]
OTHER += [dict(groups=2), dict(padding_mode="reflect"), dict(in_channels=3), dict(out_channels=8)]


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_other_convolutions_are_left_alone(change):
    conv = nn.Conv2d(**WIDE | change)
    winograd_convolutions(conv)
    assert "_conv_forward" not in conv.__dict__


def test_nothing_but_compiled_models_is_changed():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(**WIDE), nn.ReLU()), torch.randn(8, 16, 16, 16)
    expected, names = model(x), list(model.state_dict())
    winograd_convolutions(model)
    assert "_conv_forward" in model[0].__dict__
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(model(x[0]), expected[0])  # an image alone
    assert b"winograd" not in pickle.dumps(model) and torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    plain_convolutions(model)
    assert "_conv_forward" not in model[0].__dict__ and torch.equal(model(x), expected)


def test_a_copy_computes_with_its_own_weights(uncompiled, compiling):
    model, x = nn.Sequential(nn.Conv2d(**WIDE)), torch.randn(8, 16, 16, 16)
    winograd_convolutions(model)
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied[0].weight)
    nn.init.zeros_(copied[0].bias)
    assert torch.equal(copied(x), torch.zeros(8, 16, 16, 16)) and model(x).abs().max() > 0


@pytest.fixture
def compiling(monkeypatch):
    """As while a model is compiled; what is called is torch's own for what is not counted here."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    calls = []
    monkeypatch.setattr(winograd, "conv3x3", lambda x, weight: calls.append(tuple(x.shape)) or conv3x3(x, weight))
    return calls


def test_only_what_pays_and_fits_is_computed_so(uncompiled, compiling):
    model, x = nn.Sequential(nn.Conv2d(**WIDE)), torch.randn(8, 16, 16, 16)
    expected = model(x)
    winograd_convolutions(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
    assert compiling == [(8, 16, 16, 16)]
    for few in (x[:3], x[..., :14, :14], x[0]):  # 768 pixels; no whole tiles; an image alone
        assert torch.equal(model(few), F.conv2d(few, model[0].weight, model[0].bias, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model[0].padding = model[0].dilation = (2, 2)  # as one does for finer maps
    assert torch.equal(model(x), F.conv2d(x, model[0].weight, model[0].bias, padding=2, dilation=2))
    assert len(compiling) == 1


def step(net, x):
    """The batched products that a training step of `net` calls; nothing but Winograd's convolutions has any."""
    net.zero_grad()
    with profile() as seen:
        F.cross_entropy(net(x), torch.arange(len(x))).backward()
    return {event.name for event in seen.events() if "bmm" in event.name}


@pytest.mark.slow
def test_a_compiled_model_uses_them_and_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what is compiled is today's
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain, x = copy.deepcopy(model), torch.randn(8, 3, 16, 16)
    assert compile_model(model, x, nullcontext()) is None

    assert step(model, x) == {"aten::bmm", "aten::baddbmm_"} and step(plain, x) == set()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    # too few pixels, no whole number of tiles, and half precision are torch's own
    assert step(model, x[:2]) == set() == step(model, x[..., :14, :14])
    with torch.autocast("cpu", torch.bfloat16):
        assert step(model, x) == set()
    uncompile(model)
    assert step(model, x) == set() and torch.equal(model(x), plain(x))
