"""Layers: torch.nn's own classes with fastconv underneath.

Parameters, state_dict, repr, pickling, padding modes and 'same' padding are inherited; only the computation changes.
"""

from torch import nn

from . import functional
from .sync_batch_norm import SyncBatchNorm


def _padded(layer, input):
    """A convolution's input and what is left of its padding, which other modes than zeros have put in."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d on fastconv.conv1d."""

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv.conv2d."""

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv.max_pool2d."""

    def forward(self, input):
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastconv.avg_pool2d."""

    def forward(self, input):
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on fastconv.adaptive_avg_pool2d."""

    def forward(self, input):
        return functional.adaptive_avg_pool2d(input, self.output_size)


class _BatchNorm:
    """forward() of torch.nn's BatchNorm layers on fastconv.batch_norm."""

    def forward(self, input):
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        track = not self.training or self.track_running_stats
        return functional.batch_norm(
            input,
            self.running_mean if track else None,
            self.running_var if track else None,
            self.weight,
            self.bias,
            use_batch_statistics,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastconv.batch_norm."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastconv.batch_norm."""


# Lazy layers learn their number of channels from the first input, and then are of the class named here.


class LazyConv1d(nn.LazyConv1d):
    """torch.nn.LazyConv1d that becomes a fastconv.Conv1d."""

    cls_to_become = Conv1d


class LazyConv2d(nn.LazyConv2d):
    """torch.nn.LazyConv2d that becomes a fastconv.Conv2d."""

    cls_to_become = Conv2d


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """torch.nn.LazyBatchNorm1d that becomes a fastconv.BatchNorm1d."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """torch.nn.LazyBatchNorm2d that becomes a fastconv.BatchNorm2d."""

    cls_to_become = BatchNorm2d


_LAYERS = (
    Conv1d,
    Conv2d,
    MaxPool2d,
    AvgPool2d,
    AdaptiveAvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    LazyConv1d,
    LazyConv2d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    SyncBatchNorm,
)
SWAPS = {getattr(nn, layer.__name__): layer for layer in _LAYERS}
