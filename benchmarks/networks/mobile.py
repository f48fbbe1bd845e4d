"""Small networks: SqueezeNet, MobileNet, ShuffleNet."""

import torch
from torch import nn


class Fire(nn.Module):
    """Squeezes by a 1×1 convolution, expands by a 1×1 and a 3×3 side by side."""

    def __init__(self, channels, squeezed, expanded):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, squeezed, 1), nn.ReLU(inplace=True))
        self.expand1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze(x)
        return self.relu(torch.cat([self.expand1(x), self.expand3(x)], 1))


class SqueezeNet(nn.Sequential):
    """SqueezeNet 1.1, Iandola et al. (2016), for 3×224×224."""

    def __init__(self, classes=1000):
        def pool():
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        super().__init__(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True), pool(),
            Fire(64, 16, 64), Fire(128, 16, 64), pool(),
            Fire(128, 32, 128), Fire(256, 32, 128), pool(),
            Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
            nn.Dropout(), nn.Conv2d(512, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def convolution(channels, filters, kernel_size, stride=1, groups=1, relu=True):
    """A convolution that keeps the size but for its stride, BatchNorm and, unless told otherwise, ReLU."""
    conv = nn.Conv2d(channels, filters, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(filters), *((nn.ReLU(inplace=True),) if relu else ())


class MobileNet(nn.Sequential):
    """MobileNet v1, Howard et al. (2017), for 3×224×224: depthwise separable convolutions."""

    FILTERS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDED = (1, 3, 5, 11)

    def __init__(self, classes=1000):
        layers, channels = [*convolution(3, 32, 3, 2)], 32
        for i, filters in enumerate(self.FILTERS):
            layers += convolution(channels, channels, 3, 2 if i in self.STRIDED else 1, groups=channels)
            layers += convolution(channels, filters, 1)
            channels = filters
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Shuffle(nn.Module):
    """One half of the channels goes through `body`, the other past it, or through `shortcut` where the size is halved;
    then the two are interleaved."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        half = filters // 2
        inner = channels if stride == 2 else half
        self.body = nn.Sequential(
            *convolution(inner, half, 1),
            *convolution(half, half, 3, stride, groups=half, relu=False),
            *convolution(half, half, 1),
        )
        self.shortcut = None
        if stride == 2:
            depthwise = convolution(channels, channels, 3, stride, groups=channels, relu=False)
            self.shortcut = nn.Sequential(*depthwise, *convolution(channels, half, 1))

    def forward(self, x):
        if self.shortcut is None:
            kept, changed = x.chunk(2, 1)
        else:
            kept, changed = self.shortcut(x), x
        return torch.stack([kept, self.body(changed)], 2).flatten(1, 2)


class ShuffleNet(nn.Sequential):
    """ShuffleNet v2 ×1.0, Ma et al. (2018), for 3×224×224."""

    def __init__(self, classes=1000):
        layers, channels = [*convolution(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)], 24
        for filters, units in ((116, 4), (232, 8), (464, 4)):
            layers += [Shuffle(channels if i == 0 else filters, filters, 2 if i == 0 else 1) for i in range(units)]
            channels = filters
        layers += [*convolution(channels, 1024, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(1024, classes))
