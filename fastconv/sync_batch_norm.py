"""BatchNorm over a batch that is spread over several processes, by torch.distributed.

Each process finds the count, the mean and Σ (x − mean)² of its own part, all_gather brings them together, and every
process merges them alike, in the order of the ranks (Chan, Golub, LeVeque: Updating formulae, 1979). Backward gathers
Σ dy and Σ dy·x̂. Both are one collective of one tensor. Parts may have any sizes, none included; nothing waits for the
GPU.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function

from . import _arguments, _ops, functional


def _gather(tensor, group):
    """The tensors of all ranks, in their order, along a new first dimension."""
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered.unbind()), tensor, group)
    return gathered


def _merge(moments):
    """The count (at least 1), the mean and Σ (x − mean)² of all; moments: (ranks, 3, C)."""
    counts, means, m2 = moments.unbind(1)
    count = counts.sum(0).clamp(min=1)
    mean = means[0] + ((means - means[0]) * (counts / count)).sum(0)  # equal means stay as they are
    return count, mean, (m2 + counts * (means - mean).square()).sum(0)


def _update(running, batch, momentum):
    running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, channels_last, group):
        moments = _gather(_ops.batch_norm_moments(x, channels_last), group)
        count, mean, m2 = _merge(moments)
        if running_mean is not None:
            momentum = momentum * moments[:, 0].sum(0).clamp(max=1)  # of no value there is nothing to learn
            _update(running_mean, mean, momentum)
            _update(running_var, m2 / (count - 1).clamp(min=1), momentum)
        invstd = (m2 / count + eps).rsqrt()
        scale = invstd if weight is None else weight * invstd
        statistics = torch.float64 if x.dtype is torch.float64 else torch.float32
        rounded_mean = mean.to(statistics)
        # The part of the mean that was rounded away goes into the shift, as in batch_norm_train.
        shift = (rounded_mean - mean) * scale if bias is None else bias + (rounded_mean - mean) * scale
        ctx.save_for_backward(x, weight, rounded_mean, invstd.to(statistics), count)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.channels_last, ctx.group = channels_last, group
        scale, shift = scale.to(statistics), shift.to(statistics)
        return _ops.batch_norm_eval(x, scale, shift, rounded_mean, torch.ones_like(scale), 0.0, channels_last)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, invstd, count = ctx.saved_tensors
        needs_x_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad[:3]
        dx, dweight, dbias = _SyncBatchNormBackward.apply(
            dy, x, weight, mean, invstd, count, ctx.channels_last, ctx.group, needs_x_grad
        )
        return (
            dx if needs_x_grad else None,
            dweight.to(weight.dtype) if needs_weight_grad else None,
            dbias.to(ctx.bias_dtype) if needs_bias_grad else None,
            *(None for _ in range(6)),
        )


class _SyncBatchNormBackward(Function):
    """A Function of its own, so that differentiating it again is an error and not a constant."""

    @staticmethod
    def forward(ctx, dy, x, weight, mean, invstd, count, channels_last, group, needs_x_grad):
        sums = _ops.batch_norm_backward_sums(dy, x, mean, invstd, channels_last)
        dx = None
        if needs_x_grad:
            means = _gather(sums, group).sum(0, dtype=torch.float64) / count
            dx = _ops.batch_norm_backward_apply(dy, x, weight, mean, invstd, means, channels_last)
        return dx, sums[1].clone(), sums[0].clone()  # of weight and bias the own part: DDP adds them up

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "fastconv.SyncBatchNorm cannot be differentiated twice: its second derivatives would need the other "
            "processes' gradients"
        )


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm on fastconv's kernels, for CPU tensors (gloo) as well as CUDA tensors (NCCL).

    In training the statistics are those of all processes' batches together; running_var takes the unbiased variance of
    that whole. The gradient of the input is that of the whole too, the gradients of weight and bias are of the own
    part, for DistributedDataParallel to reduce. In evaluation, without a process group, and in a world of one, it is
    BatchNorm. Every process of the group has to call it, with an empty batch if it has no other.

    It is not a subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group: as torch.nn.SyncBatchNorm's.

    Shapes:
        input (N, C, *), N ≥ 0, to an output of the same shape and dtype; channels_last if input is.

    Raises:
        ValueError with torch's text for input of less than two dimensions or without channels.
        NotImplementedError where a gradient is differentiated again (create_graph=True).
    """

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        process_group=None,
        device=None,
        dtype=None,
        **bias,  # bias=False, where this torch's BatchNorm takes it
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias)
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input):
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        track = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if track else (None, None)
        if self.training and self._processes() > 1:
            channels_last = input.dim() in (4, 5) and _arguments.is_channels_last(input)
            group = self.process_group or dist.group.WORLD
            return _SyncBatchNorm.apply(
                input, self.weight, self.bias, *running, momentum, self.eps, channels_last, group
            )
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        return functional.batch_norm(input, *running, self.weight, self.bias, use_batch_statistics, momentum, self.eps)

    def _processes(self):
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module, process_group=None):
        """Replace every BatchNorm layer in a module, torch's or fastconv's, by this one.

        Parameters and buffers are shared. As by torch.nn.SyncBatchNorm.convert_sync_batchnorm, whose work this is, the
        module is changed in place, hooks of the layers replaced are lost, and subclasses are replaced too.

        Args:
            module: any torch.nn.Module, or a single layer.
            process_group: of the new layers; None for all processes.

        Returns:
            the module itself, or the new layer where the module is a BatchNorm layer.
        """
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for layer in module.modules():
            if type(layer) is nn.SyncBatchNorm:
                layer.__class__ = cls
        return module


convert_sync_batchnorm = SyncBatchNorm.convert_sync_batchnorm
