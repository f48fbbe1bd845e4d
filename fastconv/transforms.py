"""Forward-mode AD and torch.func: what vmap, jacfwd, jvp and their compositions with grad need.

Each Function of fastconv.autograd has a subclass here, with the same backward and a jvp besides; and each op has a rule
for vmap, which folds the mapped dimension into the batch, the channels or the groups: nothing loops. The subclasses are
used only where a transform is active, since a Function with setup_context costs more to call and Dynamo refuses one
with a jvp.
"""

import torch

from . import _ops, activated, autograd


class Conv2d(autograd.Conv2d):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, *config):
        return _ops.conv2d_fprop(x, w, bias, *config)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, *config = inputs
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)
        ctx.x_size, ctx.w_size, ctx.config = x.shape, w.shape, config

    @staticmethod
    def jvp(ctx, gx, gw, gbias, *_):
        """y is linear in x and in (w, bias): ẏ = fprop(ẋ, w) + fprop(x, ẇ) + ḃ."""
        return _conv2d_tangent(*ctx.saved_tensors, gx, gw, gbias, ctx.config)


def _conv2d_tangent(x, w, gx, gw, gbias, config):
    parts = []
    if gx is not None:
        parts.append(autograd.conv2d(gx, w, None, *config))
    if gw is not None:
        parts.append(autograd.conv2d(x, gw, None, *config))
    if gbias is not None:
        if not parts:  # in the shape of the output
            parts.append(autograd.conv2d(x, torch.zeros_like(w), None, *config))
        parts.append(gbias[:, None, None])
    return sum(parts[1:], parts[0])


class Conv2dRelu(activated.Conv2dRelu):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, bias, *config):
        return _ops.conv2d_fprop(x, w, bias, *config, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, *config = inputs
        ctx.save_for_backward(x, w, output)
        ctx.save_for_forward(x, w, output)
        ctx.x_size, ctx.w_size, ctx.config = x.shape, w.shape, config

    @staticmethod
    def jvp(ctx, gx, gw, gbias, *_):
        x, w, y = ctx.saved_tensors
        return activated.relu_backward(_conv2d_tangent(x, w, gx, gw, gbias, ctx.config), y)


class Conv2dDgrad(autograd.Conv2dDgrad):
    generate_vmap_rule = True

    @staticmethod
    def forward(dy, w, x_size, *config):
        return _ops.conv2d_dgrad(dy, w, x_size, *config)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, w, ctx.x_size, *ctx.config = inputs
        ctx.save_for_backward(dy, w)
        ctx.save_for_forward(dy, w)

    @staticmethod
    def jvp(ctx, gdy, gw, *_):
        dy, w = ctx.saved_tensors
        parts = []
        if gdy is not None:
            parts.append(autograd.conv2d_dgrad(gdy, w, ctx.x_size, *ctx.config))
        if gw is not None:
            parts.append(autograd.conv2d_dgrad(dy, gw, ctx.x_size, *ctx.config))
        return sum(parts[1:], parts[0])


class Conv2dWgrad(autograd.Conv2dWgrad):
    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, w_size, bias_grad, *config):
        return _ops.conv2d_wgrad(dy, x, w_size, bias_grad, *config)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, ctx.w_size, ctx.bias_grad, *ctx.config = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x)
        ctx.save_for_forward(dy, x)

    @staticmethod
    def jvp(ctx, gdy, gx, *_):
        dy, x = ctx.saved_tensors
        parts = []
        if gdy is not None:
            parts.append(autograd.conv2d_wgrad(gdy, x, ctx.w_size, ctx.bias_grad, *ctx.config))
        if gx is not None:  # the bias gradient does not depend on x
            gdw, gdb = autograd.conv2d_wgrad(dy, gx, ctx.w_size, ctx.bias_grad, *ctx.config)
            parts.append((gdw, torch.zeros_like(gdb)))
        return tuple(sum(part[1:], part[0]) for part in zip(*parts, strict=True))


class MaxPool2d(autograd.MaxPool2d):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, *window_and_return_offsets):
        return _ops.max_pool2d_forward(x, *window_and_return_offsets[:-1], True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.window, _ = inputs
        ctx.x_size = x.shape
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx, gx, *_):
        (offsets,) = ctx.saved_tensors
        return autograd.max_pool2d_gather(gx, offsets, *ctx.window), None


class MaxPool2dBackward(autograd.MaxPool2dBackward):
    generate_vmap_rule = True

    @staticmethod
    def forward(dy, offsets, x_size, *window):
        return _ops.max_pool2d_backward(dy, offsets, x_size, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, offsets, ctx.x_size, *ctx.window = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def jvp(ctx, gdy, *_):
        (offsets,) = ctx.saved_tensors
        return autograd.max_pool2d_backward(gdy, offsets, ctx.x_size, *ctx.window)


class MaxPool2dGather(autograd.MaxPool2dGather):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, offsets, *window):
        return _ops.max_pool2d_gather(x, offsets, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, offsets, *ctx.window = inputs
        ctx.x_size = x.shape
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def jvp(ctx, gx, *_):
        (offsets,) = ctx.saved_tensors
        return autograd.max_pool2d_gather(gx, offsets, *ctx.window)


class AvgPool2d(autograd.AvgPool2d):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, *window):
        return _ops.avg_pool2d_forward(x, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.window = inputs
        ctx.x_size = x.shape

    @staticmethod
    def jvp(ctx, gx, *_):
        return autograd.avg_pool2d(gx, *ctx.window)


class AvgPool2dBackward(autograd.AvgPool2dBackward):
    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x_size, *window):
        return _ops.avg_pool2d_backward(dy, x_size, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.x_size, *ctx.window = inputs

    @staticmethod
    def jvp(ctx, gdy, *_):
        return autograd.avg_pool2d_backward(gdy, ctx.x_size, *ctx.window)


class BatchNormTrain(autograd.BatchNormTrain):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_train(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        autograd.check_statistics(ctx)
        x, weight, bias, _, _, _, eps, channels_last = inputs
        _, mean, invstd = output
        autograd.save_batch_norm_inputs(ctx, x, weight, bias, mean, invstd, eps, channels_last)
        ctx.save_for_forward(x, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)

    @staticmethod
    def jvp(ctx, gx, gweight, gbias, *_):
        return _batch_norm_jvp(ctx, gx, gweight, gbias, training=True), None, None


class BatchNormEval(autograd.BatchNormEval):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_eval(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        autograd.check_statistics(ctx)
        x, weight, bias, running_mean, running_var, eps, channels_last = inputs
        mean, invstd = autograd.running_statistics(x, running_mean, running_var, eps)
        autograd.save_batch_norm_inputs(ctx, x, weight, bias, mean, invstd, eps, channels_last)
        ctx.save_for_forward(x, weight, mean, invstd)

    @staticmethod
    def jvp(ctx, gx, gweight, gbias, *_):
        return _batch_norm_jvp(ctx, gx, gweight, gbias, training=False)


class BatchNormActTrain(activated.BatchNormActTrain):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_act_train(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        autograd.check_statistics(ctx)
        x, weight, bias, _, _, residual, _, eps, channels_last = inputs
        ctx.save_for_forward(*activated.save_batch_norm(ctx, x, weight, bias, residual, output, eps, channels_last))
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def jvp(ctx, gx, gweight, gbias, _mean, _var, gresidual, *_):
        return _act_jvp(ctx, gx, gweight, gbias, gresidual, training=True), None, None, None


class BatchNormActEval(activated.BatchNormActEval):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _ops.batch_norm_act_eval(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        autograd.check_statistics(ctx)
        x, weight, bias, running_mean, running_var, _, eps, channels_last = inputs
        saved = activated.save_evaluated(ctx, x, weight, bias, running_mean, running_var, output, eps, channels_last)
        ctx.save_for_forward(*saved)

    @staticmethod
    def jvp(ctx, gx, gweight, gbias, _mean, _var, gresidual, *_):
        return _act_jvp(ctx, gx, gweight, gbias, gresidual, training=False)


def _act_jvp(ctx, gx, gweight, gbias, gresidual, training):
    x, _, mean, _, affine, y = ctx.saved_tensors
    parts = [] if gresidual is None else [gresidual]
    if not (gx is None and gweight is None and gbias is None):
        parts.append(_batch_norm_jvp(ctx, gx, gweight, gbias, training))
    return torch.where(activated.is_closed(x, mean, affine, y), 0, sum(parts[1:], parts[0]))


def _batch_norm_jvp(ctx, gx, gweight, gbias, training):
    """The Jacobian of x ↦ x̂ is symmetric, so ẋ goes through it by the formula that dy goes back by."""
    x, weight, mean, invstd = ctx.saved_tensors[:4]
    parts = []
    if gx is not None:
        parts.append(autograd.batch_norm_backward(gx, x, weight, mean, invstd, training, ctx.eps)[0])
    if gweight is not None:
        normalized, _ = autograd.normalize(x, mean, invstd, training, ctx.eps)
        parts.append((normalized * autograd.per_channel(gweight.to(mean.dtype), x)).to(x.dtype))
    if gbias is not None:
        parts.append(autograd.per_channel(gbias, x).to(x.dtype).expand_as(x))
    return sum(parts[1:], parts[0])


for _name in (
    "Conv2d",
    "Conv2dDgrad",
    "Conv2dWgrad",
    "MaxPool2d",
    "MaxPool2dBackward",
    "MaxPool2dGather",
    "AvgPool2d",
    "AvgPool2dBackward",
    "BatchNormTrain",
    "BatchNormEval",
):
    getattr(autograd, _name).transformable = globals()[_name]
for _name in ("Conv2dRelu", "BatchNormActTrain", "BatchNormActEval"):
    getattr(activated, _name).transformable = globals()[_name]
