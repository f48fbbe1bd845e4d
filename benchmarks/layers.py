"""The frozen list of layers that every figure of fastconv is measured over.

A layer's call takes the module that computes it: fastconv or torch.nn.functional, whose signatures agree. Padding,
stride and kernel are the same in both directions. A row such as "vgg.conv6, 7" stands for layers of equal sizes.
"""

import re
from dataclasses import dataclass

DENSE, ONE_BY_ONE, STEM, GROUPED, POOL, BATCH_NORM = GROUPS = (
    "dense",
    "1×1",
    "stem",
    "depthwise/grouped",
    "pool",
    "BN",
)
FORWARD, BACKWARD = PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Layer:
    """What convolutions, pools and BatchNorms share. `batches` are N on a CPU and N on a GPU."""

    name: str
    batches: tuple[int, int]

    def batch(self, device):
        return self.batches[device != "cpu"]


@dataclass(frozen=True)
class Conv(Layer):
    """Convolution of C×H×H by K filters of (C/groups)×R×R, with a bias."""

    C: int
    H: int
    K: int
    R: int
    stride: int
    pad: int
    groups: int
    group: str

    @property
    def P(self):
        return (self.H - self.R + 2 * self.pad) // self.stride + 1

    def x_size(self, batch):
        return (batch, self.C, self.H, self.H)

    def y_size(self, batch):
        return (batch, self.K, self.P, self.P)

    def parameter_sizes(self):
        return [(self.K, self.C // self.groups, self.R, self.R), (self.K,)]

    def buffer_sizes(self):
        return []

    def __call__(self, ops, x, weight, bias):
        return ops.conv2d(x, weight, bias, self.stride, self.pad, 1, self.groups)

    def multiply_adds(self, batch):
        return batch * self.K * self.P**2 * (self.C // self.groups) * self.R**2

    def flops(self, direction, batch):
        """2 a multiply-add; backward computes two products of forward's size."""
        return 2 * self.multiply_adds(batch) * (1 if direction == FORWARD else 2)

    def least_bytes(self, direction, batch, element):
        x, w, y = batch * self.C * self.H**2, self.K * (self.C // self.groups) * self.R**2, batch * self.K * self.P**2
        return element * (x + w + y if direction == FORWARD else 2 * x + 2 * w + y)

    def terms(self, batch):
        """How many products are summed into one element of y, dx, dw and dbias."""
        return {
            "y": self.C // self.groups * self.R**2,
            "dx": self.K // self.groups * self.R**2,
            "dw": batch * self.P**2,
            "dbias": batch * self.P**2,
        }

    @property
    def unit(self):
        return "GB/s" if self.groups == self.C and self.groups > 1 else "GFLOP/s"


@dataclass(frozen=True)
class Pool(Layer):
    """Max pooling of C×H×H by windows of R×R."""

    C: int
    H: int
    R: int
    stride: int
    pad: int
    group: str = POOL
    unit: str = "GB/s"

    @property
    def P(self):
        return (self.H - self.R + 2 * self.pad) // self.stride + 1

    def x_size(self, batch):
        return (batch, self.C, self.H, self.H)

    def y_size(self, batch):
        return (batch, self.C, self.P, self.P)

    def parameter_sizes(self):
        return []

    def buffer_sizes(self):
        return []

    def __call__(self, ops, x):
        return ops.max_pool2d(x, self.R, self.stride, self.pad)

    def flops(self, direction, batch):
        return 0

    def least_bytes(self, direction, batch, element):
        """x, y and one byte of argmax for each element of y; the same for their gradients."""
        x, y = batch * self.C * self.H**2, batch * self.C * self.P**2
        return element * (x + y) + y

    def terms(self, batch):
        return {"y": 0, "dx": (-(-self.R // self.stride)) ** 2}


@dataclass(frozen=True)
class BatchNorm(Layer):
    """BatchNorm in training over N×C×H×H, or over N×C where H is 0."""

    C: int
    H: int
    group: str = BATCH_NORM
    unit: str = "GB/s"

    def x_size(self, batch):
        return (batch, self.C, self.H, self.H) if self.H else (batch, self.C)

    y_size = x_size

    def parameter_sizes(self):
        return [(self.C,), (self.C,)]

    def buffer_sizes(self):
        return [(self.C,), (self.C,)]

    def __call__(self, ops, x, weight, bias, running_mean, running_var):
        return ops.batch_norm(x, running_mean, running_var, weight, bias, True)

    def flops(self, direction, batch):
        return 0

    def least_bytes(self, direction, batch, element):
        """Reads x and writes y; reads x and dy and writes dx."""
        return element * batch * self.C * max(1, self.H) ** 2 * (2 if direction == FORWARD else 3)

    def terms(self, batch):
        return dict.fromkeys(("y", "dx", "dw", "dbias"), batch * max(1, self.H) ** 2)


# fmt: off
LAYERS = (
    #    name                        N cpu, gpu   C    H    K     R   stride pad groups group
    Conv("lenet.conv1",              (32, 1024),  1,   28,  20,   5,  1,     2,  1,     STEM),
    Conv("lenet.conv2",              (32, 1024),  20,  14,  50,   5,  1,     2,  1,     DENSE),
    Conv("alexnet.conv1",            (4, 256),    3,   227, 96,   11, 4,     0,  1,     STEM),
    Conv("alexnet.conv2",            (4, 256),    96,  27,  256,  5,  1,     2,  1,     DENSE),
    Conv("alexnet.conv3",            (4, 256),    256, 13,  384,  3,  1,     1,  1,     DENSE),
    Conv("alexnet.conv4",            (4, 256),    384, 13,  384,  3,  1,     1,  1,     DENSE),
    Conv("alexnet.conv5",            (4, 256),    384, 13,  256,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv1",                (1, 64),     3,   224, 64,   3,  1,     1,  1,     STEM),
    Conv("vgg.conv2",                (1, 64),     64,  224, 64,   3,  1,     1,  1,     DENSE),
    Conv("vgg.conv3",                (1, 64),     64,  112, 128,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv4",                (1, 64),     128, 112, 128,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv5",                (1, 64),     128, 56,  256,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv6, 7",             (1, 64),     256, 56,  256,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv8",                (1, 64),     256, 28,  512,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv9, 10",            (1, 64),     512, 28,  512,  3,  1,     1,  1,     DENSE),
    Conv("vgg.conv11–13",            (1, 64),     512, 14,  512,  3,  1,     1,  1,     DENSE),
    Conv("inception.1x1",            (4, 256),    256, 28,  128,  1,  1,     0,  1,     ONE_BY_ONE),
    Conv("inception.reduce",         (4, 256),    256, 28,  64,   1,  1,     0,  1,     ONE_BY_ONE),
    Conv("inception.3x3",            (4, 256),    256, 28,  192,  3,  1,     1,  1,     DENSE),
    Conv("inception.5x5",            (4, 256),    256, 28,  96,   5,  1,     2,  1,     DENSE),
    Conv("inception.3x3.bottleneck", (4, 256),    64,  28,  192,  3,  1,     1,  1,     DENSE),
    Conv("inception.5x5.bottleneck", (4, 256),    64,  28,  96,   5,  1,     2,  1,     DENSE),
    Conv("resnet.stem",              (4, 256),    3,   224, 64,   7,  2,     3,  1,     STEM),
    Conv("resnet.expand56",          (4, 256),    64,  56,  256,  1,  1,     0,  1,     ONE_BY_ONE),
    Conv("resnet.reduce56",          (4, 256),    256, 56,  64,   1,  1,     0,  1,     ONE_BY_ONE),
    Conv("resnet.project56",         (4, 256),    256, 56,  512,  1,  2,     0,  1,     ONE_BY_ONE),
    Conv("resnet.expand7",           (4, 256),    512, 7,   2048, 1,  1,     0,  1,     ONE_BY_ONE),
    Conv("resnet.3x3.56",            (4, 256),    64,  56,  64,   3,  1,     1,  1,     DENSE),
    Conv("resnet.3x3.56s2",          (4, 256),    128, 56,  128,  3,  2,     1,  1,     DENSE),
    Conv("resnet.3x3.28",            (4, 256),    128, 28,  128,  3,  1,     1,  1,     DENSE),
    Conv("resnet.3x3.14",            (4, 256),    256, 14,  256,  3,  1,     1,  1,     DENSE),
    Conv("resnet.3x3.7",             (4, 256),    512, 7,   512,  3,  1,     1,  1,     DENSE),
    Conv("mobilenet.dw112",          (4, 256),    32,  112, 32,   3,  1,     1,  32,    GROUPED),
    Conv("mobilenet.dw56",           (4, 256),    128, 56,  128,  3,  1,     1,  128,   GROUPED),
    Conv("mobilenet.dw56s2",         (4, 256),    128, 56,  128,  3,  2,     1,  128,   GROUPED),
    Conv("mobilenet.dw14",           (4, 256),    512, 14,  512,  3,  1,     1,  512,   GROUPED),
    Conv("resnext.56",               (4, 256),    128, 56,  128,  3,  1,     1,  32,    GROUPED),
    Conv("resnext.28",               (4, 256),    256, 28,  256,  3,  1,     1,  32,    GROUPED),
    Conv("resnext.14",               (4, 256),    512, 14,  512,  3,  1,     1,  32,    GROUPED),
    #    name            N cpu, gpu  C     H   R  stride pad
    Pool("lenet.pool",   (32, 1024), 20,   28,  2, 2,    0),
    Pool("vgg.pool",     (1, 64),    64,   224, 2, 2,    0),
    Pool("alexnet.pool", (4, 256),   96,   55,  3, 2,    0),
    Pool("resnet.pool",  (8, 256),   64,   112, 3, 2,    1),
    #         name               N cpu, gpu  C     H
    BatchNorm("bn.64x112",       (8, 256),   64,   112),
    BatchNorm("bn.256x56",       (4, 256),   256,  56),
    BatchNorm("bn.512x28",       (4, 256),   512,  28),
    BatchNorm("bn.2048x7",       (16, 256),  2048, 7),
    BatchNorm("bn.fc4096",       (256, 256), 4096, 0),
)
# fmt: on

QUICK = (
    "lenet.conv1",
    "lenet.conv2",
    "alexnet.conv3",
    "inception.1x1",
    "resnet.stem",
    "resnet.reduce56",
    "resnet.3x3.28",
    "mobilenet.dw56",
    "resnext.28",
    "lenet.pool",
    "resnet.pool",
    "bn.512x28",
    "bn.fc4096",
)


def select(text="", quick=False):
    """The layers, of all or of the quick selection, where a word of the name or the group begins with `text`."""

    def plain(name):
        return name.lower().replace("×", "x").replace("–", "-")

    begins = re.compile(rf"\b{re.escape(plain(text))}")
    return [
        layer
        for layer in LAYERS
        if (not quick or layer.name in QUICK) and begins.search(f"{plain(layer.name)} {plain(layer.group)}")
    ]


def layouts(layer, asked):
    """The memory layouts to measure a layer in, of "nchw", "nhwc" or "both"; a matrix N×C has but one."""
    if len(layer.x_size(1)) == 2:
        return ["NC"]
    return ["NCHW", "NHWC"] if asked == "both" else [asked.upper()]
