"""fastconv: hand-written convolution, max pooling and BatchNorm for PyTorch, on CUDA and on the CPU.

y = fastconv.conv2d(x, w, bias, stride=2, padding=1)    # torch.nn.functional's signatures
model = fastconv.convert(model)                         # swap a model's layers in place
print(fastconv.plan(x, w, padding=1))                   # which kernel, and why
"""

from . import _derivatives, _fake, _flops, _vmap, transforms  # noqa: F401  (they register themselves)
from .costs import cost, summary
from .functional import adaptive_avg_pool2d, avg_pool2d, batch_norm, conv1d, conv2d, max_pool2d
from .fusion import fuse, fusions, unfuse
from .modules import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNormAct2d,
    Conv1d,
    Conv2d,
    ConvAct2d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyConv1d,
    LazyConv2d,
    MaxPool2d,
)
from .planning import Plan, algorithms, plan
from .swap import convert, coverage, revert
from .sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm

__version__ = "0.1.0"

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "Conv1d",
    "Conv2d",
    "ConvAct2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyConv1d",
    "LazyConv2d",
    "MaxPool2d",
    "Plan",
    "SyncBatchNorm",
    "adaptive_avg_pool2d",
    "algorithms",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "convert",
    "convert_sync_batchnorm",
    "cost",
    "coverage",
    "fuse",
    "fusions",
    "max_pool2d",
    "plan",
    "revert",
    "summary",
    "unfuse",
]
