"""Measures one layer in one layout: checks fastconv's results, then times fastconv and torch in turn.

Both libraries read the same random tensors, are called as torch.nn.functional is, and are differentiated by
torch.autograd.grad. "forward" is a training step's: it keeps what backward needs. "backward" is the gradients of x,
weight and bias together.
"""

import gc
import math
import random
import statistics
import time
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from layers import FORWARD, PASSES
from machine import DTYPES

import fastconv

LIBRARIES = {"fastconv": fastconv, "torch": F}
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TF32_ROUNDING = 2**-11


@dataclass
class Timing:
    """Milliseconds: the median of the samples and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples):
        low, median, high = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    @property
    def spread(self):
        """The interquartile range over the median."""
        return (self.high - self.low) / self.median


@dataclass
class Check:
    """The largest error over the largest value of the reference, for the tensor that is nearest to its bound."""

    tensor: str
    error: float
    bound: float
    reference: str

    @property
    def ok(self):
        return self.error <= self.bound  # False for NaN


@dataclass
class Row:
    """One direction of one layer in one layout."""

    layer: str
    group: str
    layout: str
    direction: str
    batch: int
    unit: str
    check: Check | None = None
    fastconv: Timing | None = None
    torch: Timing | None = None
    ratio: float | None = None  # torch's time over fastconv's: above 1, fastconv is faster
    rate: float | None = None  # of fastconv, in `unit`
    of_limit: float | None = None  # the least time that copy bandwidth and matmul allow, over fastconv's
    failure: str = ""

    @property
    def ok(self):
        return not self.failure and self.check is not None and self.check.ok


@dataclass
class Tensors:
    """What a layer is called with, and dy."""

    x: torch.Tensor
    parameters: list  # weight, bias
    buffers: list  # running mean and variance
    dy: torch.Tensor

    @classmethod
    def random(cls, layer, device, dtype):
        """The same values for a layer in every run and layout."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(layer.name.encode()))
        # BatchNorm's parameters stay float32 under low precision, as in torch.
        kind = DTYPES[dtype]
        parameter_kind = torch.float32 if layer.buffer_sizes() and kind is not torch.float64 else kind

        def randn(size, kind):
            return torch.randn(size, generator=generator, device=device).to(kind)

        x = randn(layer.x_size(layer.batch(device)), kind)
        parameters = [randn(size, parameter_kind) for size in layer.parameter_sizes()]
        if parameters and parameters[0].dim() == 4:
            parameters[0] /= math.sqrt(parameters[0][0].numel())
        buffers = [torch.full(size, float(i), dtype=parameter_kind, device=device)
                   for i, size in enumerate(layer.buffer_sizes())]  # fmt: skip
        return cls(x, parameters, buffers, randn(layer.y_size(layer.batch(device)), kind))

    def to(self, dtype=None, layout="NCHW"):
        """A copy whose x and parameters ask for gradients."""

        def convert(tensor):
            memory = torch.channels_last if layout == "NHWC" and tensor.dim() == 4 else torch.contiguous_format
            return tensor.to(dtype or tensor.dtype, memory_format=memory, copy=True)

        return Tensors(
            convert(self.x).requires_grad_(),
            [convert(p).requires_grad_() for p in self.parameters],
            [convert(b) for b in self.buffers],
            convert(self.dy),
        )

    def forward(self, layer, ops):
        return layer(ops, self.x, *self.parameters, *self.buffers)

    def backward(self, y):
        return torch.autograd.grad(y, [self.x, *self.parameters], self.dy, retain_graph=True)


def reference(layer, tensors, device):
    """(y and the gradients of x, weight and bias, whose they are): by torch in float64, or in tensors' own dtype where
    a GPU's memory has no room for that."""
    elements = tensors.x.numel() + tensors.dy.numel()
    huge = False
    if device == "cuda":
        torch.cuda.empty_cache()
        huge = 32 * elements > torch.cuda.mem_get_info()[0] / 2
    exact = tensors.to(None if huge else torch.float64)
    cudnn = torch.backends.cudnn
    settings = cudnn.benchmark, cudnn.conv.fp32_precision
    cudnn.benchmark, cudnn.conv.fp32_precision = False, "ieee"
    try:
        y = exact.forward(layer, F)
        return [y.detach(), *exact.backward(y)], "torch's own" if huge else "float64"
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision = settings


def bound(dtype, terms, tf32):
    """Largest error allowed, over the largest value: the rounding of the result, and of a sum of `terms` products
    whose errors are as random as the inputs. A term left out or read twice is beyond it up to 10⁵ terms or so."""
    if terms == 0:
        return 0.0  # values are moved, not computed
    accumulated = ROUNDING[torch.float64 if dtype is torch.float64 else torch.float32]
    return 4 * (ROUNDING[dtype] + accumulated * math.sqrt(terms) + TF32_ROUNDING * tf32)


def check(results, references, terms, label, tf32):
    """The Check of the result that is nearest to its bound. `terms`: {name: products summed into one element}."""
    worst = None
    for (name, count), result, expected in zip(terms, results, references, strict=True):
        if result.shape != expected.shape:
            return Check(name, math.inf, 0.0, f"{label}, whose shape differs")
        difference = (result.detach().to(expected.dtype) - expected).abs().max() / expected.abs().max()
        now = Check(name, difference.item(), bound(result.dtype, count, tf32), label)
        if worst is None or not now.ok or (worst.ok and now.error * worst.bound > worst.error * now.bound):
            worst = now
        if not now.ok:
            break
    return worst


def timer(device):
    """A function that runs a call once and returns its milliseconds: by the clock on a CPU; by events on a GPU, where
    the L2 cache is flushed first. The flush also keeps the GPU busy while the call is being launched."""
    if device == "cpu":

        def milliseconds(call):
            start = time.perf_counter()
            result = call()  # noqa: F841  (kept until the clock has been read: its memory is not freed on our time)
            return (time.perf_counter() - start) * 1e3

        return milliseconds

    flush_bytes = max(2**29, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
    flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(call):
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def time_in_turn(calls, milliseconds, seconds, rounds):
    """{name: Timing} of {name: call}, each called once a round in random order, so that drift hits all of them.
    Ends after `seconds`, but not before the first and not after the second number of `rounds`; a slow call has at
    least one round in three times the time."""
    rng = random.Random(0)
    samples = {name: [] for name in calls}
    for call in calls.values():
        milliseconds(call)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(rounds[1]):
            if turn and time.perf_counter() - start > (seconds if turn >= rounds[0] else 3 * seconds):
                break
            for name in rng.sample(list(calls), len(calls)):
                samples[name].append(milliseconds(calls[name]))
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}


def steps(layer, device, dtype, layout):
    """{library: a call of forward and backward}, on the same tensors."""
    tensors = Tensors.random(layer, device, dtype).to(layout=layout.upper())
    return {name: lambda ops=ops: tensors.backward(tensors.forward(layer, ops)) for name, ops in LIBRARIES.items()}


def least_ms(layer, direction, batch, element, limits):
    """A roofline: the least time for the layer's multiply-adds and for its bytes, at the machine's own limits."""
    compute = layer.flops(direction, batch) / (limits["matmul_gflop_s"] * 1e6)
    memory = layer.least_bytes(direction, batch, element) / (limits["copy_gb_s"] * 1e6)
    return max(compute, memory)


def measure(layer, layout, dtype, device, limits, milliseconds, seconds, rounds):
    """[forward's Row, backward's Row]. A result that is wrong is not timed."""
    batch = layer.batch(device)
    rows = [Row(layer.name, layer.group, layout, direction, batch, layer.unit) for direction in PASSES]
    tensors = Tensors.random(layer, device, dtype)
    try:
        expected, label = reference(layer, tensors, device)
        tensors = tensors.to(layout=layout)
        y = {name: tensors.forward(layer, ops) for name, ops in LIBRARIES.items()}
        results = [y["fastconv"], *tensors.backward(y["fastconv"])]
        terms = list(layer.terms(batch).items())
        for row, part in zip(rows, (slice(0, 1), slice(1, None)), strict=True):
            row.check = check(results[part], expected[part], terms[part], label, dtype == "tf32")
        del expected, results
        for row in rows:
            if not row.ok:
                continue
            if row.direction == FORWARD:
                calls = {name: lambda ops=ops: tensors.forward(layer, ops) for name, ops in LIBRARIES.items()}
            else:
                calls = {name: lambda name=name: tensors.backward(y[name]) for name in LIBRARIES}
            times = time_in_turn(calls, milliseconds, seconds, rounds)
            row.fastconv, row.torch = times["fastconv"], times["torch"]
            ms, element = row.fastconv.median, tensors.x.element_size()
            work = layer.flops if row.unit == "GFLOP/s" else lambda *of, e=element: layer.least_bytes(*of, e)
            row.ratio = row.torch.median / ms
            row.rate = work(row.direction, batch) / (ms * 1e6)
            row.of_limit = least_ms(layer, row.direction, batch, element, limits) / ms
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
        for row in rows:
            if row.fastconv is None:
                row.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return rows
