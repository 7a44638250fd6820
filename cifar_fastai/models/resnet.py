"""ResNet18 and ResNet34 for 32x32 images, after kuangliu's pytorch-cifar: a 3x3 stem and no max-pool.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, arXiv:1512.03385.
"""

import torch.nn.functional as F
from torch import nn

__all__ = ["BasicBlock", "ResNet", "resnet18", "resnet34"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, n_in, H, W) -> (B, n_out, H/stride, W/stride)."""

    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Images (B, 3, H, W), 32x32 as a rule -> logits (B, n_classes).

    `n_blocks`: blocks in each of the four stages, which have w, 2w, 4w and 8w channels, w = `width`.
    """

    def __init__(self, n_blocks, n_classes=10, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, n_blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, n_blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, n_blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, n_blocks[3], stride=2)
        self.linear = nn.Linear(8 * width, n_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 64, 32, 32), at width 64
        x = self.layer1(x)  # (B, 64, 32, 32)
        x = self.layer2(x)  # (B, 128, 16, 16)
        x = self.layer3(x)  # (B, 256, 8, 8)
        x = self.layer4(x)  # (B, 512, 4, 4)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, 512)
        return self.linear(x)


def _stage(n_in, n_out, n_blocks, stride):
    first = BasicBlock(n_in, n_out, stride)
    return nn.Sequential(first, *(BasicBlock(n_out, n_out) for _ in range(n_blocks - 1)))


def resnet18(n_classes=10, width=64):
    """ResNet18: 11,173,962 parameters for ten classes; 0.7 million at width 16."""
    return ResNet((2, 2, 2, 2), n_classes, width)


def resnet34(n_classes=10, width=64):
    """ResNet34, 21,282,122 parameters for ten classes."""
    return ResNet((3, 4, 6, 3), n_classes, width)
