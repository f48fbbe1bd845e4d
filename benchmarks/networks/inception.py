"""GoogLeNet and its modules, Szegedy et al. (2014)."""

import torch
from torch import nn


def convolution(channels, filters, kernel_size, stride=1):
    """A convolution that keeps the size but for its stride, and ReLU."""
    conv = nn.Conv2d(channels, filters, kernel_size, stride, padding=kernel_size // 2)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


class Branches(nn.ModuleList):
    """Each branch's result of the same input, one after the other along the channels."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


class NaiveInception(Branches):
    """1×1, 3×3 and 5×5 convolutions and a max pool, side by side."""

    def __init__(self, channels, f1, f3, f5):
        super().__init__([
            convolution(channels, f1, 1), convolution(channels, f3, 3), convolution(channels, f5, 5),
            nn.MaxPool2d(3, 1, 1),
        ])  # fmt: skip


class Inception(Branches):
    """The same with bottlenecks: r3 and r5 1×1 filters before the larger convolutions, `pool` after the pool."""

    def __init__(self, channels, f1, r3, f3, r5, f5, pool):
        super().__init__([
            convolution(channels, f1, 1),
            nn.Sequential(convolution(channels, r3, 1), convolution(r3, f3, 3)),
            nn.Sequential(convolution(channels, r5, 1), convolution(r5, f5, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), convolution(channels, pool, 1)),
        ])  # fmt: skip


class GoogLeNet(nn.Sequential):
    """For 3×224×224. Without the two auxiliary classifiers. ceil_mode: whether pools round sizes up, to 56, 28, 14 and
    7, as in the paper."""

    MODULES = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )  # fmt: skip

    def __init__(self, classes=1000, ceil_mode=True):
        def pool():
            return nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)

        layers = [
            convolution(3, 64, 7, stride=2), pool(), nn.LocalResponseNorm(5),
            convolution(64, 64, 1), convolution(64, 192, 3), nn.LocalResponseNorm(5), pool(),
        ]  # fmt: skip
        channels = 192
        for i, stage in enumerate(self.MODULES):
            if i:
                layers.append(pool())
            for filters in stage:
                layers.append(Inception(channels, *filters))
                f1, _, f3, _, f5, projected = filters
                channels = f1 + f3 + f5 + projected
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(channels, classes)
        super().__init__(*layers, *head)
