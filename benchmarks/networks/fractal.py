"""FractalNet, Larsson et al. (2016)."""

import torch
from torch import nn


class Fractal(nn.Module):
    """f₁ is a convolution; f_C is one beside f_{C−1} ∘ f_{C−1}. Columns that end together are joined by their mean."""

    def __init__(self, channels, filters, columns):
        super().__init__()
        self.short = nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)
        )
        self.halves = nn.ModuleList()
        if columns > 1:
            self.halves += [Fractal(channels, filters, columns - 1), Fractal(filters, filters, columns - 1)]

    def ends(self, x):
        """What the columns give, before they are joined."""
        ends = [self.short(x)]
        if self.halves:
            first, second = self.halves
            ends += second.ends(first(x))
        return ends

    def forward(self, x):
        return torch.stack(self.ends(x)).mean(0)


class FractalNet(nn.Sequential):
    """The one of 4 columns and depth 40 among the paper's for CIFAR-100, for 3×32×32."""

    def __init__(self, classes=100, filters=(16, 32, 64, 128, 128), columns=4):
        layers = []
        for channels, out in zip((3, *filters), filters, strict=False):
            layers += [Fractal(channels, out, columns), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(filters[-1], classes))
