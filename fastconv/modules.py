"""Layers: torch.nn's own classes with fastconv underneath.

Parameters, state_dict, repr, pickling, padding modes and 'same' padding are inherited; only the computation changes.
"""

from torch import nn

from . import functional
from .sync_batch_norm import SyncBatchNorm


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastconv.conv2d."""

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastconv.max_pool2d."""

    def forward(self, input):
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastconv.batch_norm."""

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


SWAPS = {nn.Conv2d: Conv2d, nn.MaxPool2d: MaxPool2d, nn.BatchNorm2d: BatchNorm2d, nn.SyncBatchNorm: SyncBatchNorm}
