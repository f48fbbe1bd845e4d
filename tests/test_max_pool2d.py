"""max_pool2d: values and indices equal torch's, ties, NaNs and infinities included; gradients against float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from layouts import lay_out
from references import assert_close, max_pool2d_backward_reference

import fastconv

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple
    kernel: tuple
    stride: tuple
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    ceil_mode: bool = False

    @property
    def window(self):
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def __str__(self):
        return self.name


CASES = [
    Case("2x2", (2, 3, 6, 8), (2, 2), (2, 2)),
    Case("overlapping", (2, 3, 9, 7), (3, 3), (2, 2)),
    Case("padded", (2, 3, 8, 9), (3, 3), (2, 2), (1, 1)),
    Case("rectangular", (1, 4, 9, 11), (2, 3), (1, 2), (1, 0)),
    Case("dilated", (2, 3, 9, 10), (3, 2), (2, 1), (1, 1), (2, 3)),
    Case("ceil", (2, 3, 8, 9), (3, 2), (2, 3), (0, 1), ceil_mode=True),
    Case("ceil, dilated", (1, 3, 7, 8), (2, 3), (2, 3), (0, 1), (2, 1), ceil_mode=True),
    Case("rows and columns never read", (1, 3, 8, 9), (2, 3), (3, 5)),
    Case("dense", (1, 3, 5, 6), (3, 4), (1, 1), (1, 2)),
    Case("window as large as the image", (2, 3, 4, 5), (4, 5), (1, 1)),
    Case("1x1 image", (2, 3, 1, 1), (1, 1), (1, 1)),
    Case("1x1 window", (1, 3, 5, 6), (1, 1), (2, 3)),
    Case("row", (2, 3, 1, 9), (1, 3), (1, 2), (0, 1)),
    Case("column", (2, 3, 9, 1), (3, 1), (2, 1), (1, 0)),
    Case("one channel", (3, 1, 7, 6), (3, 2), (2, 2)),
    Case("odd channels", (1, 35, 5, 6), (3, 2), (2, 1), (1, 1)),
    Case("two-byte offsets", (1, 2, 20, 23), (17, 19), (2, 3), (3, 2)),
    Case("vectors of channels", (1, 24, 5, 4), (2, 3), (1, 2), (1, 1)),
    Case("vectors of channels, 2x2", (2, 8, 6, 5), (2, 2), (2, 1)),
    Case("vectors of channels, 3x3", (2, 16, 5, 7), (3, 3), (2, 1), (1, 0)),
    Case("rows beyond 2^30", (2, 3, 5, 8), (3, 2), (2**30, 2), (1, 0)),
    Case("columns beyond 2^30", (2, 3, 7, 5), (3, 2), (2, 2**30), (0, 1)),
]

# One name a way to make a tensor of this size. Few values make many ties.
FILLS = {
    "random": torch.randn,
    "ties": lambda size: torch.randint(0, 3, size).float(),
    "after ReLU": lambda size: torch.randn(size).sub(1).relu(),
    "constant": torch.ones,
    "all -inf": lambda size: torch.full(size, -torch.inf),
    "some -inf": lambda size: torch.where(torch.rand(size) < 0.7, -torch.inf, torch.randn(size)),
    "some NaN": lambda size: torch.where(torch.rand(size) < 0.2, torch.nan, torch.randn(size)),
    "NaN and infinities": lambda size: torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])[torch.randint(4, size)],
    "zeros of both signs": lambda size: torch.randint(0, 2, size).sub(0.5).sign() * 0.0,
}


def check_values(backend, x, window):
    y, indices = fastconv.max_pool2d(backend.put(x), *window, return_indices=True)
    expected, expected_indices = F.max_pool2d(x.double().contiguous(), *window, return_indices=True)
    assert y.dtype is x.dtype and indices.dtype is torch.int64
    assert torch.equal(indices.cpu(), expected_indices)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=0, equal_nan=True)
    alone = fastconv.max_pool2d(backend.put(x), *window)
    assert torch.equal(alone.nan_to_num(0.5), y.nan_to_num(0.5))
    for result in (y, indices):
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            assert result.stride() == F.max_pool2d(x, *window).stride()


def check_gradient(backend, x, window, compare_with_torch=False):
    dy = lay_out(torch.randn(F.max_pool2d(x, *window).shape, dtype=x.dtype), "contiguous")
    expected = max_pool2d_backward_reference(x, dy, *window)
    leaf = backend.put(x).requires_grad_()
    (dx,) = torch.autograd.grad(fastconv.max_pool2d(leaf, *window), leaf, backend.put(dy))
    peer = None
    if compare_with_torch:
        theirs = x.clone().requires_grad_()
        (peer,) = torch.autograd.grad(F.max_pool2d(theirs, *window), theirs, dy)
    assert dx.dtype is x.dtype
    assert_close("dx", dx, expected, peer)


def check_double_backward(backend, x, window):
    """The gradient of dx by dy takes the elements at the maxima."""
    y, indices = F.max_pool2d(x.contiguous(), *window, return_indices=True)
    leaf, dy = backend.put(x).requires_grad_(), backend.put(torch.randn_like(y)).requires_grad_()
    (dx,) = torch.autograd.grad(fastconv.max_pool2d(leaf, *window), leaf, dy, create_graph=True)
    upstream = torch.randn_like(x)
    (ddy,) = torch.autograd.grad(dx, dy, backend.put(upstream))
    assert torch.equal(ddy.cpu().flatten(2), upstream.flatten(2).gather(2, indices.flatten(2)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slices"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_indices_and_gradient(backend, case, layout):
    x = lay_out(torch.randn(case.x), layout)
    check_values(backend, x, case.window)
    check_gradient(backend, x, case.window)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fill", FILLS)
def test_ties_infinities_and_nans(backend, fill, layout):
    for case in CASES[:6]:
        x = lay_out(FILLS[fill](case.x), layout)
        check_values(backend, x, case.window)
        check_gradient(backend, x, case.window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(backend, layout, dtype):
    for case in CASES[:6] + CASES[15:]:
        x = lay_out(FILLS["random"](case.x).to(dtype), layout)
        check_values(backend, x, case.window)
        check_gradient(backend, x, case.window, compare_with_torch=dtype in (torch.bfloat16, torch.float16))
        check_double_backward(backend, x, case.window)
        special = lay_out(FILLS["NaN and infinities"](case.x).to(dtype), layout)
        check_values(backend, special, case.window)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        Case("2x2", (2, 35, 16, 18), (2, 2), (2, 2)),
        Case("3x3 s2 p1", (2, 67, 15, 13), (3, 3), (2, 2), (1, 1)),
        Case("large image", (1, 2, 70, 81), (3, 2), (2, 3), (1, 0)),
        Case("large batch", (70, 3, 6, 7), (3, 3), (2, 2)),
    ],
    ids=str,
)
def test_medium(backend, case, layout):
    for dtype in DTYPES:
        x = lay_out(FILLS["ties"](case.x).to(dtype), layout)
        check_values(backend, x, case.window)
        check_gradient(backend, x, case.window)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("taps", [2, 3])
def test_two_apart(backend, taps, layout):
    """Every way to begin and to end a row or column, in rows of less than a vector, of one, and of more."""
    for width in (1, 2, 3, 14, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 66, 67):
        for height in (2, 3, 4, 5):
            for padding in ((0, 0), (1, 0), (0, 1), (1, 1)):
                for ceil_mode in (False, True):
                    if taps > min(height + 2 * padding[0], width + 2 * padding[1]):
                        continue
                    window = ((taps, taps), (2, 2), padding, (1, 1), ceil_mode)
                    size = (2, 2, height, width) if layout == "contiguous" else (2, width + 3, height, 4)
                    check_gradient(backend, lay_out(torch.randint(0, 9, size).float(), layout), window)
                    for fill in ("some -inf", "some NaN"):
                        check_values(backend, lay_out(FILLS[fill](size), layout), window)


class Unmoved(torch.autograd.Function):
    """A constant of x, to autograd."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_no_gradient_is_made_for_the_offsets(backend, monkeypatch):
    """Nor is one made where y has none."""
    arrived, backward = [], fastconv.autograd.MaxPool2d.backward

    def spy(ctx, *gradients):
        arrived.append(gradients)
        return backward(ctx, *gradients)

    monkeypatch.setattr(fastconv.autograd.MaxPool2d, "backward", staticmethod(spy))
    y = fastconv.max_pool2d(backend.put(torch.randn(1, 2, 4, 6)).requires_grad_(), 2)
    y.sum().backward()
    assert arrived[0][0].shape == y.shape and arrived[0][1] is None

    x = backend.put(torch.randn(1, 2, 4, 6)).requires_grad_()
    Unmoved.apply(fastconv.max_pool2d(x, 2)).sum().backward()
    assert arrived[1] == (None, None) and x.grad is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("taps", [2, 3])
def test_offsets_outside_of_windows_two_apart(backend, taps, layout):
    """Image n has the offset n everywhere, which may be none of the window or one outside of x."""
    for padding in (0, 1):
        size, window = (12, 20, 5, 7), ((taps, taps), (2, 2), (padding, padding), 1, False, layout == "channels_last")
        offsets = torch.arange(12).reshape(-1, 1, 1, 1)
        offsets = offsets.expand(F.max_pool2d(torch.empty(size), taps, 2, padding).shape)
        dy = torch.randn(offsets.shape)
        p, q = torch.meshgrid(*(torch.arange(n) for n in dy.shape[2:]), indexing="ij")
        h, w = 2 * p - padding + offsets // taps, 2 * q - padding + offsets % taps
        names_one = (offsets < taps**2) & (h >= 0) & (h < 5) & (w >= 0) & (w < 7)
        indices = torch.where(names_one, 7 * h + w, 0).flatten(2)
        expected = torch.zeros(12, 20, 35).scatter_add(2, indices, (dy * names_one).flatten(2)).view(size)
        dx = fastconv._ops.max_pool2d_backward(
            *(backend.put(lay_out(t, layout)) for t in (dy, offsets.byte())), size, *window
        )
        assert (dx.cpu() - expected).abs().max() <= 4 * 2**-23 * dy.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        Case("3x3 s2, more than a block of channels", (1, 1030, 4, 5), (3, 3), (2, 2), (1, 1)),
        Case("3x3 s2, long rows", (1, 2, 3, 4100), (3, 3), (2, 2), (1, 1)),
        Case("2x2", (3, 40, 56, 57), (2, 2), (2, 2)),
        Case("3x3 s2 p1", (2, 67, 40, 39), (3, 3), (2, 2), (1, 1)),
        Case("3x3 s2", (2, 33, 55, 54), (3, 3), (2, 2)),
        Case("wide window", (1, 5, 90, 80), (40, 30), (7, 9), (3, 4)),
    ],
    ids=str,
)
def test_large(native_backend, case, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x = lay_out(FILLS["ties"](case.x).to(dtype), layout)
        check_values(native_backend, x, case.window)
        check_gradient(native_backend, x, case.window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 112, 113])
def test_gradients_of_more_than_the_caches_hold(native_backend, width, dtype):
    """Of rows of whole cache lines, of which the last vector has one or two, and of other rows."""
    height = 25 * 2**20 // (8 * width * dtype.itemsize)
    for taps, padding in ((3, 1), (2, 0)):
        x = torch.randint(0, 9, (1, 8, height, width)).to(dtype)
        check_gradient(native_backend, x, (taps, 2, padding, 1, False))


@pytest.mark.parametrize(
    ("kernel", "dtype"), [((16, 16), torch.uint8), ((16, 17), torch.uint16), ((256, 257), torch.uint32)]
)
def test_offsets_take_as_few_bytes_as_the_window_allows(native_backend, kernel, dtype):
    x = native_backend.put(torch.randn(1, 1, kernel[0] + 1, kernel[1]))
    window = (kernel, (1, 1), (0, 0), (1, 1), False, False)
    y, offsets = fastconv._ops.max_pool2d_forward(x, *window, True)
    assert offsets.dtype is dtype
    assert torch.equal(offsets.cpu().long().flatten()[:1], x[:, :, :-1].flatten().argmax().cpu().reshape(1))
    check_values(native_backend, x.cpu(), window[:5])
    check_gradient(native_backend, x.cpu(), window[:5])


@pytest.mark.parametrize("kernel", [(70_000, 70_001), (2**31 - 1, 2**31 - 1)], ids=["2^32", "2^62"])
def test_windows_of_more_than_a_32_bit_offset_counts(backend, kernel):
    window = (kernel, kernel, (3, 1), 1, True)
    check_values(backend, torch.randn(2, 3, 5, 4), window)
    check_gradient(backend, torch.randn(2, 3, 5, 4), window)
    with pytest.raises(RuntimeError, match="window has more than 2\\^32 elements"):
        fastconv.max_pool2d(backend.put(torch.randn(1, 1, 1, 1)), 2**20, 1, 2**19)


def test_offsets_are_kept_only_where_something_needs_them(backend):
    x = backend.put(torch.randn(1, 2, 4, 6))
    window = (2, 2, 0, 1, False, False)
    assert fastconv.autograd.max_pool2d(x, *window, return_offsets=False)[1].numel() == 0
    assert fastconv.autograd.max_pool2d(x.requires_grad_(), *window, return_offsets=False)[1].numel() == 12


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_that_name_no_element_of_x_are_passed_over(backend, layout):
    """Image n has the offset n everywhere: one of the window, outside of it, or of a tap outside of x."""
    size, kernel, stride, padding = (40, 3, 4, 6), (2, 3), (2, 2), (1, 1)
    offsets = torch.arange(40).reshape(-1, 1, 1, 1).expand(40, 3, 3, 3)
    x, dy = torch.randn(size), torch.randn(offsets.shape)
    p, q = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    r, s = offsets // 3, offsets % 3
    h, w = 2 * p - 1 + r, 2 * q - 1 + s
    names_one = (r < 2) & (h >= 0) & (h < 4) & (w >= 0) & (w < 6)
    indices = torch.where(names_one, 6 * h + w, 0)
    values = x.flatten(2).gather(2, indices.flatten(2)).view_as(dy) * names_one
    dy *= names_one
    gradient = torch.zeros(40, 3, 24).scatter_add(2, indices.flatten(2), dy.flatten(2)).view(size)

    window = (kernel, stride, padding, 1, False, layout == "channels_last")
    x, dy, offsets = (backend.put(lay_out(t, layout)) for t in (x, dy, offsets.byte()))
    assert torch.equal(fastconv._ops.max_pool2d_indices(offsets, size, *window).cpu(), indices)
    assert torch.equal(fastconv._ops.max_pool2d_gather(x, offsets, *window).cpu(), values)
    dx = fastconv._ops.max_pool2d_backward(dy, offsets, size, *window)
    assert (dx.cpu() - gradient).abs().max() <= 2 * 2**-23 * dy.abs().max()


def test_unbatched_input_and_default_stride(backend):
    x = torch.randn(3, 7, 8)
    y, indices = fastconv.max_pool2d(backend.put(x), 2, return_indices=True)
    expected, expected_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y.cpu(), expected) and torch.equal(indices.cpu(), expected_indices)
    leaf = backend.put(x).requires_grad_()
    fastconv.max_pool2d(leaf, (2, 3), stride=[]).sum().backward()
    assert leaf.grad.shape == x.shape and leaf.grad.sum() == 3 * 3 * 2


@pytest.mark.launches_nothing
def test_empty_batch(backend):
    x = backend.put(torch.empty(0, 3, 6, 7)).requires_grad_()
    y, indices = fastconv.max_pool2d(x, (2, 3), return_indices=True)
    assert y.shape == indices.shape == (0, 3, 3, 2)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_indices_serve_max_unpool(backend):
    x = torch.randn(2, 3, 6, 8)
    y, indices = fastconv.max_pool2d(backend.put(x), 2, return_indices=True)
    unpooled = F.max_unpool2d(y, indices, 2).cpu()
    assert torch.equal(F.max_pool2d(unpooled.abs(), 2) > 0, F.max_pool2d(x, 2) != 0)
    assert torch.equal(unpooled[unpooled != 0], x[unpooled != 0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_every_run(native_backend, layout, threads):
    x = native_backend.put(lay_out(torch.randn(2, 35, 41, 39), layout)).requires_grad_()
    threads(1)
    y = fastconv.max_pool2d(x, 5, 2, 1)
    dy = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, dy)
    for count in (1, 2, 3):
        threads(count)
        again = fastconv.max_pool2d(x, 5, 2, 1)
        assert torch.equal(again, y)
        assert torch.equal(torch.autograd.grad(again, x, dy)[0], first)
