"""The derivatives of convolution and BatchNorm with the ReLU behind them in one op.

A ReLU's gradient needs to know where it was positive. Convolution keeps its y, which the next layer keeps anyway; of
BatchNorm see csrc/cpu/batch_norm_gradients.cpp. `config` and the rest are as in fastconv.autograd.
"""

import torch
from torch.autograd import Function

from . import _ops, autograd


def relu_backward(dy, y):
    """dz: dy where y, which a ReLU gave, is positive, and 0 elsewhere; a NaN lets it pass, as in torch."""
    return torch.ops.aten.threshold_backward(dy, y.detach(), 0)


class Conv2dRelu(Function):
    @staticmethod
    def forward(ctx, x, w, bias, *config):
        y = _ops.conv2d_fprop(x, w, bias, *config, True)
        needs_x_grad, needs_w_grad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w_grad else None, w if needs_x_grad else None, y)
        ctx.x_size, ctx.w_size, ctx.config = x.shape, w.shape, config
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, y = ctx.saved_tensors
        return autograd.conv2d_gradients(ctx, relu_backward(dy, y), x, w)


def conv2d_relu(*args):
    return autograd.call(Conv2dRelu, _conv2d_relu_op, 3, args)


def _conv2d_relu_op(*args):
    return _ops.conv2d_fprop(*args, True)


class BatchNormActTrain(Function):
    """Returns y, and the batch's mean, 1/√(var + eps) and affine, which are not differentiable."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, residual, momentum, eps, channels_last):
        autograd.check_statistics(ctx)
        outputs = _ops.batch_norm_act_train(
            x, weight, bias, running_mean, running_var, residual, momentum, eps, channels_last
        )
        save_batch_norm(ctx, x, weight, bias, residual, outputs, eps, channels_last)
        return outputs

    @staticmethod
    def backward(ctx, dy, *_):
        *gradients, dresidual = _gradients(ctx, dy, training=True)
        return *gradients, None, None, dresidual, None, None, None


class BatchNormActEval(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, residual, eps, channels_last):
        autograd.check_statistics(ctx)
        y = _ops.batch_norm_act_eval(x, weight, bias, running_mean, running_var, residual, eps, channels_last)
        save_evaluated(ctx, x, weight, bias, running_mean, running_var, y, eps, channels_last)
        return y

    @staticmethod
    def backward(ctx, dy):
        *gradients, dresidual = _gradients(ctx, dy, training=False)
        return *gradients, None, None, dresidual, None, None


def save_batch_norm(ctx, x, weight, bias, residual, outputs, eps, channels_last):
    """Of training: without a residual the affine says where y is positive, with one y itself. Returns what it saves."""
    y, mean, invstd, affine = outputs
    positive = (affine, None) if residual is None else (None, y)
    return _save(ctx, (x, weight, mean, invstd, *positive), bias, eps, channels_last)


def save_evaluated(ctx, x, weight, bias, running_mean, running_var, y, eps, channels_last):
    statistics = autograd.running_statistics(x, running_mean, running_var, eps)
    return _save(ctx, (x, weight, *statistics, None, y), bias, eps, channels_last)


def _save(ctx, tensors, bias, eps, channels_last):
    ctx.save_for_backward(*tensors)
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.eps, ctx.channels_last = eps, channels_last
    return tensors


def is_closed(x, mean, affine, y):
    """Where the ReLU gave zero."""
    if y is not None:
        return y.detach() <= 0
    scale, shift = (autograd.per_channel(row, x) for row in affine.detach())
    return (x.detach().to(affine.dtype) - autograd.per_channel(mean.detach(), x)) * scale + shift <= 0


def _gradients(ctx, dy, training):
    """Of x, weight, bias and the residual."""
    x, weight, mean, invstd, affine, y = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again
        dz = torch.where(is_closed(x, mean, affine, y), 0, dy)
        dx, dweight, dbias = autograd.batch_norm_backward(dz, x, weight, mean, invstd, training, ctx.eps)
    else:
        dx, dweight, dbias, dz = _ops.batch_norm_act_backward(
            dy, x, weight, mean, invstd, affine, y, training, ctx.channels_last
        )
    needs = ctx.needs_input_grad
    return (
        dx if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(ctx.bias_dtype) if needs[2] else None,
        dz if needs[5] else None,
    )


def batch_norm_act_train(*args):
    return autograd.call(BatchNormActTrain, _ops.batch_norm_act_train, 6, args)[0]


def batch_norm_act_eval(*args):
    return autograd.call(BatchNormActEval, _ops.batch_norm_act_eval, 6, args)
