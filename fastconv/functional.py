"""Convolution, pooling and BatchNorm with the signatures and semantics of torch.nn.functional."""

import math
import re

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _list_with_default

from . import _ops, activated, autograd
from ._arguments import (
    as_pair,
    has_kernel,
    is_channels_last,
    reread,
    string_padding,
    tf32_is_allowed,
    wants_channels_last,
    warn_fallback,
)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, algo=None, activation=None):
    """2D convolution (cross-correlation), as torch.nn.functional.conv2d.

    y[n, k, p, q] = bias[k] + Σ_{c, r, s} x[n, c, p·stride + r·dilation − padding, q·stride + …] · w[k, c, r, s]

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16, on the CPU or on CUDA.
        weight: (K, C / groups, R, S), of input's dtype and device.
        bias: (K,) or None.
        stride, padding, dilation: an int or a pair (H, W). padding may be 'valid' or, for stride 1, 'same'.
        groups: input and output channels are split into this many independent convolutions.
        algo: one of fastconv.algorithms(), for forward and backward; None lets the plan choose. All but "winograd"
            add up the products of the sum above; its largest error is up to four times theirs.
        activation: "relu" gives ReLU(y) in the same pass, or None.

    Returns:
        (N, K, P, Q) with P = floor((H + 2·padding − dilation·(R − 1) − 1) / stride) + 1, or (K, P, Q). It is
        channels_last if torch's is: if input or weight is.

    Raises:
        RuntimeError with torch's text for shapes, dtypes and parameters that torch refuses too.
        ValueError if `algo` is unknown or cannot do the problem, with the reason; or if `activation` is unknown.
    """
    if activation is not None:
        _check_activation(activation)
    if not has_kernel(input):
        if algo is not None:
            raise ValueError(f"algo={algo!r}: fastconv has no kernel for {input.dtype} on {input.device.type}")
        warn_fallback("conv2d", input)
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return y if activation is None else F.relu(y)
    cuda = input.is_cuda
    device = "cuda" if cuda else "cpu"
    try:
        if torch.is_autocast_enabled(device) and input.dtype is not torch.float64 and not input.is_meta:
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        unbatched = input.dim() == 3
        if unbatched:
            input = input.unsqueeze(0)
        if isinstance(padding, str):
            padding, input = string_padding(padding, input, weight, stride, dilation)
        channels_last = wants_channels_last(input, weight, cuda)
        allow_tf32 = cuda and input.dtype is torch.float32 and tf32_is_allowed()
        convolve = autograd.conv2d if activation is None else activated.conv2d_relu
        y = convolve(input, weight, bias, stride, padding, dilation, groups, channels_last, allow_tf32, algo)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        options = reread(F.conv2d, error, (input, weight, bias), (stride, padding, dilation, groups))
        y = conv2d(input, weight, bias, *options, algo=algo, activation=activation)
    return y.squeeze(0) if unbatched else y


def _check_activation(activation):
    if activation != "relu":
        raise ValueError(f"activation={activation!r}: expected 'relu' or None")


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, algo=None):
    """1D convolution (cross-correlation), as torch.nn.functional.conv1d: a conv2d of images one row high.

    Args:
        input: (N, C, L) or (C, L); float32, float64, float16 or bfloat16, on the CPU or on CUDA. A transposed view is
            copied first, as by torch.
        weight: (K, C / groups, S), of input's dtype and device.
        bias: (K,) or None.
        stride, padding, dilation: an int or a tuple of one. padding may be 'valid' or, for stride 1, 'same'.
        groups, algo: as in conv2d.

    Returns:
        (N, K, Q) with Q = floor((L + 2·padding − dilation·(S − 1) − 1) / stride) + 1, or (K, Q).

    Raises:
        RuntimeError with torch's text for shapes, dtypes and parameters that torch refuses too.
        ValueError if `algo` is unknown or cannot do the problem, with the reason.
    """
    if not has_kernel(input):
        if algo is not None:
            raise ValueError(f"algo={algo!r}: fastconv has no kernel for {input.dtype} on {input.device.type}")
        warn_fallback("conv1d", input)
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    if input.dim() not in (2, 3):
        size = list(input.shape)
        raise RuntimeError(f"Expected 2D (unbatched) or 3D (batched) input to conv1d, but got input of size: {size}")
    unbatched = input.dim() == 2
    if unbatched:
        input = input.unsqueeze(0)
    if weight.dim() < 3:
        raise RuntimeError("weight should have at least three dimensions")
    if weight.dim() > 3:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, "
            f"but got 3-dimensional input of size {list(input.shape)} instead"
        )
    stride, dilation = (1, _single("stride", stride)), (1, _single("dilation", dilation))
    if not isinstance(padding, str):
        padding = (0, _single("padding", padding))
    image = input.contiguous().unsqueeze(2)  # contiguous, so that a transposed view is not taken for channels_last
    try:
        y = conv2d(image, weight.unsqueeze(2), bias, stride, padding, dilation, groups, algo=algo).squeeze(2)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory
            raise
        raise RuntimeError(_without_rows(str(error))) from None
    return y.squeeze(0) if unbatched else y


def _single(name, value):
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) != 1:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 1 values to match the convolution dimensions, "
            f"but got {name}={list(values)}"
        )
    return values[0]


def _without_rows(text):
    """conv2d's error text in the sizes that conv1d's caller knows."""
    if text.startswith("Only zero batch"):  # torch says this one of its own image
        return text
    return re.sub(r"\(1 x (\d+)\)", r"(\1)", re.sub(r"\[(\d+), (\d+), 1, (\d+)\]", r"[\1, \2, \3]", text))


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """2D max pooling, as torch.nn.functional.max_pool2d.

    On ties the first maximum in row-major order wins, of NaNs the last, in every layout. For the backward pass the
    argmax is kept as an offset into its window, one byte each (two for windows of more than 256 elements).

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16, on the CPU or on CUDA.
        kernel_size, stride, padding, dilation: an int or a pair (H, W); stride defaults to kernel_size.
        ceil_mode: round the output size up instead of down.
        return_indices: also return the int64 indices h·W + w of the maxima, as MaxUnpool2d takes them.

    Returns:
        (N, C, P, Q) or (C, P, Q), or a pair of it and the indices; channels_last if input is.

    Raises:
        RuntimeError with torch's text for shapes and parameters that torch refuses too.
    """
    if not has_kernel(input):
        warn_fallback("max_pool2d", input)
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    unbatched = input.dim() == 3
    if unbatched:
        if input.numel() == 0:  # torch's own error, which shows the size
            return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        input = input.unsqueeze(0)
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel_size
    channels_last = input.dim() == 4 and is_channels_last(input)
    window = (kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    try:
        y, offsets = autograd.max_pool2d(input, *window, return_offsets=return_indices)
    except (RuntimeError, TypeError) as error:
        window = (*reread(F.max_pool2d, error, (input,), window[:4]), ceil_mode, channels_last)
        y, offsets = autograd.max_pool2d(input, *window, return_offsets=return_indices)
    if not return_indices:
        return y.squeeze(0) if unbatched else y
    indices = _ops.max_pool2d_indices(offsets, input.shape, *window)
    return (y.squeeze(0), indices.squeeze(0)) if unbatched else (y, indices)


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """2D average pooling, as torch.nn.functional.avg_pool2d.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16, on the CPU or on CUDA. Sums of the last
            two are float32.
        kernel_size, stride, padding: an int or a pair (H, W); stride defaults to kernel_size.
        ceil_mode: round the output size up instead of down.
        count_include_pad: divide by the number of elements in the window with those of the padding, or without.
        divisor_override: divide by this number instead.

    Returns:
        (N, C, P, Q) or (C, P, Q); channels_last if input is.

    Raises:
        RuntimeError, IndexError with torch's text for shapes and parameters that torch refuses too.
    """
    if not has_kernel(input):
        warn_fallback("avg_pool2d", input)
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if stride is None or (not isinstance(stride, int) and len(stride) == 0):
        stride = kernel_size
    if input.dim() not in (3, 4) or (input.dim() == 3 and 0 in input.shape):  # torch's own error
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, ())


def adaptive_avg_pool2d(input, output_size):
    """2D average pooling to a given size, as torch.nn.functional.adaptive_avg_pool2d.

    y[n, c, p, q] is the mean of rows floor(p·H / P) to ceil((p + 1)·H / P) − 1 of x, and of such columns. Of size 1 it
    is global average pooling (Lin et al., Network In Network, 2014).

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16, on the CPU or on CUDA.
        output_size: P = Q or a pair (P, Q); None is the size of input.

    Returns:
        (N, C, P, Q) or (C, P, Q); channels_last if input is.

    Raises:
        RuntimeError, ValueError, IndexError with torch's text for shapes and sizes that torch refuses too.
    """
    if not has_kernel(input):
        warn_fallback("adaptive_avg_pool2d", input)
        return F.adaptive_avg_pool2d(input, output_size)
    size = _list_with_default(output_size, input.shape)
    size = as_pair(size) if isinstance(size, int) else tuple(size)
    if input.dim() < 2 or (input.dim() == 3 and 0 in input.shape[1:] and size != (1, 1)):  # torch's own error
        return F.adaptive_avg_pool2d(input, output_size)
    if size == (1, 1) and input.dim() not in (3, 4):  # torch takes the mean, whatever is in front of the map
        planes = input.flatten(0, -3) if input.dim() > 2 else input.unsqueeze(0)
        return adaptive_avg_pool2d(planes, size).reshape(*input.shape[:-2], 1, 1)
    return _avg_pool2d(input, (), (), (), False, True, None, size)


def _avg_pool2d(input, *window):
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
    channels_last = input.dim() == 4 and is_channels_last(input)
    y = autograd.avg_pool2d(input, *window, channels_last)
    return y.squeeze(0) if unbatched else y


def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    activation=None,
    residual=None,
):
    """Batch normalization, as torch.nn.functional.batch_norm (Ioffe and Szegedy, 2015).

    y = (x − μ) / √(σ² + eps) · weight + bias, for each channel. In training μ and σ² (biased) are the batch's, merged
    from pieces by Chan's formula, and running = (1 − momentum)·running + momentum·batch, with the unbiased variance;
    otherwise they are the running ones.

    Args:
        input: (N, C) or (N, C, *); float32, float64, float16 or bfloat16, on the CPU or on CUDA.
        running_mean, running_var: (C,), or both None in training.
        weight, bias: (C,) or None; of input's dtype, or float32 for float16 and bfloat16 input.
        activation: "relu" gives ReLU(y) or ReLU(y + residual) in the same pass, or None.
        residual: a tensor that is added before the activation. Of another shape or dtype than input's, it is added by
            torch.

    Returns:
        a tensor of input's shape and dtype; channels_last if input is.

    Raises:
        ValueError, RuntimeError with torch's text, among them for training with one value per channel.
        ValueError if `activation` is unknown, or there is a residual without one.
    """
    if activation is not None:
        _check_activation(activation)
        alike = isinstance(residual, torch.Tensor) and residual.shape == input.shape and residual.dtype is input.dtype
        if not has_kernel(input) or not (residual is None or alike):
            y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
            return F.relu(y if residual is None else y + residual)
    elif residual is not None:
        raise ValueError("a residual is added before an activation: pass activation='relu' too")
    if not has_kernel(input):
        warn_fallback("batch_norm", input)
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.dim() < 2 or not isinstance(training, bool) or not isinstance(momentum, (float, int)):  # torch's own error
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if eps <= 0.0:  # versions of torch differ in what they refuse and how they say it: ask this one
        values = torch.ones(2, 1)
        F.batch_norm(values, values[0], values[0], training=training, eps=eps)
    channels_last = input.dim() in (4, 5) and is_channels_last(input)
    tensors = (weight, bias, running_mean, running_var)
    try:
        if training:
            if activation is not None:
                return activated.batch_norm_act_train(input, *tensors, residual, momentum, eps, channels_last)
            return autograd.batch_norm_train(input, *tensors, momentum, eps, channels_last)
        for name, statistics in (("running_mean", running_mean), ("running_var", running_var)):
            if statistics is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        if activation is not None:
            return activated.batch_norm_act_eval(input, *tensors, residual, eps, channels_last)
        return autograd.batch_norm_eval(input, *tensors, eps, channels_last)
    except (RuntimeError, AttributeError) as error:
        reread(F.batch_norm, error, (input, running_mean, running_var, weight, bias), ())
