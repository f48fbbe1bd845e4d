"""Networks without branches: LeNet-5, AlexNet, ZFNet, VGG, Network in Network."""

import torch
from torch import nn


class LeNet5(nn.Sequential):
    """LeNet-5 as the lectures draw it, for 1×28×28."""

    def __init__(self, classes=10):
        super().__init__(
            nn.Conv2d(1, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(50 * 7 * 7, 500), nn.ReLU(), nn.Linear(500, classes),
        )  # fmt: skip


class PartialConv2d(nn.Module):
    """Convolution by K filters, the k-th of which sees the channels tables[k] alone."""

    def __init__(self, tables, kernel_size):
        super().__init__()
        self.tables = tables
        self.filters = nn.ModuleList(nn.Conv2d(len(channels), 1, kernel_size) for channels in tables)

    def forward(self, x):
        return torch.cat([conv(x[:, channels]) for conv, channels in zip(self.filters, self.tables, strict=True)], 1)


class LeNet1998(nn.Sequential):
    """LeCun et al. (1998), for 1×32×32: C3 sees some maps of S2 only, and a subsampling layer multiplies each average
    by a coefficient and adds a bias. The paper's last layer measures distances to fixed codes; here it is linear."""

    C3 = (
        *([(i + j) % 6 for j in range(3)] for i in range(6)),
        *([(i + j) % 6 for j in range(4)] for i in range(6)),
        *([(i + j) % 6 for j in (0, 1, 3, 4)] for i in range(3)),
        list(range(6)),
    )

    def __init__(self, classes=10):
        super().__init__(
            nn.Conv2d(1, 6, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 6, 1, groups=6), nn.Sigmoid(),
            PartialConv2d(self.C3, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 1, groups=16), nn.Sigmoid(),
            nn.Conv2d(16, 120, 5), nn.Sigmoid(), nn.Flatten(),
            nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, classes, bias=False),
        )  # fmt: skip


class AlexNet(nn.Sequential):
    """Krizhevsky et al. (2012) as the lectures print it, for 3×227×227. groups=2 is the paper's, on two GPUs.

    width: of the two hidden fully connected layers, here and in the next ones.
    """

    def __init__(self, classes=1000, groups=1, width=4096):
        super().__init__(
            nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5, k=2.0),
            nn.Conv2d(96, 256, 5, padding=2, groups=groups), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.LocalResponseNorm(5, k=2.0),
            nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1, groups=groups), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1, groups=groups), nn.ReLU(), nn.MaxPool2d(3, 2),
            *classifier(256 * 6 * 6, width, classes),
        )  # fmt: skip


class ZFNet(nn.Sequential):
    """Zeiler and Fergus (2013), for 3×224×224. filters: of the last three convolutions, here those of the larger model
    that the lectures name; (384, 384, 256) are those of the paper's figure."""

    def __init__(self, classes=1000, filters=(512, 1024, 512), width=4096):
        super().__init__(
            nn.Conv2d(3, 96, 7, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5),
            nn.Conv2d(96, 256, 5, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5),
            nn.Conv2d(256, filters[0], 3, padding=1), nn.ReLU(),
            nn.Conv2d(filters[0], filters[1], 3, padding=1), nn.ReLU(),
            nn.Conv2d(filters[1], filters[2], 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
            *classifier(filters[2] * 6 * 6, width, classes),
        )  # fmt: skip


class VGG(nn.Sequential):
    """Simonyan and Zisserman (2014), for images of 32·size². The lectures' "VGG13" has 13 convolutions: depth 16."""

    BLOCKS = {13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

    def __init__(self, depth=16, classes=1000, batch_norm=False, size=7, width=4096):
        layers, channels = [], 3
        for filters, convolutions in zip((64, 128, 256, 512, 512), self.BLOCKS[depth], strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, filters, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(filters))
                layers.append(nn.ReLU(inplace=True))
                channels = filters
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, *classifier(channels * size * size, width, classes))


def classifier(channels, width, classes):
    """Three fully connected layers, with dropout."""
    return (
        nn.Flatten(), nn.Dropout(), nn.Linear(channels, width), nn.ReLU(),
        nn.Dropout(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes),
    )  # fmt: skip


class NIN(nn.Sequential):
    """Network in Network, Lin et al. (2013), for CIFAR-10: each convolution is followed by an MLP at each pixel."""

    def __init__(self, classes=10):
        super().__init__(
            *mlpconv(3, (192, 160, 96), 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(),
            *mlpconv(96, (192, 192, 192), 5), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(),
            *mlpconv(192, (192, 192, classes), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def mlpconv(channels, filters, kernel_size):
    """A convolution and two 1×1 convolutions."""
    first, second, third = filters
    return (
        nn.Conv2d(channels, first, kernel_size, padding=kernel_size // 2), nn.ReLU(),
        nn.Conv2d(first, second, 1), nn.ReLU(), nn.Conv2d(second, third, 1), nn.ReLU(),
    )  # fmt: skip
