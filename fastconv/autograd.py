"""The derivatives of the ops, as torch.autograd.Functions.

Convolution is linear in x and in w, so its three directions are closed under differentiation:

    y = fprop(x, w)       dx = dgrad(dy, w)      dw = wgrad(dy, x)
    fprop's derivatives are dgrad and wgrad; dgrad's are fprop and wgrad; wgrad's are fprop and dgrad.

Each function below (conv2d, conv2d_dgrad, max_pool2d, …) calls its op directly where nothing needs a gradient, and goes
through the Function otherwise. `config` is what the conv ops take after their tensors:
(stride, padding, dilation, groups, channels_last, allow_tf32, algo).
"""

import torch
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from . import _ops


def _tracked(*tensors):
    """True if a derivative of these may be asked for. Forward-mode AD and torch.func reach Function.apply, which
    raises for what it does not support; the bare op would lose the derivative without a word."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Conv2d(Function):
    @staticmethod
    def forward(ctx, x, w, bias, *config):
        needs_x_grad, needs_w_grad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w_grad else None, w if needs_x_grad else None)
        ctx.x_size, ctx.w_size, ctx.config = x.shape, w.shape, config
        return _ops.conv2d_fprop(x, w, bias, *config)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs_x_grad, needs_w_grad, needs_bias_grad = ctx.needs_input_grad[:3]
        dx = dw = dbias = None
        if needs_x_grad:
            dx = conv2d_dgrad(dy, w, ctx.x_size, *ctx.config)
        if needs_w_grad:
            dw, dbias = conv2d_wgrad(dy, x, ctx.w_size, needs_bias_grad, *ctx.config)
        elif needs_bias_grad:  # a trained bias on a frozen weight
            dbias = dy.sum((0, 2, 3))
        return dx, dw, dbias if needs_bias_grad else None, *(None for _ in ctx.config)


class Conv2dDgrad(Function):
    @staticmethod
    def forward(ctx, dy, w, x_size, *config):
        ctx.save_for_backward(dy, w)
        ctx.config = config
        return _ops.conv2d_dgrad(dy, w, x_size, *config)

    @staticmethod
    def backward(ctx, gdx):
        dy, w = ctx.saved_tensors
        gdy = conv2d(gdx, w, None, *ctx.config) if ctx.needs_input_grad[0] else None
        gw = conv2d_wgrad(dy, gdx, w.shape, False, *ctx.config)[0] if ctx.needs_input_grad[1] else None
        return gdy, gw, None, *(None for _ in ctx.config)


class Conv2dWgrad(Function):
    @staticmethod
    def forward(ctx, dy, x, w_size, bias_grad, *config):
        ctx.save_for_backward(dy, x)
        ctx.config = config
        ctx.set_materialize_grads(False)
        return _ops.conv2d_wgrad(dy, x, w_size, bias_grad, *config)

    @staticmethod
    def backward(ctx, gdw, gdbias):
        dy, x = ctx.saved_tensors
        gdy = gx = None
        if gdw is None and gdbias is not None:
            gdy = gdbias[:, None, None].expand_as(dy)
        elif gdw is not None:
            # y is linear in the bias too, so the bias gradient's share is fprop's bias.
            if ctx.needs_input_grad[0]:
                gdy = conv2d(x, gdw, gdbias if gdbias is not None and gdbias.numel() else None, *ctx.config)
            if ctx.needs_input_grad[1]:
                gx = conv2d_dgrad(dy, gdw, x.shape, *ctx.config)
        return gdy, gx, None, None, *(None for _ in ctx.config)


def conv2d(x, w, bias, *config):
    return (Conv2d.apply if _tracked(x, w, bias) else _ops.conv2d_fprop)(x, w, bias, *config)


def conv2d_dgrad(dy, w, x_size, *config):
    return (Conv2dDgrad.apply if _tracked(dy, w) else _ops.conv2d_dgrad)(dy, w, x_size, *config)


def conv2d_wgrad(dy, x, w_size, bias_grad, *config):
    return (Conv2dWgrad.apply if _tracked(dy, x) else _ops.conv2d_wgrad)(dy, x, w_size, bias_grad, *config)


class MaxPool2d(Function):
    """window: (kernel_size, stride, padding, dilation, ceil_mode, channels_last). Returns y and the offsets."""

    @staticmethod
    def forward(ctx, x, *window):
        y, offsets = _ops.max_pool2d_forward(x, *window, True)
        ctx.save_for_backward(offsets)
        ctx.x_size, ctx.window = x.shape, window
        ctx.mark_non_differentiable(offsets)
        return y, offsets

    @staticmethod
    def backward(ctx, dy, _):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(dy, offsets, ctx.x_size, *ctx.window), *(None for _ in ctx.window)


class MaxPool2dBackward(Function):
    @staticmethod
    def forward(ctx, dy, offsets, x_size, *window):
        ctx.save_for_backward(offsets)
        ctx.window = window
        return _ops.max_pool2d_backward(dy, offsets, x_size, *window)

    @staticmethod
    def backward(ctx, gdx):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_gather(gdx, offsets, *ctx.window), None, None, *(None for _ in ctx.window)


class MaxPool2dGather(Function):
    @staticmethod
    def forward(ctx, x, offsets, *window):
        ctx.save_for_backward(offsets)
        ctx.x_size, ctx.window = x.shape, window
        return _ops.max_pool2d_gather(x, offsets, *window)

    @staticmethod
    def backward(ctx, dy):
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(dy, offsets, ctx.x_size, *ctx.window), None, *(None for _ in ctx.window)


def max_pool2d(x, *window, return_offsets):
    """y and its offsets, which are empty unless they are asked for or a gradient needs them."""
    return MaxPool2d.apply(x, *window) if _tracked(x) else _ops.max_pool2d_forward(x, *window, return_offsets)


def max_pool2d_backward(dy, offsets, x_size, *window):
    return (MaxPool2dBackward.apply if _tracked(dy) else _ops.max_pool2d_backward)(dy, offsets, x_size, *window)


def max_pool2d_gather(x, offsets, *window):
    return (MaxPool2dGather.apply if _tracked(x) else _ops.max_pool2d_gather)(x, offsets, *window)


class BatchNormTrain(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, channels_last):
        y, mean, invstd = _ops.batch_norm_train(
            x, weight, bias, running_mean, running_var, momentum, eps, channels_last
        )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.channels_last = channels_last
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_batch_norm_grads(ctx, dy, training=True), *(None for _ in range(5))


class BatchNormEval(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, channels_last):
        statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
        # Copies, since a training step before backward would change the running statistics in place.
        mean = running_mean.to(statistics, copy=True)
        invstd = (running_var.to(statistics) + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.channels_last = channels_last
        return _ops.batch_norm_eval(x, weight, bias, running_mean, running_var, eps, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_batch_norm_grads(ctx, dy, training=False), *(None for _ in range(4))


def _batch_norm_grads(ctx, dy, training):
    x, weight, mean, invstd = ctx.saved_tensors
    dx, dweight, dbias = _ops.batch_norm_backward(dy, x, weight, mean, invstd, training, ctx.channels_last)
    needs_x_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad[:3]
    return (
        dx if needs_x_grad else None,
        dweight.to(weight.dtype) if needs_weight_grad else None,
        dbias.to(ctx.bias_dtype) if needs_bias_grad else None,
    )


def batch_norm_train(x, weight, bias, running_mean, running_var, momentum, eps, channels_last):
    args = (x, weight, bias, running_mean, running_var, momentum, eps, channels_last)
    return BatchNormTrain.apply(*args) if _tracked(x, weight, bias) else _ops.batch_norm_train(*args)[0]


def batch_norm_eval(x, weight, bias, running_mean, running_var, eps, channels_last):
    args = (x, weight, bias, running_mean, running_var, eps, channels_last)
    return BatchNormEval.apply(*args) if _tracked(x, weight, bias) else _ops.batch_norm_eval(*args)


def register(namespace):
    """Give the ops themselves the derivatives above, or an error, so that a direct call loses no gradient."""

    def save(ctx, tensors, sizes, config):
        ctx.save_for_backward(*tensors)
        ctx.sizes, ctx.config = sizes, config

    def conv2d_setup(ctx, inputs, output):
        x, w, bias, *config = inputs
        save(ctx, (x, w), None, config)

    def conv2d_grad(ctx, dy):
        x, w = ctx.saved_tensors
        dx = conv2d_dgrad(dy, w, x.shape, *ctx.config)
        dw, db = conv2d_wgrad(dy, x, w.shape, ctx.needs_input_grad[2], *ctx.config)
        return dx, dw, db if ctx.needs_input_grad[2] else None, *(None for _ in ctx.config)

    def max_pool2d_setup(ctx, inputs, output):
        x, *window, return_offsets = inputs
        save(ctx, (output[1],), x.shape, window)
        ctx.has_offsets = return_offsets

    def max_pool2d_grad(ctx, dy, _):
        if not ctx.has_offsets:
            raise RuntimeError(f"{namespace}::max_pool2d_forward needs return_offsets=True to be differentiated")
        dx = max_pool2d_backward(dy, *ctx.saved_tensors, ctx.sizes, *ctx.config)
        return dx, *(None for _ in ctx.config), None

    def batch_norm_setup(ctx, inputs, output):
        x, weight, bias, running_mean, running_var, eps, channels_last = inputs
        invstd = (running_var.to(torch.promote_types(x.dtype, torch.float32)) + eps).rsqrt()
        ctx.save_for_backward(x, weight, running_mean.clone(), invstd)
        ctx.bias_dtype, ctx.channels_last = bias.dtype if bias is not None else None, channels_last

    def batch_norm_grad(ctx, dy):
        return *_batch_norm_grads(ctx, dy, training=False), *(None for _ in range(4))

    def unsupported(name):
        def backward(ctx, *grads):
            raise NotImplementedError(f"{namespace}::{name} is differentiable through fastconv.autograd only")

        return backward

    torch.library.register_autograd(f"{namespace}::conv2d_fprop", conv2d_grad, setup_context=conv2d_setup)
    torch.library.register_autograd(f"{namespace}::max_pool2d_forward", max_pool2d_grad, setup_context=max_pool2d_setup)
    torch.library.register_autograd(f"{namespace}::batch_norm_eval", batch_norm_grad, setup_context=batch_norm_setup)
    for name in ("conv2d_dgrad", "conv2d_wgrad", "max_pool2d_backward", "max_pool2d_gather", "batch_norm_backward"):
        torch.library.register_autograd(f"{namespace}::{name}", unsupported(name))

    # register_autograd takes no op that writes to its inputs, so this one gets a kernel that raises.
    def batch_norm_train_autograd(x, weight, bias, *rest):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            raise NotImplementedError(f"{namespace}::batch_norm_train is differentiable through fastconv.batch_norm only")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops, namespace).batch_norm_train.default(x, weight, bias, *rest)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl("batch_norm_train", batch_norm_train_autograd, "Autograd")
    _libraries.append(library)


_libraries = []  # an op's kernels live as long as the Library that registered them
register("fastconv")
