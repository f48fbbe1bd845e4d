"""What the frozen layers must take on an H200 at least, and what the plans' models of time predict: no measurement.

readme.py writes the table to docs/performance.md, between <!-- benchmark:floors --> and its end.
"""

import contextlib
import sys
from pathlib import Path

import torch
from layers import FORWARD, LAYERS, PASSES, Conv
from report import markdown_table, three_digits

sys.path.append(str(Path(__file__).resolve().parents[1]))
import fastconv  # noqa: E402

COPY_BYTES_PER_US = 4.3e6  # measured, by large copies
TFLOPS = {torch.bfloat16: 790, torch.float32: 67}  # measured, by large products; NVIDIA's data sheet, on CUDA cores
DIRECTIONS = {"forward": ("fprop",), "backward": ("dgrad", "wgrad")}


def floor_us(layer, direction, dtype):
    """The slower of the operations and the least bytes."""
    batch = layer.batch("cuda")
    flops, least = layer.flops(direction, batch), layer.least_bytes(direction, batch, dtype.itemsize)
    return max(flops / TFLOPS[dtype] / 1e6, least / COPY_BYTES_PER_US)


@contextlib.contextmanager
def without_tf32():
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@without_tf32()
def predicted(layer, direction, dtype):
    """(µs, algorithms) of the NHWC plans for an H200; None where a plan has no model."""
    x, w = (
        torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for size in (layer.x_size(layer.batch("cuda")), layer.parameter_sizes()[0])
    )
    plans = [
        fastconv.plan(x, w, layer.stride, layer.pad, 1, layer.groups, direction=d, arch="sm_90")
        for d in DIRECTIONS[direction]
    ]
    times = [plan.predicted_us for plan in plans]
    return None if None in times else sum(times), ", ".join(dict.fromkeys(plan.algo for plan in plans))


def cells(layer, direction, dtype):
    floor = floor_us(layer, direction, dtype)
    if not isinstance(layer, Conv):
        return [three_digits(floor), "–"]
    us, algos = predicted(layer, direction, dtype)
    return [three_digits(floor), f"{three_digits(us)} {algos}" if us else f"– {algos}"]


def markdown_floors():
    header = ["layer", "pass", "N", "GFLOP", "bf16 MB", "bf16 floor µs", "bf16 predicted µs", "fp32 MB",
              "fp32 floor µs", "fp32 predicted µs"]  # fmt: skip
    lines = []
    for layer in LAYERS:
        for direction in PASSES:
            batch = layer.batch("cuda")
            line = [layer.name if direction == FORWARD else "", direction, str(batch)]
            line.append(three_digits(layer.flops(direction, batch) / 1e9) if layer.flops(direction, batch) else "–")
            for dtype in TFLOPS:
                line.append(three_digits(layer.least_bytes(direction, batch, dtype.itemsize) / 1e6))
                line += cells(layer, direction, dtype)
            lines.append(line)
    return markdown_table(header, lines)
