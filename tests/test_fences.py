"""The CPU kernels read nothing outside of their operands: these lie against pages that nobody may read.

The calls are a process of their own, which the first such read would end:

    python tests/test_fences.py
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import pytest
import torch
from layouts import lay_out

import fastconv

PAGE, NO_ACCESS = mmap.PAGESIZE, 0
# Channels, filters, size of the image, taps, stride, padding, groups: for every algorithm, whole vectors and rests.
CONVOLUTIONS = [
    (3, 16, 15, 7, 2, 3, 1),
    (16, 16, 14, 3, 1, 1, 1),
    (17, 33, 9, 3, 1, 1, 1),
    (20, 18, 11, 3, 2, 0, 1),
    (32, 48, 7, 1, 1, 0, 1),
    (21, 35, 9, 1, 2, 0, 1),
    (6, 16, 14, 5, 1, 2, 1),
    (32, 32, 10, 3, 1, 1, 8),
    (24, 36, 9, 3, 2, 1, 4),
    (19, 19, 12, 3, 1, 1, 19),
    (16, 16, 11, 3, 2, 1, 16),
    (9, 9, 13, 5, 1, 2, 9),
]
POOLS = [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1), (5, 3, 2)]  # window, stride, padding


def fenced(tensor, end):
    """A copy, in the same order, that ends before or begins after a page that nobody may read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    offset = PAGE + pages - size if end else PAGE
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def operands(*sizes):
    """(what they are, a function that makes them), in either layout, at either fence, in a wide and a narrow type."""
    for layout, end, dtype in itertools.product(
        ("contiguous", "channels_last"), (False, True), (torch.float32, torch.bfloat16)
    ):

        def make(index, layout=layout, end=end, dtype=dtype):
            return fenced(lay_out(torch.randn(sizes[index]), layout).to(dtype), end)

        yield f"{layout} {dtype} {'end' if end else 'begin'}", make, (layout, end)


def backward(y, inputs, layout, end):
    torch.autograd.grad(y, inputs, fenced(lay_out(torch.randn(y.shape), layout).to(y.dtype), end))


def convolve():
    for case in CONVOLUTIONS:
        channels, filters, size, taps, stride, padding, groups = case
        sizes = (2, channels, size, size), (filters, channels // groups, taps, taps), (filters,)
        for algo in (None, *fastconv.algorithms("cpu")):
            for what, make, place in operands(*sizes):
                tensors = [make(i).requires_grad_() for i in range(3)]
                print("conv2d", case, algo, what, flush=True)
                try:
                    y = fastconv.conv2d(*tensors, stride, padding, 1, groups, algo=algo)
                except ValueError:  # an algorithm that is not for this problem
                    break
                backward(y, tensors, *place)


def pool():
    for (window, stride, padding), size in itertools.product(POOLS, [(2, 3, 14, 15), (1, 17, 34, 36)]):
        for what, make, place in operands(size):
            x = make(0).requires_grad_()
            print("pool", window, stride, padding, size, what, flush=True)
            backward(fastconv.max_pool2d(x, window, stride, padding), x, *place)
            backward(fastconv.avg_pool2d(x, window, stride, padding), x, *place)


def normalize():
    for size in [(2, 3, 5, 7), (3, 35, 4, 4)]:
        for what, make, place in operands(size):
            x = make(0).requires_grad_()
            print("batch_norm", size, what, flush=True)
            weight, bias = (fenced(torch.ones(size[1]), place[1]).requires_grad_() for _ in range(2))
            backward(fastconv.batch_norm(x, None, None, weight, bias, training=True), (x, weight, bias), *place)


@pytest.mark.skipif(sys.platform != "linux", reason="fences are made by mprotect")
def test_nothing_is_read_outside_of_the_operands():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout[-200:], run.stderr[-2000:])
    assert run.stdout.count("\n") > 500  # calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    convolve()
    pool()
    normalize()
