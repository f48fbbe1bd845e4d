"""ResNet, He et al. (2015), and what widened it: Wide ResNet, ResNeXt."""

from torch import nn


def convolution(channels, filters, kernel_size, stride=1, groups=1):
    """A convolution that keeps the size but for its stride, and BatchNorm."""
    return (
        nn.Conv2d(channels, filters, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(filters),
    )


class Residual(nn.Module):
    """y = ReLU(x + body(x)); a 1×1 convolution takes the place of x where sizes change."""

    def __init__(self, body, channels, filters, stride):
        super().__init__()
        self.body = nn.Sequential(*body)
        resized = stride != 1 or channels != filters
        self.shortcut = nn.Sequential(*convolution(channels, filters, 1, stride) if resized else ())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.shortcut(x) + self.body(x))


def basic(channels, filters, stride):
    """Two 3×3 convolutions."""
    body = (
        *convolution(channels, filters, 3, stride), nn.ReLU(inplace=True),
        *convolution(filters, filters, 3),
    )  # fmt: skip
    return Residual(body, channels, filters, stride)


def bottleneck(channels, inner, filters, stride, groups):
    """1×1 to fewer channels, 3×3, 1×1 to more. The stride is in the 3×3, as in ResNeXt and in most libraries; the first
    paper has it in the first 1×1."""
    body = (
        *convolution(channels, inner, 1), nn.ReLU(inplace=True),
        *convolution(inner, inner, 3, stride, groups), nn.ReLU(inplace=True),
        *convolution(inner, filters, 1),
    )  # fmt: skip
    return Residual(body, channels, filters, stride)


class ResNet(nn.Sequential):
    """For 3×224×224.

    depth: 18 or 34, of basic blocks; 50, 101 or 152, of bottlenecks.
    channels: of the stem and of the first basic block; a bottleneck gives four times as many.
    width: of a group's 3×3 convolution in the first bottleneck. Wide ResNet-50-2 (Zagoruyko and Komodakis, 2016) has
        128; ResNeXt-50 32×4d (Xie et al., 2016) has 32 groups of 4.
    """

    BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

    def __init__(self, depth, classes=1000, channels=64, width=64, groups=1):
        layers = [*convolution(3, channels, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        filters = channels if depth < 50 else 4 * channels
        for stage, blocks in enumerate(self.BLOCKS[depth]):
            for i in range(blocks):
                stride = 2 if stage and i == 0 else 1
                if depth < 50:
                    layers.append(basic(channels, filters, stride))
                else:
                    layers.append(bottleneck(channels, width * groups, filters, stride, groups))
                channels = filters
            filters, width = 2 * filters, 2 * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
