"""The derivatives of the ops, as torch.autograd.Functions.

Convolution is linear in x and in w, so its three directions are closed under differentiation:

    y = fprop(x, w)       dx = dgrad(dy, w)      dw = wgrad(dy, x)
    fprop's derivatives are dgrad and wgrad; dgrad's are fprop and wgrad; wgrad's are fprop and dgrad.

Each function below (conv2d, conv2d_dgrad, max_pool2d, …) takes its Function's arguments, calls the op directly where
nothing needs a gradient, and goes through the Function otherwise. `config` is what the conv ops take after their
tensors: (stride, padding, dilation, groups, channels_last, allow_tf32, algo).
"""

import torch
from torch import is_grad_enabled
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from . import _ops


class Leaf(tuple):
    """A tuple that torch's pytrees do not take apart: functorch's jvp under vmap miscounts nested arguments."""


def call(function, op, differentiable, args):
    """Call the op itself, its Function, or the Function's subclass from fastconv.transforms: the cheapest that loses no
    derivative. The first `differentiable` of the arguments are tensors, or None, that may need one."""
    compiling = is_compiling()
    if not compiling and (forward_ad._current_level >= 0 or are_functorch_transforms_active()):
        return function.transformable.apply(*(Leaf(a) if isinstance(a, (tuple, list)) else a for a in args))
    if is_grad_enabled():
        tensors = [tensor for tensor in args[:differentiable] if tensor is not None]
        for tensor in tensors:
            if tensor.requires_grad:
                if compiling or any(map(is_functorch_wrapped_tensor, tensors)):
                    return function.apply(*args)
                # That method looks in Python for what was ruled out above, and calls this one.
                return super(Function, function).apply(*args)
    return op(*args)


class Conv2d(Function):
    @staticmethod
    def forward(ctx, x, w, bias, *config):
        needs_x_grad, needs_w_grad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w_grad else None, w if needs_x_grad else None)
        ctx.x_size, ctx.w_size, ctx.config = x.shape, w.shape, config
        return _ops.conv2d_fprop(x, w, bias, *config)

    @staticmethod
    def backward(ctx, dy):
        return conv2d_gradients(ctx, dy, *ctx.saved_tensors)


def conv2d_gradients(ctx, dy, x, w):
    """What backward returns of a convolution with this ctx; dy is the gradient of x ∗ w + bias."""
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


def conv2d(*args):
    return call(Conv2d, _ops.conv2d_fprop, 3, args)


def conv2d_dgrad(*args):
    return call(Conv2dDgrad, _ops.conv2d_dgrad, 2, args)


def conv2d_wgrad(*args):
    return call(Conv2dWgrad, _ops.conv2d_wgrad, 2, args)


class MaxPool2d(Function):
    """window: (kernel_size, stride, padding, dilation, ceil_mode, channels_last). Returns y and the offsets, whether
    they are asked for or not."""

    @staticmethod
    def forward(ctx, x, *window_and_return_offsets):
        ctx.window = window = window_and_return_offsets[:-1]
        y, offsets = _ops.max_pool2d_forward(x, *window, True)
        ctx.save_for_backward(offsets)
        ctx.x_size = x.shape
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)  # the offsets' would be zeros, written for nothing
        return y, offsets

    @staticmethod
    def backward(ctx, dy, _):
        nothing = (None,) * (len(ctx.window) + 1)
        if dy is None:
            return None, *nothing
        (offsets,) = ctx.saved_tensors
        return max_pool2d_backward(dy, offsets, ctx.x_size, *ctx.window), *nothing


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
    return call(MaxPool2d, _ops.max_pool2d_forward, 1, (x, *window, return_offsets))


def max_pool2d_backward(*args):
    return call(MaxPool2dBackward, _ops.max_pool2d_backward, 1, args)


def max_pool2d_gather(*args):
    return call(MaxPool2dGather, _ops.max_pool2d_gather, 1, args)


class AvgPool2d(Function):
    """window: (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, output_size,
    channels_last). y is linear in x, so that backward's own derivative is forward."""

    @staticmethod
    def forward(ctx, x, *window):
        ctx.x_size, ctx.window = x.shape, window
        return _ops.avg_pool2d_forward(x, *window)

    @staticmethod
    def backward(ctx, dy):
        return avg_pool2d_backward(dy, ctx.x_size, *ctx.window), *(None for _ in ctx.window)


class AvgPool2dBackward(Function):
    @staticmethod
    def forward(ctx, dy, x_size, *window):
        ctx.window = window
        return _ops.avg_pool2d_backward(dy, x_size, *window)

    @staticmethod
    def backward(ctx, gdx):
        return avg_pool2d(gdx, *ctx.window), None, *(None for _ in ctx.window)


def avg_pool2d(*args):
    return call(AvgPool2d, _ops.avg_pool2d_forward, 1, args)


def avg_pool2d_backward(*args):
    return call(AvgPool2dBackward, _ops.avg_pool2d_backward, 1, args)


class BatchNormTrain(Function):
    """Returns y, and the batch's mean and 1/√(var + eps), which are not differentiable."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, channels_last):
        check_statistics(ctx)
        outputs = _ops.batch_norm_train(x, weight, bias, running_mean, running_var, momentum, eps, channels_last)
        save_batch_norm_inputs(ctx, x, weight, bias, *outputs[1:], eps, channels_last)
        return outputs

    @staticmethod
    def backward(ctx, dy, *_):
        return *batch_norm_gradients(ctx, dy, training=True), *(None for _ in range(5))


class BatchNormEval(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, channels_last):
        check_statistics(ctx)
        save_batch_norm_inputs(
            ctx, x, weight, bias, *running_statistics(x, running_mean, running_var, eps), eps, channels_last
        )
        return _ops.batch_norm_eval(x, weight, bias, running_mean, running_var, eps, channels_last)

    @staticmethod
    def backward(ctx, dy):
        return *batch_norm_gradients(ctx, dy, training=False), *(None for _ in range(4))


def check_statistics(ctx):
    for name, needs_grad in zip(("running_mean", "running_var"), ctx.needs_input_grad[3:5], strict=True):
        if needs_grad:  # torch's text
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. This input "
                "cannot have requires_grad True."
            )


def running_statistics(x, running_mean, running_var, eps):
    """mean and 1/√(var + eps) as copies, since a training step before backward would change the running statistics."""
    statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, var = (t.to(statistics, copy=True) for t in (running_mean, running_var))
    return mean, (var + eps).rsqrt()


def save_batch_norm_inputs(ctx, x, weight, bias, mean, invstd, eps, channels_last):
    ctx.save_for_backward(x, weight, mean, invstd)
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.eps, ctx.channels_last = eps, channels_last


def batch_norm_gradients(ctx, dy, training):
    x, weight, mean, invstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        dx, dweight, dbias = batch_norm_backward(dy, x, weight, mean, invstd, training, ctx.eps)
    else:
        dx, dweight, dbias = _ops.batch_norm_backward(dy, x, weight, mean, invstd, training, ctx.channels_last)
    needs_x_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad[:3]
    return (
        dx if needs_x_grad else None,
        dweight.to(weight.dtype) if needs_weight_grad else None,
        dbias.to(ctx.bias_dtype) if needs_bias_grad else None,
    )


def batch_norm_backward(dy, x, weight, mean, invstd, training, eps):
    """The formula of the op batch_norm_backward in torch's own differentiable arithmetic.

    This is what runs where the backward pass is to be differentiated again (create_graph=True).
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    dy, normalized, invstd = dy.to(mean.dtype), *normalize(x, mean, invstd, training, eps)
    dweight, dbias = (dy * normalized).sum(dims), dy.sum(dims)
    if training:
        count = x.numel() / max(x.shape[1], 1)
        dy = dy - (per_channel(dbias, x) + normalized * per_channel(dweight, x)) / count
    scale = invstd if weight is None else invstd * per_channel(weight.to(mean.dtype), x)
    return (dy * scale).to(x.dtype), dweight, dbias


def normalize(x, mean, invstd, training, eps):
    """x̂ = (x − μ)/√(σ² + eps) and 1/√(σ² + eps), as functions of x in training."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    x = x.to(mean.dtype)
    if training:
        centred = x - x.mean(dims, keepdim=True)
        invstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    else:
        centred, invstd = x - per_channel(mean, x), per_channel(invstd, x)
    return centred * invstd, invstd


def per_channel(values, x):
    """C values in a shape that broadcasts against x."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def batch_norm_train(*args):
    return call(BatchNormTrain, _ops.batch_norm_train, 5, args)[0]


def batch_norm_eval(*args):
    return call(BatchNormEval, _ops.batch_norm_eval, 5, args)
