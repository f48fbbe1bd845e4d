"""Loads libfastconv.so and names its ops: `_ops.conv2d_fprop(...)` and so on, one for each line of csrc/ops/schema.cpp.

The ops called here run below autograd; fastconv.autograd gives them their derivatives. Called by their full name,
torch.ops.fastconv.conv2d_fprop and the others are differentiable as well (see _derivatives.py).
"""

from pathlib import Path

import torch
from torch.compiler import is_compiling

OPS = (
    "conv2d_fprop",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "max_pool2d_forward",
    "max_pool2d_backward",
    "max_pool2d_indices",
    "max_pool2d_gather",
    "avg_pool2d_forward",
    "avg_pool2d_backward",
    "batch_norm_train",
    "batch_norm_eval",
    "batch_norm_backward",
    "batch_norm_act_train",
    "batch_norm_act_eval",
    "batch_norm_act_backward",
    "batch_norm_moments",
    "batch_norm_backward_sums",
    "batch_norm_backward_apply",
)
LIBRARY = Path(__file__).with_name("libfastconv.so")
# stride, padding, dilation, groups, channels_last, allow_tf32, algo: the schema's defaults, as functions and as layers
# pass them. (Of a ReLU behind them fprop alone has an argument more.)
CONV_DEFAULTS = ((1, 0, 1, 1, False, False, None), ((1, 1), (0, 0), (1, 1), 1, False, False, None))


def _below_autograd(op):
    is_conv = any(argument.name == "algo" for argument in op._schema.arguments)

    def call(*args):
        if is_compiling():
            return op(*args)
        if is_conv:  # what has its default need not be parsed
            if args[-7:] in CONV_DEFAULTS:
                args = args[:-7]
            elif args[-4:] == (1, False, False, None):
                args = args[:-4]
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return op._op(*args)
        except RuntimeError as error:
            # The stable ABI hands on an exception's text, but not its type.
            if str(error).startswith("CUDA out of memory"):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return call


def use_namespace(namespace):
    """Bind this module's ops to torch.ops.<namespace>: "fastconv", or "fastconv_emulated" in tests."""
    for name in OPS:
        globals()[name] = _below_autograd(getattr(getattr(torch.ops, namespace), name).default)


if not LIBRARY.exists():
    raise ImportError(f"{LIBRARY} is missing: build it with `pip install --no-build-isolation .`")
torch.ops.load_library(str(LIBRARY))
use_namespace("fastconv")
