"""The networks of the lectures, in torch.nn's own layers, one family a file.

    model = networks.NETWORKS["ResNet-50"].build(classes=10)

Each is as in its paper, and without what only training adds: auxiliary classifiers, drop-path.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from .dense import DenseNet
from .fractal import FractalNet
from .inception import GoogLeNet, Inception, NaiveInception
from .mobile import MobileNet, ShuffleNet, SqueezeNet
from .residual import ResNet
from .sequential import NIN, VGG, AlexNet, LeNet5, LeNet1998, ZFNet

__all__ = [
    "NETWORKS", "NIN", "VGG", "AlexNet", "DenseNet", "FractalNet", "GoogLeNet", "Inception", "LeNet5", "LeNet1998",
    "MobileNet", "NaiveInception", "Network", "ResNet", "ShuffleNet", "SqueezeNet", "ZFNet",
]  # fmt: skip


@dataclass(frozen=True)
class Network:
    """build(classes=…) makes it, with as many classes as its paper has unless told otherwise; `size` is C, H, W."""

    build: Callable[..., nn.Module]
    size: tuple[int, int, int] = (3, 224, 224)


NETWORKS = {
    "LeNet-5": Network(LeNet5, (1, 28, 28)),
    "AlexNet": Network(AlexNet, (3, 227, 227)),
    "ZFNet": Network(ZFNet),
    "VGG-13": Network(partial(VGG, 13)),
    "VGG-16": Network(partial(VGG, 16)),
    "VGG-19": Network(partial(VGG, 19)),
    "NIN": Network(NIN, (3, 32, 32)),
    "GoogLeNet": Network(GoogLeNet),
    "ResNet-18": Network(partial(ResNet, 18)),
    "ResNet-34": Network(partial(ResNet, 34)),
    "ResNet-50": Network(partial(ResNet, 50)),
    "ResNet-101": Network(partial(ResNet, 101)),
    "ResNet-152": Network(partial(ResNet, 152)),
    "WideResNet-50-2": Network(partial(ResNet, 50, width=128)),
    "ResNeXt-50": Network(partial(ResNet, 50, width=4, groups=32)),
    "DenseNet-121": Network(DenseNet),
    "SqueezeNet 1.1": Network(SqueezeNet),
    "MobileNet": Network(MobileNet),
    "ShuffleNet v2": Network(ShuffleNet),
    "FractalNet": Network(FractalNet, (3, 32, 32)),
}
