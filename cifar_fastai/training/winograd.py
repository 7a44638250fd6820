"""3x3 convolutions with a quarter of the multiplications, for processors that compute them in float32.

Winograd's F(4x4, 3x3): tiles of 6x6 pixels and filters of 3x3 are transformed so that 36 multiplications give 4x4
pixels of the output, where the plain sum takes 144. Values and gradients differ from torch's own by a few
millionths. Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.

Shapes: B images of H x W pixels, C channels in and K out, T x T tiles of 4x4 pixels, where T stands for H/4 and W/4.
"""

from functools import cache
from types import MethodType

import torch
from torch import Tensor, nn

__all__ = ["plain_convolutions", "winograd_convolutions"]

_ROWS = [6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]
_G = torch.tensor(_ROWS, dtype=torch.float32, device="cpu") / 24
_GG = torch.kron(_G, _G)  # (36, 9): a 3x3 filter to its 6x6 transform, both as vectors

# Below this many pixels (B x H x W) the transforms of the filters cost more than they save.
_WORTH_IT = 1024

# Values in the transformed tiles of one chunk of images: 9 MB, so that they and as many products stay in a large cache.
_CHUNK = 36 * 65536


def winograd_convolutions(model):
    """Compute the 3x3 convolutions of `model` this way where it is compiled and runs on a CPU in float32.

    Parameters, names and what hooks see stay as they are. Sizes that are not a whole number of tiles, half precision
    and uncompiled calls use torch's own convolution. A pickled model holds torch's own again.
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and type(conv)._conv_forward is nn.Conv2d._conv_forward and _fits(conv):
            conv._conv_forward = MethodType(_conv_forward, conv)  # pickle keeps its name, which is that of torch's own


def plain_convolutions(model):
    """Undo `winograd_convolutions`."""
    for conv in model.modules():
        if getattr(conv.__dict__.get("_conv_forward"), "__func__", None) is _conv_forward:
            del conv._conv_forward


def _fits(conv):
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    wide = min(conv.in_channels, conv.out_channels) >= 16  # narrower ones spend their time on the transforms
    return plain and wide and conv.groups == 1 and conv.padding_mode == "zeros"


def _conv_forward(conv, x, weight, bias):
    """Stands for `nn.Conv2d._conv_forward`: x (B, C, H, W) -> (B, K, H, W)."""
    float32 = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (torch.compiler.is_compiling() and float32 and x.ndim == 4 and _whole(x) and _fits(conv)):
        return nn.Conv2d._conv_forward(conv, x, weight, bias)
    y = conv3x3(x, weight)
    return y if bias is None else y + bias[:, None, None]


def _whole(x):
    n, _, height, width = x.shape
    return height % 4 == 0 and width % 4 == 0 and n * height * width >= _WORTH_IT


@torch.library.custom_op("cifar_fastai::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, C, H, W), weight (K, C, 3, 3) -> (B, K, H, W), as channels_last."""
    n_out, n_in = weight.shape[:2]
    filters = _GG @ weight.permute(2, 3, 1, 0).reshape(9, -1)  # (36, C * K)
    x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    y = x.new_empty(*x.shape[:3], n_out)
    for images, tiles in _chunks(x, max(n_in, n_out)):
        _store(y[images], tiles, filters.view(36, n_in, n_out))
    return y.permute(0, 3, 1, 2)


@torch.library.custom_op("cifar_fastai::conv3x3_backward", mutates_args=())
def conv3x3_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for x and weight, from that of the output (B, K, H, W)."""
    n_out, n_in = weight.shape[:2]
    rotated = _GG @ weight.permute(2, 3, 0, 1).reshape(9, -1).flip(0)  # (36, K * C): by 180 degrees
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C), (B, H, W, K)
    x_grad, filters_grad = x.new_empty(x.shape), x.new_zeros(36, n_in, n_out)
    wide = max(n_in, n_out)
    for (images, tiles), (_, grad_tiles) in zip(_chunks(x, wide), _chunks(grad, wide), strict=True):
        out_tiles = _compiled(_output_tiles_grad)(grad[images]).view(36, -1, n_out)
        filters_grad.baddbmm_(tiles.transpose(1, 2), out_tiles)  # (36, C, K)
        _store(x_grad[images], grad_tiles, rotated.view(36, n_out, n_in))
    weight_grad = (_GG.T @ filters_grad.view(36, -1)).view(3, 3, n_in, n_out).permute(3, 2, 0, 1)
    return x_grad.permute(0, 3, 1, 2), weight_grad.contiguous(memory_format=torch.channels_last)


@conv3x3.register_fake
def _(x, weight):
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)


@conv3x3_backward.register_fake
def _(grad, x, weight):
    x_grad = x.new_empty(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return x_grad, torch.empty_like(weight, memory_format=torch.channels_last)


conv3x3.register_autograd(
    lambda ctx, grad: conv3x3_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _chunks(x, n_channels):
    """The images (B, H, W, C) a few at a time: their place among all, and their tiles (36, n * T * T, C)."""
    batch, height, width, channels = x.shape
    n = max(1, _CHUNK // (36 * n_channels * (height // 4) * (width // 4)))
    padded = x.new_zeros(min(n, batch), height + 2, width + 2, channels)
    for start in range(0, batch, n):
        images = slice(start, min(start + n, batch))
        padded = padded[: images.stop - start]
        padded[:, 1:-1, 1:-1] = x[images]
        yield images, _compiled(_input_tiles)(padded).view(36, -1, channels)


def _store(y, tiles, filters):
    """Write the convolution of `tiles` (36, n * T * T, C) with `filters` (36, C, K) into y (n, H, W, K)."""
    n, height, width, n_out = y.shape
    out = torch.bmm(tiles, filters).view(36, n, height // 4, width // 4, n_out)
    y.view(n, height // 4, 4, width // 4, 4, n_out).copy_(_compiled(_output_tiles)(out))


@cache
def _compiled(transform):
    """`transform` as one loop over the pixels; at its first use, since loading the compiler takes seconds."""
    return torch.compile(transform, dynamic=True)


def _two_ways(transform, grid):
    """`transform`, a function of a list, along the columns of `grid`, a list of lists, and then along its rows."""
    columns = [transform([row[j] for row in grid]) for j in range(len(grid[0]))]
    return [transform([column[i] for column in columns]) for i in range(len(columns[0]))]


def _input_tiles(x):
    """(n, H + 2, W + 2, C) -> (36, n, T, T, C): the tiles of 6x6 pixels that begin at every fourth, transformed."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    grid = [[x[:, i : i + height - 3 : 4, j : j + width - 3 : 4] for j in range(6)] for i in range(6)]
    return torch.stack([value for row in _two_ways(_input, grid) for value in row])


def _output_tiles(products):
    """(36, n, T, T, K) -> (n, T, 4, T, 4, K): tiles of 4x4 pixels of the output."""
    grid = [[products[6 * i + j] for j in range(6)] for i in range(6)]
    return torch.stack([torch.stack(row, dim=3) for row in _two_ways(_output, grid)], dim=2)


def _output_tiles_grad(grad):
    """(n, H, W, K) -> (36, n, T, T, K): the transpose of `_output_tiles`."""
    grid = [[grad[:, i::4, j::4] for j in range(4)] for i in range(4)]
    return torch.stack([value for row in _two_ways(_output_grad, grid) for value in row])


# The three transforms along one side of a tile; written out, so that the compiler sees sums and no matrices.


def _input(v):
    a, b, c, d, e, f = v
    first = [4 * a - 5 * c + e, d + e - 4 * (b + c), 4 * (b - c) - d + e]
    return [*first, 2 * (d - b) - c + e, 2 * (b - d) - c + e, 4 * b - 5 * d + f]


def _output(v):
    a, b, c, d, e, f = v
    return [a + b + c + d + e, b - c + 2 * (d - e), b + c + 4 * (d + e), b - c + 8 * (d - e) + f]


def _output_grad(v):
    a, b, c, d = v
    return [a, a + b + c + d, a - b + c - d, a + 2 * b + 4 * c + 8 * d, a - 2 * b + 4 * c - 8 * d, d]
