"""avg_pool2d and adaptive_avg_pool2d: values and gradients against float64, sizes and strides against torch's."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from layouts import lay_out
from references import LOW_PRECISION, assert_close, avg_pool2d_reference, gamma

import fastconv

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last"]


@dataclass(frozen=True)
class Case:
    """A window, or an output size."""

    name: str
    x: tuple
    kernel: tuple = None
    stride: tuple = None
    padding: tuple = (0, 0)
    ceil_mode: bool = False
    include_pad: bool = True
    divisor: int = None
    output: tuple = None

    def pool(self, library, x):
        if self.output is not None:
            return library.adaptive_avg_pool2d(x, self.output)
        return library.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self.ceil_mode, self.include_pad, self.divisor
        )

    @property
    def taps(self):
        if self.output is None:
            return self.kernel[0] * self.kernel[1]
        return (self.x[2] // self.output[0] + 2) * (self.x[3] // self.output[1] + 2)

    def __str__(self):
        return self.name


CASES = [
    Case("2x2", (2, 3, 6, 8), (2, 2)),
    Case("overlapping", (2, 3, 9, 7), (3, 3), (2, 2)),
    Case("padded", (2, 3, 8, 9), (3, 3), (2, 2), (1, 1)),
    Case("padding not counted", (2, 3, 8, 9), (3, 4), (2, 1), (1, 2), include_pad=False),
    Case("divisor", (2, 3, 8, 9), (3, 2), (1, 2), (1, 1), divisor=5),
    Case("negative divisor", (1, 3, 5, 6), (3, 2), (2, 2), (1, 0), divisor=-3),
    Case("rectangular", (1, 4, 9, 11), (2, 3), (1, 2), (1, 0)),
    Case("ceil", (2, 3, 8, 9), (3, 2), (2, 3), (0, 1), ceil_mode=True),
    Case("ceil, padding not counted", (2, 3, 8, 10), (3, 3), (3, 4), (1, 1), ceil_mode=True, include_pad=False),
    Case("rows and columns never read", (1, 3, 8, 9), (2, 3), (3, 5)),
    Case("dense", (1, 3, 5, 19), (3, 4), (1, 1), (1, 2)),
    Case("window as large as the image", (2, 3, 4, 5), (4, 5), (1, 1)),
    Case("window larger than the image", (2, 3, 4, 5), (8, 9), (1, 1), (4, 4)),
    Case("1x1 image", (2, 3, 1, 1), (1, 1)),
    Case("1x1 window", (1, 3, 5, 6), (1, 1), (2, 3)),
    Case("row", (2, 3, 1, 9), (1, 3), (1, 2), (0, 1)),
    Case("column", (2, 3, 9, 1), (3, 1), (2, 1), (1, 0)),
    Case("one channel", (3, 1, 7, 6), (3, 2), (2, 2)),
    Case("odd channels", (1, 35, 5, 6), (3, 2), (2, 1), (1, 1)),
    Case("wide", (1, 3, 6, 41), (2, 17), (2, 1), (1, 8)),
    Case("wide and high", (1, 35, 12, 24), (9, 16), (2, 4), (3, 5), include_pad=False),
    Case("vectors of channels", (1, 24, 5, 4), (2, 3), (1, 2), (1, 1)),
    Case("sizes whose product is beyond 2^30", (1, 2, 33000, 1), output=(32999, 1)),
    Case("global", (2, 5, 7, 6), output=(1, 1)),
    Case("global, by its window", (3, 64, 7, 7), (7, 7)),
    Case("global, odd channels", (2, 35, 9, 7), output=(1, 1)),
    Case("global, large", (1, 3, 40, 33), output=(1, 1)),
    Case("to parts of the same size", (2, 3, 6, 8), output=(3, 2)),
    Case("to the same size", (2, 3, 4, 5), output=(4, 5)),
    Case("to parts of different sizes", (2, 3, 7, 11), output=(3, 4)),
    Case("to more than there are", (1, 3, 4, 5), output=(7, 13)),
    Case("rows of different sizes, global columns", (1, 5, 10, 9), output=(7, 1)),
    Case("columns of different sizes", (2, 4, 6, 50), output=(2, 3)),
]
SAMPLE = [CASES[i] for i in (2, 3, 7, 18, 20, 24, 25, 29)]


def check(backend, case, x):
    peer_leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    peer = case.pool(F, peer_leaf)
    dy = torch.randn(peer.shape).to(x.dtype)
    (peer_dx,) = torch.autograd.grad(peer, peer_leaf, dy)
    leaf = backend.put(x).requires_grad_()
    y = case.pool(fastconv, leaf)
    (dx,) = torch.autograd.grad(y, leaf, backend.put(dy))
    assert y.dtype is dx.dtype is x.dtype
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        assert y.stride() == peer.stride()
    expected_y, expected_dx = avg_pool2d_reference(lambda x: case.pool(F, x), x, dy, case.taps)
    low = x.dtype in LOW_PRECISION
    assert_close("y", y, expected_y, peer if low else None)
    assert_close("dx", dx, expected_dx, peer_dx if low else None)


@pytest.mark.parametrize("layout", [*LAYOUTS, "slices"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradient(backend, case, layout):
    check(backend, case, lay_out(torch.randn(case.x), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(backend, layout, dtype):
    for case in SAMPLE:
        check(backend, case, lay_out(torch.randn(case.x).to(dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Case("2x2", (3, 40, 56, 57), (2, 2)),
        Case("3x3 s1 p1", (2, 67, 40, 39), (3, 3), (1, 1), (1, 1), include_pad=False),
        Case("3x3 s2 p1", (2, 67, 40, 39), (3, 3), (2, 2), (1, 1)),
        Case("5x5 s3", (2, 33, 55, 54), (5, 5), (3, 3)),
        Case("wide window", (1, 5, 90, 80), (40, 30), (7, 9), (3, 4)),
        Case("global", (4, 600, 14, 13), output=(1, 1)),
        Case("of long rows", (1, 2, 3, 9000), (2, 3), (1, 1), (1, 1)),
        Case("of long rows that end in whole vectors", (1, 2, 3, 2063), (2, 3), (1, 1), (1, 1)),
        Case("of long rows, in pairs", (1, 2, 3, 9000), (3, 3), (1, 2), (0, 1)),
        Case("of long rows, to others", (1, 2, 3, 9000), output=(2, 2999)),
        Case("one row to many", (1, 2, 2, 3), output=(3, 7000)),
        Case("huge windows at every column", (1, 1, 3, 5000), (1, 3000), (1, 1), (0, 1500)),
    ],
    ids=str,
)
def test_large(native_backend, case, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(native_backend, case, lay_out(torch.randn(case.x).to(dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nans_and_infinities_reach_the_windows_that_have_them_and_no_others(backend, case, layout):
    x = torch.randn(case.x)
    x[0, 0, -1, -1], x[-1, -1, 0, 0] = torch.nan, torch.inf
    expected = case.pool(F, x.double())
    y = case.pool(fastconv, backend.put(lay_out(x, layout))).cpu().double()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y.isfinite().sum() == expected.isfinite().sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_ones_every_average_is_one(backend, layout):
    for case in CASES:
        x = backend.put(lay_out(torch.ones(case.x), layout))
        if case.divisor is None and (case.padding == (0, 0) or not case.include_pad):
            assert torch.equal(case.pool(fastconv, x).cpu(), torch.ones_like(case.pool(F, x.cpu())))


def test_a_long_sum_keeps_its_digits(native_backend):
    """Added up one by one in float32, the last of these values would be rounded to multiples of 0.06. Added up in
    pieces, they are off by no more than pieces and values in a piece allow."""
    x = torch.full((1, 2, 1024, 1024), 0.7)
    for layout in LAYOUTS:
        y = fastconv.adaptive_avg_pool2d(native_backend.put(lay_out(x, layout)), 1)
        assert (y.cpu().double() - x.double().mean()).abs().max() <= 0.7 * gamma(1024 + 1024, torch.float32)


@pytest.mark.parametrize(
    "output_size", [3, (3, None), (None, 2), (None, None), [2, 5], (0, 0), (2, 0), torch.Size([2, 3])]
)
def test_output_sizes(output_size):
    x = torch.randn(2, 3, 6, 7)
    for tensor in (x, x[0], x[:0], x[:, :0], x.contiguous(memory_format=torch.channels_last)):
        actual = fastconv.adaptive_avg_pool2d(tensor, output_size)
        expected = F.adaptive_avg_pool2d(tensor, output_size)
        torch.testing.assert_close(actual, expected)
        assert actual.numel() == 0 or actual.stride() == expected.stride()


@pytest.mark.parametrize("size", [(2, 3, 0, 4), (2, 3, 4, 0), (3, 0, 4)], ids=str)
@pytest.mark.launches_nothing
def test_the_mean_of_nothing_is_nan(size, backend):
    x = backend.put(torch.empty(size)).requires_grad_()
    y = fastconv.adaptive_avg_pool2d(x, 1)
    assert y.shape == F.adaptive_avg_pool2d(x, 1).shape and y.isnan().all()
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_size_1_takes_any_number_of_dimensions_as_torch_does():
    for size in ((4, 5), (2, 3, 2, 4, 5)):
        x = torch.randn(size)
        torch.testing.assert_close(fastconv.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1))


def test_unbatched_input_and_default_stride(backend):
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(fastconv.avg_pool2d(backend.put(x), 2).cpu(), F.avg_pool2d(x, 2))
    leaf = backend.put(x).requires_grad_()
    fastconv.avg_pool2d(leaf, (2, 3), stride=[]).sum().backward()
    assert leaf.grad.shape == x.shape
    torch.testing.assert_close(leaf.grad.sum().item(), 3.0 * 3 * 2)


@pytest.mark.launches_nothing
def test_empty_batch(backend):
    x = backend.put(torch.empty(0, 3, 6, 7)).requires_grad_()
    y = fastconv.avg_pool2d(x, (2, 3)), fastconv.adaptive_avg_pool2d(x, (2, 5))
    assert y[0].shape == (0, 3, 3, 2) and y[1].shape == (0, 3, 2, 5)
    (y[0].sum() + y[1].sum()).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_output_gives_no_gradient(backend, layout):
    x = backend.put(lay_out(torch.randn(2, 3, 4, 5), layout)).requires_grad_()
    (dx,) = torch.autograd.grad(fastconv.adaptive_avg_pool2d(x, (0, 2)).sum(), x)
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads_and_every_run(native_backend, layout, threads):
    pools = (
        lambda x: fastconv.avg_pool2d(x, 5, 2, 1, count_include_pad=False),
        lambda x: fastconv.avg_pool2d(x, (3, 20), 1),
        lambda x: fastconv.adaptive_avg_pool2d(x, (6, 7)),
        lambda x: fastconv.adaptive_avg_pool2d(x, 1),
    )
    x = native_backend.put(lay_out(torch.randn(2, 67, 41, 39), layout)).requires_grad_()
    for pool in pools:
        threads(1)
        y = pool(x)
        dy = torch.randn_like(y)
        (first,) = torch.autograd.grad(y, x, dy)
        for count in (1, 2, 3):
            threads(count)
            again = pool(x)
            assert torch.equal(again, y)
            assert torch.equal(torch.autograd.grad(again, x, dy)[0], first)
