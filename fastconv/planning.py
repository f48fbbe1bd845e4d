"""plan() and algorithms(): which kernel will run a convolution, and why. Pure functions; no GPU is needed to ask."""

from dataclasses import dataclass

import torch

from . import _arguments

_UNITS = ("B", "KiB", "MiB", "GiB")


def _introspection():
    try:
        from . import _introspect
    except ImportError as error:
        raise ImportError(
            "plan() and algorithms() need fastconv._introspect, which is built for one version of Python: "
            "reinstall fastconv with this one"
        ) from error
    return _introspect


@dataclass(frozen=True)
class Plan:
    """How one direction of a convolution is computed. Printing it explains it.

    reasons: (algorithm, taken, one line) in the order in which they were considered.
    tile: (m, n, k) of the GEMM, or the output tile of a direct kernel; 0 where there is none.
    split: pieces of the contraction, each summed apart and then added in order.
    workspace_bytes: for the whole call; scratch_bytes: besides it, for each CPU thread.
    predicted_us: a model's time of the whole call on an H200, in µs; None where there is no model (yet: "im2col",
        "implicit_gemm" and "mma" have one, on sm_90).
    unread_rows, unread_cols: of the input, at its far edge, which the stride does not reach.
    """

    problem: str
    direction: str
    arch: str
    algo: str
    kernel: str
    tile: tuple
    split: int
    workspace_bytes: int
    scratch_bytes: int
    predicted_us: float | None
    output_size: tuple
    unread_rows: int
    unread_cols: int
    multiply_adds: int
    reasons: tuple

    def __str__(self):
        lines = [
            f"{self.direction} of {self.problem}",
            f"  {self.multiply_adds:,} multiply-adds on {self.arch}",
            f"  kernel     {self.kernel}",
        ]
        if any(self.tile):
            lines.append(f"  tile       {' x '.join(map(str, self.tile))}")
        lines.append(f"  split      {self.split}")
        memory = _bytes(self.workspace_bytes) + (
            f" and {_bytes(self.scratch_bytes)} a thread" if self.scratch_bytes else ""
        )
        lines.append(f"  workspace  {memory}")
        if self.predicted_us is not None:
            lines.append(f"  predicted  {self.predicted_us:.4g} µs on an H200")
        if self.unread_rows or self.unread_cols:
            lines.append(f"  never read {self.unread_rows} rows, {self.unread_cols} columns")
        lines += [f"  {'takes' if taken else 'not'} {algo}: {reason}" for algo, taken, reason in self.reasons]
        return "\n".join(lines)


def _bytes(count):
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.4g} {_UNITS[unit]}"


def plan(input, weight, stride=1, padding=0, dilation=1, groups=1, *, direction="fprop", arch=None, algo=None):
    """How fastconv.conv2d computes this call, or its gradients.

    Args:
        input: x, in every direction: (N, C, H, W) or (C, H, W). Only its shape, dtype, strides and device matter, so
            a tensor on the meta device will do.
        weight: (K, C / groups, R, S).
        stride, padding, dilation, groups: as in fastconv.conv2d.
        direction: "fprop", "dgrad" (the gradient of input) or "wgrad" (the gradients of weight and bias).
        arch: "cpu", "sm_75", "sm_80", "sm_90", …; None is input's device. The GPU need not be there: the plan is then
            for a representative model (H100 for sm_90, with 132 multiprocessors).
        algo: as in fastconv.conv2d.

    Returns:
        a Plan; str(plan) says kernel, tile, split, workspace, rows and columns never read, and why.

    Raises:
        what fastconv.conv2d raises for the same arguments; ValueError for an unknown direction, arch or algo.
    """
    if not _arguments.has_kernel(input):
        raise ValueError(f"fastconv has no kernel for {input.dtype} on {input.device.type}: torch computes it")
    x = input.unsqueeze(0) if input.dim() == 3 else input
    num_sms = 0
    if arch is None:
        arch = "cpu"
        if x.is_cuda:
            device = torch.cuda.get_device_properties(x.device)
            arch, num_sms = f"sm_{device.major}{device.minor}", device.multi_processor_count
    if isinstance(padding, str):
        padding, x = _arguments.string_padding(padding, x, weight, stride, dilation)
    cuda = arch != "cpu"
    channels_last = _arguments.wants_channels_last(x, weight, cuda)
    explained = _introspection().plan_conv2d(
        list(x.shape),
        list(weight.shape),
        list(_arguments.as_pair(stride)),
        list(_arguments.as_pair(padding)),
        list(_arguments.as_pair(dilation)),
        groups,
        str(x.dtype).removeprefix("torch."),
        channels_last,
        cuda and x.dtype is torch.float32 and _arguments.tf32_is_allowed(),
        direction,
        arch,
        num_sms,
        algo,
    )
    fields = {name: getattr(explained, name) for name in Plan.__dataclass_fields__ if name not in ("arch", "reasons")}
    return Plan(arch=arch, reasons=tuple(explained.reasons), **fields)


def algorithms(device=None):
    """The names that `algo` takes on a device (a torch.device or its name; None is the CPU), plainest first."""
    return _introspection().algorithms(torch.device(device or "cpu").type == "cuda")
