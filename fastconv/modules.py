"""Layers: torch.nn's own classes with fastconv underneath.

Parameters, state_dict, repr, pickling, padding modes and 'same' padding are inherited; only the computation changes.
"""

from torch import nn
from torch.fx import Proxy

from . import functional
from .sync_batch_norm import SyncBatchNorm


def _padded(layer, input):
    """A convolution's input and what is left of its padding, which other modes than zeros have put in."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


def _recorded(layer, *inputs):
    """What torch.fx records of a layer: one call, as of torch.nn's, instead of what happens inside."""
    tracer = inputs[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, {})


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d on fastconv.conv1d."""

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv.conv2d."""

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvAct2d(Conv2d):
    """fastconv.Conv2d and the ReLU behind it in one pass: fastconv.conv2d(..., activation="relu").

    Arguments, parameters and shapes are Conv2d's.
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = _padded(self, input)
        return functional.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation="relu"
        )


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv.max_pool2d."""

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastconv.avg_pool2d."""

    def forward(self, input):
        if isinstance(input, Proxy):
            return _recorded(self, input)
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
        if isinstance(input, Proxy):
            return _recorded(self, input)
        return functional.adaptive_avg_pool2d(input, self.output_size)


class _BatchNorm:
    """forward() of torch.nn's BatchNorm layers on fastconv.batch_norm."""

    def forward(self, input):
        return self._normalize(input, None, None)

    def _normalize(self, input, activation, residual):
        if isinstance(input, Proxy):
            return _recorded(self, input, *(() if residual is None else (residual,)))
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
            activation=activation,
            residual=residual,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastconv.batch_norm."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastconv.batch_norm."""


class BatchNormAct2d(BatchNorm2d):
    """fastconv.BatchNorm2d with ReLU behind it, or a residual and ReLU, in one pass.

    forward(input, residual=None) is ReLU(BatchNorm2d(input) + residual); all are (N, C, H, W), of one dtype. Arguments,
    parameters and buffers are BatchNorm2d's. What it keeps for backward is input and, given a residual, its output.
    """

    def forward(self, input, residual=None):
        return self._normalize(input, "relu", residual)


# What fastconv.fuse makes of layers.


class AbsorbedReLU(nn.ReLU):
    """A ReLU that the layer in front of it computes already."""

    def forward(self, input):
        return input


class _Folded:
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        errors.append(f"{prefix[:-1]} is folded: call fastconv.unfuse before loading a state_dict")


class FoldedConv2d(_Folded, Conv2d):
    """A convolution with the BatchNorm behind it in its weights, for evaluation. The parameters stay as they were."""

    def _conv_forward(self, input, weight, bias):
        if self.training:
            raise RuntimeError("this convolution is folded for evaluation: call fastconv.unfuse before training")
        input, padding = _padded(self, input)
        config = self.stride, padding, self.dilation, self.groups
        return functional.conv2d(
            input, self.folded_weight, self.folded_bias, *config, activation="relu" if self.folded_relu else None
        )


class FoldedBatchNorm2d(_Folded, BatchNorm2d):
    """A BatchNorm that the convolution in front of it computes already, but for the residual."""

    def forward(self, input, residual=None):
        if isinstance(input, Proxy):
            return _recorded(self, input, *(() if residual is None else (residual,)))
        return input if residual is None else nn.functional.relu(input + residual)


# Layers that fastconv computes, or has computed already.
FUSED = (ConvAct2d, BatchNormAct2d, AbsorbedReLU, FoldedConv2d, FoldedBatchNorm2d)


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
