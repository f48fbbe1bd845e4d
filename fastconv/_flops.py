"""FLOPs of the convolutions for torch.utils.flop_counter, counted as torch counts its own.

That is two for each product, padding included. Of a grouped convolution torch takes wgrad for one over all pairs of
channels, `groups` times what is computed, and so it is here. Pooling and BatchNorm count nothing.
"""

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula


@register_flop_formula(torch.ops.fastconv.conv2d_fprop)
def conv2d_fprop(x_size, w_size, *config, out_shape):
    return conv_flop_count(x_size, w_size, out_shape)


@register_flop_formula(torch.ops.fastconv.conv2d_dgrad)
def conv2d_dgrad(dy_size, w_size, x_size, *config, out_shape):
    return conv_flop_count(dy_size, w_size, x_size, transposed=True)


@register_flop_formula(torch.ops.fastconv.conv2d_wgrad)
def conv2d_wgrad(dy_size, x_size, w_size, *config, out_shape):
    """A convolution of x with dy, where channels take the place of the batch."""

    def swapped(size):
        return [size[1], size[0], *size[2:]]

    return conv_flop_count(swapped(x_size), swapped(dy_size), swapped(w_size))
