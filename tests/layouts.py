"""The orders in memory, and the kinds of view, that a tensor may come in."""

import torch

LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "outside in",
    "slices",
    "expanded",
    "overlapping",
    "neg view",
    "zero",
)


def lay_out(values, layout):
    """A tensor of the same size, and, where the layout allows it, of the same values."""
    rank = values.dim()
    if layout == "channels_last" and rank >= 3:
        channels = 0 if rank == 3 else 1
        return values.movedim(channels, -1).contiguous().movedim(-1, channels)
    if layout == "transposed" and rank >= 2:
        return values.mT.contiguous().mT
    if layout == "outside in" and rank >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "slices":
        fill = torch.nan if values.is_floating_point() or values.is_complex() else 77
        base = torch.full([2 * n + 1 for n in values.shape], fill, dtype=values.dtype)
        return base[tuple(slice(1, None, 2) for _ in values.shape)].copy_(values)
    if layout == "expanded" and rank >= 1 and values.numel():
        dim = values.numel() % rank
        return values.narrow(dim, 0, 1).contiguous().expand_as(values)
    if layout == "overlapping" and values.numel():
        strides = [1 + (dim % 2) for dim in range(rank)]
        reach = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        return (
            values.flatten()[:1]
            .repeat(reach)
            .mul(torch.arange(reach).sub(reach // 2).to(values.dtype))
            .as_strided(values.shape, strides)
        )
    if layout == "neg view" and values.dtype is not torch.int64:
        return torch._neg_view(-values)
    if layout == "zero":
        return torch._efficientzerotensor(values.shape, dtype=values.dtype)
    return values.contiguous()
