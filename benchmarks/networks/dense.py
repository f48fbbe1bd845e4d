"""DenseNet, Huang et al. (2016)."""

import torch
from torch import nn


def convolution(channels, filters, kernel_size):
    """BatchNorm, ReLU and a convolution that keeps the size."""
    conv = nn.Conv2d(channels, filters, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv


class Dense(nn.Sequential):
    """x, and behind it `growth` new channels: a 1×1 convolution to 4·growth channels, then a 3×3."""

    def __init__(self, channels, growth):
        super().__init__(*convolution(channels, 4 * growth, 1), *convolution(4 * growth, growth, 3))

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class DenseNet(nn.Sequential):
    """DenseNet-121, for 3×224×224."""

    def __init__(self, classes=1000, blocks=(6, 12, 24, 16), growth=32):
        channels = 2 * growth
        layers = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]  # fmt: skip
        for i, depth in enumerate(blocks):
            if i:  # a transition: half the channels, half the size
                layers += [*convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(depth):
                layers.append(Dense(channels, growth))
                channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(channels, classes))
