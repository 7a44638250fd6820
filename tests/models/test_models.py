"""The networks: sizes, names, shapes, and their arithmetic against one written out in sums of shifted images."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fastai.errors import InputError
from cifar_fastai.models import create_model, custom_resnet, resnet18, resnet34

SIZES = [(resnet18, 11_173_962), (resnet34, 21_282_122), (custom_resnet, 6_573_130)]


def on_paper(factory, *args):
    """A network without memory for weights: shapes and names alone."""
    with torch.device("meta"):
        return factory(*args)


@pytest.mark.parametrize("factory, n_parameters", SIZES)
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_number_of_parameters_and_outputs(factory, n_parameters, n_classes):
    model = on_paper(factory, n_classes)
    width = model.linear.in_features + 1
    assert sum(p.numel() for p in model.parameters()) == n_parameters + (n_classes - 10) * width
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, n_classes)


@pytest.mark.parametrize("name, n_parameters", [("resnet18", 701_466), ("resnet34", 1_334_618)])
def test_width_16_has_a_quarter_of_the_channels(name, n_parameters):
    """By hand: a sixteenth of the weights between channels, a quarter of all others but the last biases."""
    model, full = on_paper(create_model, name, 10, 16), on_paper(create_model, name)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    for one, other in zip(model.parameters(), full.parameters(), strict=True):
        assert [4 * n if n not in (1, 3, 10) else n for n in one.shape] == list(other.shape)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


def test_names_of_resnet18_are_those_of_pytorch_cifar():
    def conv_bn(conv, bn):
        bn_names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        return [f"{conv}.weight", *(f"{bn}.{name}" for name in bn_names)]

    block, expected = conv_bn("conv1", "bn1") + conv_bn("conv2", "bn2"), conv_bn("conv1", "bn1")
    for stage in (1, 2, 3, 4):
        first = block + (conv_bn("shortcut.0", "shortcut.1") if stage > 1 else [])
        expected += [f"layer{stage}.0.{name}" for name in first] + [f"layer{stage}.1.{name}" for name in block]
    assert list(on_paper(resnet18).state_dict()) == [*expected, "linear.weight", "linear.bias"]


def test_stages_of_resnet34():
    assert [len(stage) for name, stage in on_paper(resnet34).named_children() if name[:5] == "layer"] == [3, 4, 6, 3]


STAGES = dict(layer1=(64, 32), layer2=(128, 16), layer3=(256, 8), layer4=(512, 4))
CUSTOM_STAGES = dict(prep=(64, 32), layer1=(128, 16), layer2=(256, 8), layer3=(512, 4), pool=(512, 1))


@pytest.mark.parametrize("factory, stages", [(resnet18, STAGES), (resnet34, STAGES), (custom_resnet, CUSTOM_STAGES)])
def test_shapes_of_the_stages(factory, stages):
    model, shapes = on_paper(factory), {}
    for name, child in model.named_children():
        child.register_forward_hook(lambda module, args, out, name=name: shapes.update({name: tuple(out.shape)}))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    assert {name: shapes[name] for name in stages} == {name: (2, n, side, side) for name, (n, side) in stages.items()}


def test_names_find_their_network():
    assert sum(p.numel() for p in on_paper(create_model, "custom_resnet", 10).parameters()) == 6_573_130
    with pytest.raises(InputError, match="model='resnet81': no such name; did you mean resnet18"):
        create_model("resnet81")


# The same sums, written out -------------------------------------------------------------------------------------------


def conv(x, weight, stride=1):
    """Convolution with half-size zero padding: the sum over taps of shifted images times weights."""
    size, (height, width) = weight.shape[-1], x.shape[-2:]
    padded, taps = F.pad(x, (size // 2,) * 4), [(i, j) for i in range(size) for j in range(size)]
    shifted = [padded[:, :, i : i + height : stride, j : j + width : stride] for i, j in taps]  # each (B, C, h, w)
    weights = [weight[:, :, i, j] for i, j in taps]  # each (O, C)
    return sum(torch.einsum("bchw,oc->bohw", *pair) for pair in zip(shifted, weights, strict=True))


def bn(x, net):
    scale = net.weight / (net.running_var + 1e-5).sqrt()
    return x * scale[:, None, None] + (net.bias - net.running_mean * scale)[:, None, None]


def relu(x):
    return x * (x > 0)


def max_pool(x, size):
    b, c, h, w = x.shape
    return x.reshape(b, c, h // size, size, w // size, size).amax((3, 5))


def resnet_by_hand(net, x):
    x = relu(bn(conv(x, net.conv1.weight), net.bn1))
    for number, stage in enumerate([net.layer1, net.layer2, net.layer3, net.layer4]):
        for place, block in enumerate(stage):
            stride = 2 if number > 0 and place == 0 else 1
            out = relu(bn(conv(x, block.conv1.weight, stride), block.bn1))
            out = bn(conv(out, block.conv2.weight), block.bn2)
            if stride == 2:
                x = bn(conv(x, block.shortcut[0].weight, stride), block.shortcut[1])
            x = relu(out + x)
    return x.mean((2, 3)) @ net.linear.weight.T + net.linear.bias


def custom_by_hand(net, x):
    def pooled(stage, x):
        return relu(bn(max_pool(conv(x, stage[0].weight), 2), stage[2]))

    def residual(block, x):
        out = relu(bn(conv(x, block[0].weight), block[1]))
        return x + relu(bn(conv(out, block[3].weight), block[4]))

    x = relu(bn(conv(x, net.prep[0].weight), net.prep[1]))
    x = residual(net.layer1[4].block, pooled(net.layer1, x))
    x = pooled(net.layer3, pooled(net.layer2, x))
    x = residual(net.layer3[4].block, x)
    return max_pool(x, 4)[:, :, 0, 0] @ net.linear.weight.T + net.linear.bias


@pytest.mark.parametrize("factory, by_hand, size", [(resnet18, resnet_by_hand, 8), (custom_resnet, custom_by_hand, 32)])
def test_forward_is_the_sum_it_should_be(factory, by_hand, size):
    torch.manual_seed(0)
    net, x = factory(3).eval(), torch.randn(1, 3, size, size)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh ones do nothing
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), by_hand(net, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 48, 128])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnets_take_images_of_any_size(name, size):
    model = on_paper(create_model, name, 10, 16, size)
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)


def test_custom_resnet_says_what_it_needs():
    for size in (32, 63):
        assert on_paper(create_model, "custom_resnet", 10, 16, size)(
            torch.empty(2, 3, size, size, device="meta")
        ).shape == (2, 10)
    for size in (31, 64):
        with pytest.raises(InputError, match=f"needs images of 32 to 63 pixels a side, not {size}"):
            create_model("custom_resnet", size=size)
