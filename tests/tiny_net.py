"""A network that trains in a moment."""

from torch import nn


class TinyNet(nn.Module):
    """A network of 200 weights whose children are called as ResNet's: (B, 3, H, W) -> (B, n_classes)."""

    def __init__(self, n_classes=3, width=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.linear = nn.Linear(4, n_classes)

    def forward(self, x):
        return self.linear(self.layer1(self.bn1(self.conv1(x))).mean((2, 3)))
