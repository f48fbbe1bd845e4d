"""What the arguments of a call mean: which tensors have a kernel, in which layout, with which padding."""

import operator
import warnings

import torch
import torch.nn.functional as F

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
warned = set()


def has_kernel(tensor):
    try:
        dense = tensor.layout is torch.strided and (tensor.is_cpu or tensor.is_cuda or tensor.is_meta)
    except AttributeError:  # no tensor: torch says so
        return False
    return dense and tensor.dtype in FLOATING


def warn_fallback(op, tensor):
    """Complex, integer and quantized tensors and other devices go to torch.nn.functional, with one warning each."""
    if not isinstance(tensor, torch.Tensor):
        return
    key = (op, tensor.dtype, tensor.device.type)
    if key not in warned:
        warned.add(key)
        warnings.warn(
            f"fastconv has no {op} kernel for {tensor.dtype} on {tensor.device.type}: torch.nn.functional computes it",
            stacklevel=3,
        )


def is_channels_last(tensor):
    """torch's suggest_memory_format: do the strides run W, H, N outward from C, the innermost?"""
    stride = tensor.stride()
    if stride[-1] < stride[1]:
        return False
    innermost = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        size = tensor.shape[dim]
        if size == 0 or stride[dim] < innermost or (dim == 0 and innermost == stride[1]):
            return False
        if dim == 1 and stride[1] == 0:
            return False
        innermost = stride[dim] * size if size > 1 else stride[dim]
    return True


def wants_channels_last(input, weight, cuda):
    """The layout of a convolution: channels_last if input or weight is, but torch keeps float64 on CUDA in NCHW."""
    if input.dim() != 4 or weight.dim() != 4 or (cuda and input.dtype is torch.float64):
        return False
    return is_channels_last(input) or is_channels_last(weight)


def _is_plain(option):
    numbers = option if isinstance(option, (tuple, list)) else (option,)
    return all(isinstance(n, int) and -(2**63) <= n < 2**63 for n in numbers)


def reread(peer, error, tensors, options):
    """What torch would make of the arguments of a call that failed with `error`.

    torch takes NumPy's integers and tensors of one element for integers: returns the options with these made plain.
    Raises torch's own error if it cannot read an argument, and `error` if that is not why the call failed.
    """
    missing = isinstance(error, AttributeError) or any(not isinstance(t, (torch.Tensor, type(None))) for t in tensors)
    if not missing and all(map(_is_plain, options)):
        raise error
    try:
        peer(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in tensors), *options)
    except (RuntimeError, IndexError, ZeroDivisionError):  # read, but refused: so it will be here
        pass
    if missing or all(_is_plain(option) or isinstance(option, str) for option in options):
        raise error
    return [_plain(option) for option in options]


def _plain(option):
    if isinstance(option, (tuple, list)):
        return [operator.index(number) for number in option]
    return option if isinstance(option, str) else operator.index(option)


@torch.compiler.assume_constant_result
def tf32_is_allowed():
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def same_padding(padding, kernel, dilation):
    """('same' as symmetric padding, the rest to pad on the right and at the bottom), per axis in (H, W)."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [t // 2 for t in total], [t - 2 * (t // 2) for t in total]


def as_pair(value):
    return (value, value) if isinstance(value, int) else tuple(value) * 2 if len(value) == 1 else tuple(value)


def string_padding(padding, input, weight, stride, dilation):
    if padding == "valid":
        return 0, input
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if len(as_pair(value)) != 2:
            raise RuntimeError(f"{name} cannot broadcast to 2 dimensions")
    if weight.dim() != 4:  # refused below
        return 0, input
    if any(s != 1 for s in as_pair(stride)):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    symmetric, rest = same_padding(padding, weight.shape[2:], as_pair(dilation))
    if any(rest) and input.dim() == 4:
        input = F.pad(input, (0, rest[1], 0, rest[0]))
    return symmetric, input
