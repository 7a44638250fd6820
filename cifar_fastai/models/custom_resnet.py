"""The custom ResNet of the one-cycle assignment, after David Page's ResNet9 (cifar10-fast)."""

from torch import nn

__all__ = ["CustomResNet", "custom_resnet"]


class Residual(nn.Module):
    """x + f(x), f two times (conv 3x3, BN, ReLU): (B, n, H, W) -> (B, n, H, W)."""

    def __init__(self, n):
        super().__init__()
        self.block = nn.Sequential(*_conv_bn_relu(n, n), *_conv_bn_relu(n, n))

    def forward(self, x):
        return x + self.block(x)


class CustomResNet(nn.Module):
    """Images (B, 3, 32, 32) -> logits (B, n_classes); the stages have w, 2w, 4w and 8w channels, w = `width`."""

    def __init__(self, n_classes=10, width=64):
        super().__init__()
        self.prep = nn.Sequential(*_conv_bn_relu(3, width))
        self.layer1 = nn.Sequential(*_conv_pool(width, 2 * width), Residual(2 * width))
        self.layer2 = nn.Sequential(*_conv_pool(2 * width, 4 * width))
        self.layer3 = nn.Sequential(*_conv_pool(4 * width, 8 * width), Residual(8 * width))
        self.pool = nn.MaxPool2d(4)
        self.linear = nn.Linear(8 * width, n_classes)

    def forward(self, x):
        x = self.prep(x)  # (B, 64, 32, 32), at width 64
        x = self.layer1(x)  # (B, 128, 16, 16)
        x = self.layer2(x)  # (B, 256, 8, 8)
        x = self.layer3(x)  # (B, 512, 4, 4)
        x = self.pool(x).flatten(1)  # (B, 512)
        return self.linear(x)


def _conv_bn_relu(n_in, n_out):
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()


def _conv_pool(n_in, n_out):
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(n_out), nn.ReLU()


def custom_resnet(n_classes=10, width=64):
    """The custom ResNet: 6,573,130 parameters for ten classes."""
    return CustomResNet(n_classes, width)
