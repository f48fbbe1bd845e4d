"""Fake kernels: the shapes, dtypes and strides of each op's results, for meta tensors and for torch.compile."""

import torch
import torch.nn.functional as F


def _empty(like, size, channels_last, dtype=None):
    memory_format = torch.channels_last if channels_last and len(size) == 4 else torch.contiguous_format
    if channels_last and len(size) == 5:
        memory_format = torch.channels_last_3d
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def _check_devices(x, *others):
    """A call with tensors on the meta device and elsewhere comes here too."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} and {other.device}!"
            )


# Of the convolutions' last arguments torch leaves out those that have their default.
def conv2d_fprop(x, w, bias, stride=1, padding=0, dilation=1, groups=1, channels_last=False, *_):
    _check_devices(x, w, bias)
    n, _, p, q = F.conv2d(x, w, bias, stride, padding, dilation, groups).shape
    return _empty(x, (n, w.shape[0], p, q), channels_last)  # of no input channels torch makes no output channels


def conv2d_dgrad(dy, w, x_size, stride=1, padding=0, dilation=1, groups=1, channels_last=False, *_):
    _check_devices(dy, w)
    return _empty(dy, x_size, channels_last)


def conv2d_wgrad(dy, x, w_size, bias_grad, stride=1, padding=0, dilation=1, groups=1, channels_last=False, *_):
    _check_devices(dy, x)
    return _empty(dy, w_size, channels_last), _empty(dy, (w_size[0] if bias_grad else 0,), False)


def _offset_dtype(kernel_size):
    window = kernel_size[0] * kernel_size[-1]
    return torch.uint8 if window <= 256 else torch.uint16 if window <= 65536 else torch.uint32


def max_pool2d_forward(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last, return_offsets):
    size = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode).shape
    y = _empty(x, size, channels_last)
    return y, _empty(x, size if return_offsets else (0,), channels_last, _offset_dtype(kernel_size))


def max_pool2d_backward(dy, offsets, x_size, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    _check_devices(dy, offsets)
    return _empty(dy, x_size, channels_last)


def max_pool2d_indices(offsets, x_size, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return _empty(offsets, offsets.shape, channels_last, torch.int64)


def max_pool2d_gather(x, offsets, kernel_size, stride, padding, dilation, ceil_mode, channels_last):
    return _empty(x, offsets.shape, channels_last)


def avg_pool2d_forward(
    x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, output_size, nhwc
):
    size = output_size or F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode).shape[2:]
    return _empty(x, (*x.shape[:2], *size), nhwc)


def avg_pool2d_backward(dy, x_size, *window):
    return _empty(dy, x_size, window[-1])


def _statistics_dtype(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def batch_norm_train(x, weight, bias, running_mean, running_var, momentum, eps, channels_last):
    _check_devices(x, weight, bias, running_mean, running_var)
    mean = x.new_empty(x.shape[1], dtype=_statistics_dtype(x))
    return _empty(x, x.shape, channels_last), mean, torch.empty_like(mean)


def batch_norm_eval(x, weight, bias, running_mean, running_var, eps, channels_last):
    _check_devices(x, weight, bias, running_mean, running_var)
    return _empty(x, x.shape, channels_last)


def batch_norm_backward(dy, x, weight, mean, invstd, training, channels_last):
    _check_devices(x, dy, weight, mean, invstd)
    return _empty(x, x.shape, channels_last), torch.empty_like(mean), torch.empty_like(mean)


def batch_norm_act_train(x, weight, bias, running_mean, running_var, residual, momentum, eps, channels_last):
    _check_devices(x, weight, bias, running_mean, running_var, residual)
    mean = x.new_empty(x.shape[1], dtype=_statistics_dtype(x))
    affine = mean.new_empty((2 if residual is None else 0, x.shape[1]))
    return _empty(x, x.shape, channels_last), mean, torch.empty_like(mean), affine


def batch_norm_act_eval(x, weight, bias, running_mean, running_var, residual, eps, channels_last):
    _check_devices(x, weight, bias, running_mean, running_var, residual)
    return _empty(x, x.shape, channels_last)


def batch_norm_act_backward(dy, x, weight, mean, invstd, affine, y, training, channels_last):
    _check_devices(x, dy, weight, mean, invstd, affine, y)
    dz = _empty(x, x.shape, channels_last) if y is not None else x.new_empty(0)
    return _empty(x, x.shape, channels_last), torch.empty_like(mean), torch.empty_like(mean), dz


def batch_norm_moments(x, channels_last):
    return x.new_empty((3, x.shape[1]), dtype=torch.float64)


def batch_norm_backward_sums(dy, x, mean, invstd, channels_last):
    return x.new_empty((2, x.shape[1]), dtype=_statistics_dtype(x))


def batch_norm_backward_apply(dy, x, weight, mean, invstd, means, channels_last):
    return _empty(x, x.shape, channels_last)


def register(namespace):
    from . import _ops

    for name in _ops.OPS:
        torch.library.register_fake(f"{namespace}::{name}", globals()[name])


register("fastconv")
