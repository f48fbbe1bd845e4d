"""Rules for vmap, one for each op: the mapped dimension, of size B, is folded into one that the op has already."""

import torch

from . import _ops


def _into(tensor, dim, mapped, size):
    """Fold a tensor's mapped dimension into `dim`, outermost there; an unmapped tensor is repeated B times."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if mapped is None else tensor.movedim(mapped, 0)
    return tensor.movedim(0, dim).flatten(dim, dim + 1)


def _complete(config):
    """stride, padding, dilation, groups, channels_last, allow_tf32, algo: torch leaves out what has its default."""
    return (*config, *_ops.CONV_DEFAULTS[0][len(config) :])


def _conv2d_fprop(info, in_dims, x, w, bias, *config):
    relu = config[7:] == (True,)
    batch, config = info.batch_size, _complete(config[:7])
    x_dim, w_dim, bias_dim = in_dims[:3]
    groups = config[3]
    shared_bias = bias if bias_dim is None else None
    if x_dim is None and w_dim is None:  # only the bias is mapped
        y = _ops.conv2d_fprop(x, w, None, *config).unsqueeze(0)
    elif w_dim is None:  # N' = B·N
        fused = (True,) if relu and bias_dim is None else ()
        y = _ops.conv2d_fprop(_into(x, 0, x_dim, batch), w, shared_bias, *config, *fused).unflatten(0, (batch, -1))
        relu, shared_bias = relu and not fused, None
    else:
        if x_dim is not None or groups != 1:  # groups' = B·groups; otherwise K' = B·K
            x = _into(x, 1, x_dim, batch)
            config = (*config[:3], batch * groups, *config[4:])
        y = _ops.conv2d_fprop(x, _into(w, 0, w_dim, batch), None, *config).unflatten(1, (batch, -1)).movedim(1, 0)
    if bias_dim is not None:
        y = y + bias.movedim(bias_dim, 0)[:, None, :, None, None]
    elif shared_bias is not None:
        y = y + shared_bias[:, None, None]
    return y.relu() if relu else y, 0


def _conv2d_dgrad(info, in_dims, dy, w, x_size, *config):
    batch, config = info.batch_size, _complete(config)
    dy_dim, w_dim = in_dims[:2]
    groups = config[3]
    n, c, h, w_ = x_size
    if w_dim is None:
        dx = _ops.conv2d_dgrad(_into(dy, 0, dy_dim, batch), w, (batch * n, c, h, w_), *config)
        return dx.unflatten(0, (batch, n)), 0
    if dy_dim is None and groups == 1:  # C' = B·C
        dx = _ops.conv2d_dgrad(dy, _into(w, 1, w_dim, batch), (n, batch * c, h, w_), *config)
    else:
        config = (*config[:3], batch * groups, *config[4:])
        dy, w = _into(dy, 1, dy_dim, batch), _into(w, 0, w_dim, batch)
        dx = _ops.conv2d_dgrad(dy, w, (n, batch * c, h, w_), *config)
    return dx.unflatten(1, (batch, c)), 1


def _conv2d_wgrad(info, in_dims, dy, x, w_size, bias_grad, *config):
    batch, config = info.batch_size, _complete(config)
    k, *filter_size = w_size
    config = (*config[:3], batch * config[3], *config[4:])
    dy, x = _into(dy, 1, in_dims[0], batch), _into(x, 1, in_dims[1], batch)
    dw, db = _ops.conv2d_wgrad(dy, x, (batch * k, *filter_size), bias_grad, *config)
    return (dw.unflatten(0, (batch, k)), db.view(batch, -1) if bias_grad else db.expand(batch, 0)), (0, 0)


def _into_batch(info, in_dims, tensors, call):
    """For an op that treats images apart: the mapped dimension joins the batch of all its tensors and results."""
    batch = info.batch_size
    results = call(*(_into(t, 0, d, batch) for t, d in zip(tensors, in_dims, strict=False)))
    if isinstance(results, tuple):
        return tuple(r.unflatten(0, (batch, r.shape[0] // batch)) for r in results), (0,) * len(results)
    return results.unflatten(0, (batch, results.shape[0] // batch)), 0


def _max_pool2d_forward(info, in_dims, x, *window):
    return _into_batch(info, in_dims, (x,), lambda x: _ops.max_pool2d_forward(x, *window))


def _max_pool2d_backward(info, in_dims, dy, offsets, x_size, *window):
    size = (info.batch_size * x_size[0], *x_size[1:])
    return _into_batch(
        info, in_dims, (dy, offsets), lambda dy, offsets: _ops.max_pool2d_backward(dy, offsets, size, *window)
    )


def _max_pool2d_indices(info, in_dims, offsets, x_size, *window):
    size = (info.batch_size * x_size[0], *x_size[1:])
    return _into_batch(info, in_dims, (offsets,), lambda offsets: _ops.max_pool2d_indices(offsets, size, *window))


def _max_pool2d_gather(info, in_dims, x, offsets, *window):
    return _into_batch(info, in_dims, (x, offsets), lambda x, offsets: _ops.max_pool2d_gather(x, offsets, *window))


def _avg_pool2d_forward(info, in_dims, x, *window):
    return _into_batch(info, in_dims, (x,), lambda x: _ops.avg_pool2d_forward(x, *window))


def _avg_pool2d_backward(info, in_dims, dy, x_size, *window):
    size = (info.batch_size * x_size[0], *x_size[1:])
    return _into_batch(info, in_dims, (dy,), lambda dy: _ops.avg_pool2d_backward(dy, size, *window))


def _check_running(running_mean, in_dims):
    if running_mean is not None and None in in_dims[3:5]:
        raise RuntimeError(
            "batch_norm cannot update running statistics that are not mapped from a batch that is: pass None, or use "
            "torch.func.functional_call with stacked buffers"
        )


def _batch_norm_train(info, in_dims, x, weight, bias, running_mean, running_var, *rest):
    batch = info.batch_size
    _check_running(running_mean, in_dims)
    x = _into(x, 1, in_dims[0], batch)
    weight, bias = _into(weight, 0, in_dims[1], batch), _into(bias, 0, in_dims[2], batch)
    means, variances = _into(running_mean, 0, in_dims[3], batch), _into(running_var, 0, in_dims[4], batch)
    y, mean, invstd = _ops.batch_norm_train(x, weight, bias, means, variances, *rest)
    if running_mean is not None:
        running_mean.movedim(in_dims[3], 0).copy_(means.view(batch, -1))
        running_var.movedim(in_dims[4], 0).copy_(variances.view(batch, -1))
    return (y.unflatten(1, (batch, -1)), mean.view(batch, -1), invstd.view(batch, -1)), (1, 0, 0)


def _batch_norm_eval(info, in_dims, x, weight, bias, running_mean, running_var, *rest):
    batch = info.batch_size
    channels = (weight, bias, running_mean, running_var)
    channels = [_into(t, 0, d, batch) for t, d in zip(channels, in_dims[1:], strict=False)]
    return _ops.batch_norm_eval(_into(x, 1, in_dims[0], batch), *channels, *rest).unflatten(1, (batch, -1)), 1


def _batch_norm_backward(info, in_dims, dy, x, weight, mean, invstd, *rest):
    batch = info.batch_size
    dy, x = _into(dy, 1, in_dims[0], batch), _into(x, 1, in_dims[1], batch)
    channels = [_into(t, 0, d, batch) for t, d in zip((weight, mean, invstd), in_dims[2:], strict=False)]
    dx, dweight, dbias = _ops.batch_norm_backward(dy, x, *channels, *rest)
    return (dx.unflatten(1, (batch, -1)), dweight.view(batch, -1), dbias.view(batch, -1)), (1, 0, 0)


def _batch_norm_act_train(info, in_dims, x, weight, bias, running_mean, running_var, residual, *rest):
    batch = info.batch_size
    _check_running(running_mean, in_dims)
    x, residual = _into(x, 1, in_dims[0], batch), _into(residual, 1, in_dims[5], batch)
    channels = (weight, bias, running_mean, running_var)
    weight, bias, means, variances = (_into(t, 0, d, batch) for t, d in zip(channels, in_dims[1:5], strict=True))
    y, mean, invstd, affine = _ops.batch_norm_act_train(x, weight, bias, means, variances, residual, *rest)
    if running_mean is not None:
        running_mean.movedim(in_dims[3], 0).copy_(means.view(batch, -1))
        running_var.movedim(in_dims[4], 0).copy_(variances.view(batch, -1))
    results = y.unflatten(1, (batch, -1)), mean.view(batch, -1), invstd.view(batch, -1)
    return (*results, affine.unflatten(1, (batch, -1))), (1, 0, 0, 1)


def _batch_norm_act_eval(info, in_dims, x, weight, bias, running_mean, running_var, residual, *rest):
    batch = info.batch_size
    channels = (weight, bias, running_mean, running_var)
    channels = [_into(t, 0, d, batch) for t, d in zip(channels, in_dims[1:5], strict=True)]
    x, residual = _into(x, 1, in_dims[0], batch), _into(residual, 1, in_dims[5], batch)
    return _ops.batch_norm_act_eval(x, *channels, residual, *rest).unflatten(1, (batch, -1)), 1


def _batch_norm_act_backward(info, in_dims, dy, x, weight, mean, invstd, affine, y, *rest):
    batch = info.batch_size
    dy, x, y = (_into(t, 1, d, batch) for t, d in zip((dy, x, y), (*in_dims[:2], in_dims[6]), strict=True))
    channels = [_into(t, 0, d, batch) for t, d in zip((weight, mean, invstd), in_dims[2:5], strict=True)]
    affine = _into(affine, 1, in_dims[5], batch)
    dx, dweight, dbias, dz = _ops.batch_norm_act_backward(dy, x, *channels, affine, y, *rest)
    dz = dz.unflatten(1, (batch, -1)) if y is not None else dz.new_empty(0, batch)
    return (dx.unflatten(1, (batch, -1)), dweight.view(batch, -1), dbias.view(batch, -1), dz), (1, 0, 0, 1)


def _batch_norm_moments(info, in_dims, x, channels_last):
    x = _into(x, 1, in_dims[0], info.batch_size)
    return _ops.batch_norm_moments(x, channels_last).unflatten(1, (info.batch_size, -1)), 1


def _batch_norm_backward_sums(info, in_dims, dy, x, mean, invstd, channels_last):
    batch = info.batch_size
    dy, x = _into(dy, 1, in_dims[0], batch), _into(x, 1, in_dims[1], batch)
    mean, invstd = _into(mean, 0, in_dims[2], batch), _into(invstd, 0, in_dims[3], batch)
    return _ops.batch_norm_backward_sums(dy, x, mean, invstd, channels_last).unflatten(1, (batch, -1)), 1


def _batch_norm_backward_apply(info, in_dims, dy, x, weight, mean, invstd, means, channels_last):
    batch = info.batch_size
    dy, x, means = (_into(t, 1, d, batch) for t, d in zip((dy, x, means), (*in_dims[:2], in_dims[5]), strict=True))
    channels = [_into(t, 0, d, batch) for t, d in zip((weight, mean, invstd), in_dims[2:5], strict=True)]
    dx = _ops.batch_norm_backward_apply(dy, x, *channels, means, channels_last)
    return dx.unflatten(1, (batch, -1)), 1


def register(namespace):
    for name in _ops.OPS:
        torch.library.register_vmap(f"{namespace}::{name}", globals()[f"_{name}"])


register("fastconv")
