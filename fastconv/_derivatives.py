"""The ops' own derivatives: those of fastconv.autograd, or an error, so that a direct call loses no gradient."""

import torch

from . import activated, autograd


def register(namespace):
    """Give the ops themselves the derivatives above, or an error, so that a direct call loses no gradient."""

    def save(ctx, tensors, sizes, config):
        ctx.save_for_backward(*tensors)
        ctx.sizes, ctx.config = sizes, config

    def conv2d_setup(ctx, inputs, output):
        x, w, bias, *config = inputs
        relu = config[7:] == [True]
        save(ctx, (x, w, output if relu else None), None, config[:7])
        ctx.others = len(config)

    def conv2d_grad(ctx, dy):
        x, w, y = ctx.saved_tensors
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y.detach(), 0)
        dx = autograd.conv2d_dgrad(dy, w, x.shape, *ctx.config)
        dw, db = autograd.conv2d_wgrad(dy, x, w.shape, ctx.needs_input_grad[2], *ctx.config)
        return dx, dw, db if ctx.needs_input_grad[2] else None, *(None for _ in range(ctx.others))

    def max_pool2d_setup(ctx, inputs, output):
        x, *window, return_offsets = inputs
        save(ctx, (output[1],), x.shape, window)
        ctx.has_offsets = return_offsets

    def max_pool2d_grad(ctx, dy, _):
        if not ctx.has_offsets:
            raise RuntimeError(f"{namespace}::max_pool2d_forward needs return_offsets=True to be differentiated")
        dx = autograd.max_pool2d_backward(dy, *ctx.saved_tensors, ctx.sizes, *ctx.config)
        return dx, *(None for _ in ctx.config), None

    def avg_pool2d_setup(ctx, inputs, output):
        x, *window = inputs
        save(ctx, (), x.shape, window)

    def avg_pool2d_grad(ctx, dy):
        return autograd.avg_pool2d_backward(dy, ctx.sizes, *ctx.config), *(None for _ in ctx.config)

    def batch_norm_setup(ctx, inputs, output):
        x, weight, bias, running_mean, running_var, eps, channels_last = inputs
        mean, invstd = autograd.running_statistics(x, running_mean, running_var, eps)
        autograd.save_batch_norm_inputs(ctx, x, weight, bias, mean, invstd, eps, channels_last)

    def batch_norm_grad(ctx, dy):
        return *autograd.batch_norm_gradients(ctx, dy, training=False), *(None for _ in range(4))

    def batch_norm_act_setup(ctx, inputs, output):
        x, weight, bias, running_mean, running_var, _, eps, channels_last = inputs
        activated.save_evaluated(ctx, x, weight, bias, running_mean, running_var, output, eps, channels_last)

    def batch_norm_act_grad(ctx, dy):
        return activated.BatchNormActEval.backward(ctx, dy)

    def unsupported(name):
        def backward(ctx, *grads):
            raise NotImplementedError(f"{namespace}::{name} is differentiable through fastconv.autograd only")

        return backward

    for name, (backward, setup) in {
        "conv2d_fprop": (conv2d_grad, conv2d_setup),
        "max_pool2d_forward": (max_pool2d_grad, max_pool2d_setup),
        "avg_pool2d_forward": (avg_pool2d_grad, avg_pool2d_setup),
        "batch_norm_eval": (batch_norm_grad, batch_norm_setup),
        "batch_norm_act_eval": (batch_norm_act_grad, batch_norm_act_setup),
    }.items():
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)
    for name in (
        "conv2d_dgrad",
        "conv2d_wgrad",
        "max_pool2d_backward",
        "max_pool2d_gather",
        "avg_pool2d_backward",
        "batch_norm_backward",
        "batch_norm_act_backward",
        "batch_norm_moments",
        "batch_norm_backward_sums",
        "batch_norm_backward_apply",
    ):
        torch.library.register_autograd(f"{namespace}::{name}", unsupported(name))

    # register_autograd takes no op that writes to its inputs, so these get a kernel that raises.
    def raises(name):
        op = getattr(getattr(torch.ops, namespace), name).default

        def autograd_kernel(*args):
            needs_grad = (
                torch.is_grad_enabled() and not torch.compiler.is_exporting()
            )  # an exported program checks when run
            if needs_grad and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
                raise NotImplementedError(f"{namespace}::{name}: fastconv.batch_norm is the differentiable one")
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        return autograd_kernel

    library = torch.library.Library(namespace, "FRAGMENT")
    for name in ("batch_norm_train", "batch_norm_act_train"):
        library.impl(name, raises(name), "Autograd")
    _libraries.append(library)


_libraries = []  # an op's kernels live as long as the Library that registered them
register("fastconv")
