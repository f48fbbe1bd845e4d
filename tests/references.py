"""What the ops should compute, in float64 by torch, and how far from it rounding may take them.

The bounds come from the inputs alone (Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4): a sum
of n products, added in any order, is off by at most γ_n = n·u / (1 − n·u) times the same sum of absolute values. They
are compared with the largest error and the largest such sum over a tensor, so that they also hold for methods that are
accurate by the norm only. Nothing in them is tuned.
"""

import contextlib
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

LOW_PRECISION = (torch.float16, torch.bfloat16)


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def gamma(terms, dtype):
    return terms * unit_roundoff(dtype) / (1 - terms * unit_roundoff(dtype))


def accumulator(dtype):
    """The type that sums of this dtype are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@contextlib.contextmanager
def without_onednn():
    """torch's own kernels: oneDNN crashes on some valid convolutions (see test_pains.py)."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@dataclass
class Expected:
    """The exact result, and the same sums over absolute values; `terms` products each. Both float64 on the CPU."""

    value: torch.Tensor
    magnitude: torch.Tensor
    terms: int

    def bound(self, dtype):
        """How far the largest error of a result in this dtype may be, by rounding alone."""
        if self.value.numel() == 0:
            return 0.0
        sums = self.magnitude.max().item()
        # Ours in the accumulator's precision, and torch's in float64.
        error = (gamma(self.terms, accumulator(dtype)) + gamma(self.terms, torch.float64)) * sums
        if dtype in LOW_PRECISION:  # and the result is rounded once more; below the normal numbers that is absolute
            error += unit_roundoff(dtype) * (self.value.abs().max().item() + error)
            error += torch.finfo(dtype).tiny * unit_roundoff(dtype)
        return error


def largest_error(actual, value):
    """Over a tensor. Infinite if the two disagree about NaNs or infinities."""
    assert actual.shape == value.shape, f"shape {tuple(actual.shape)}, expected {tuple(value.shape)}"
    actual, value = actual.detach().cpu().double(), value.double()
    finite = value.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(0.5), value[~finite].nan_to_num(0.5)):
        return float("inf")
    difference = (actual - value)[finite].abs()
    if difference.isnan().any():
        return float("inf")
    return difference.max().item() if difference.numel() else 0.0


def assert_close(name, actual, expected, peer=None):
    """Within the rounding bound and, if torch's result in the same low precision is given, twice its error."""
    error, bound = largest_error(actual, expected.value), expected.bound(actual.dtype)
    assert error <= bound, f"{name}: the largest error is {error:.3g}, the bound for rounding {bound:.3g}"
    if peer is not None:
        peer_error = largest_error(peer, expected.value)
        assert error <= 2 * peer_error, f"{name}: the largest error is {error:.3g}, torch's own is {peer_error:.3g}"


def _double(tensor):
    return tensor.detach().cpu().double() if tensor is not None else None


def conv2d_gradients(conv2d, x, w, bias, dy):
    """(y, dx, dw, dbias or None) of y = conv2d(x, w, bias)."""
    inputs = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
    y = conv2d(*inputs) if bias is not None else conv2d(*inputs, None)
    grads = torch.autograd.grad(y, inputs, dy)
    return y.detach(), *grads, *([None] if bias is None else [])


def conv2d_reference(x, w, bias, dy, stride, padding, dilation, groups):
    """Expected y, dx, dw and dbias (None without a bias) of a batched convolution."""
    x, w, bias, dy = map(_double, (x, w, bias, dy))

    def conv2d(x, w, bias):
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)

    absolute = [t.abs() if t is not None else None for t in (x, w, bias, dy)]
    with without_onednn():
        values = conv2d_gradients(conv2d, x, w, bias, dy)
        magnitudes = conv2d_gradients(conv2d, *absolute)
    filters, channels, r, s = w.shape
    n, _, p, q = dy.shape
    terms = (channels * r * s + 1, filters // groups * r * s, n * p * q, n * p * q)
    return [
        Expected(*result) if result[0] is not None else None for result in zip(values, magnitudes, terms, strict=True)
    ]


POINTS = (Fraction(0), Fraction(11, 16), Fraction(-11, 16), Fraction(23, 16), Fraction(-23, 16))  # and infinity


def toom_cook(outputs, taps):
    """Aᵀ, G and Bᵀ of Winograd's F(outputs, taps) from POINTS and infinity, in fractions:
    y[p] = Σ_q g[q] d[p + q] = Σ_f Aᵀ[p][f] (G g)[f] (Bᵀ d)[f].
    """

    def product(factors):
        """The coefficients of Π (z − a), lowest first."""
        coefficients = [Fraction(1)]
        for a in factors:
            shifted, scaled = [Fraction(0), *coefficients], [a * c for c in (*coefficients, Fraction(0))]
            coefficients = [s - c for s, c in zip(shifted, scaled, strict=True)]
        return coefficients

    a, g, b = [], [], []
    for point in POINTS:
        others = [p for p in POINTS if p != point]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        a.append([point**p for p in range(outputs)])
        g.append([point**q / scale for q in range(taps)])
        b.append([*product(others), Fraction(0)])
    a.append([Fraction(int(p == outputs - 1)) for p in range(outputs)])
    g.append([Fraction(int(q == taps - 1)) for q in range(taps)])
    b.append(product(POINTS))
    return [list(row) for row in zip(*a, strict=True)], g, b


def winograd_magnitudes(x, w, dy, padding, groups):
    """The sums of conv2d_reference's magnitudes as Winograd's tiles of 6×6 form them: every matrix in absolute values,
    so that nothing cancels, neither in the products nor in the transforms. What rounding does to a value anywhere on
    the way is in proportion to them (Barabasz and others, 2020). x, w, dy: absolute values in float64. Returns those of
    y, dx and dw, the last for pieces of 3×3 taps.
    """
    taps = w.shape[2]

    def absolute(matrix):
        return torch.tensor(matrix, dtype=torch.float64).abs()

    def matrices(outputs, taps):
        return [absolute([[float(v) for v in row] for row in m]) for m in toom_cook(outputs, taps)]

    def tiles(t, top, left, outputs, size, step):
        """[N][groups][C/groups][tile][tile][size][size]"""
        rows, cols = (-(-n // step) * step + size - step for n in outputs)
        t = F.pad(t, (left, cols - left - t.shape[3], top, rows - top - t.shape[2]))
        return t.unflatten(1, (groups, -1)).unfold(3, size, step).unfold(4, size, step)

    def both(matrix, t):
        return torch.einsum("ia,...ab,jb->...ij", matrix, t, matrix)

    def gather(t, w, padding, outputs):  # w: [groups][produced][contracted][taps][taps]
        a, g, b = matrices(7 - taps, taps)
        t = both(b, tiles(t, *padding, outputs, 6, 7 - taps))
        return both(a, torch.einsum("ngchwij,gkcij->ngkhwij", t, both(g, w)))

    w = w.unflatten(0, (groups, -1))
    y = gather(x, w, padding, dy.shape[2:])
    dx = gather(dy, w.flip(3, 4).transpose(1, 2), [taps - 1 - p for p in padding], x.shape[2:])
    a, g, b = matrices(3, 4)
    d = both(g, tiles(dy, 0, 0, dy.shape[2:], 4, 4))
    sums = [
        torch.einsum("ngchwij,ngkhwij->gkcij", both(b, tiles(x, padding[0] - r, padding[1] - s, dy.shape[2:], 6, 4)), d)
        for r in range(0, taps, 3)
        for s in range(0, taps, 3)
    ]
    return y, dx, both(a, torch.stack(sums))


# Roundings of a value in Winograd's transforms: at most six in each direction of each of the three.
WINOGRAD_ROUNDINGS = 36


def winograd_reference(x, w, bias, dy, padding, groups, directions):
    """As conv2d_reference, with the bounds of Winograd's algorithm for those of fprop, dgrad and wgrad that take it."""
    expected = conv2d_reference(x, w, bias, dy, 1, padding, 1, groups)
    tiles = dy.shape[0] * -(-dy.shape[2] // 4) * -(-dy.shape[3] // 4)  # of wgrad
    terms = (w.shape[1] + 1, w.shape[0] // groups, tiles)
    sums = winograd_magnitudes(*(_double(t).abs() for t in (x, w, dy)), padding, groups)
    for at, direction in enumerate(("fprop", "dgrad", "wgrad")):
        if direction in directions:
            magnitude = sums[at].max() + (bias.abs().max().double() if at == 0 and bias is not None else 0)
            expected[at] = Expected(expected[at].value, magnitude, terms[at] + WINOGRAD_ROUNDINGS)
    return expected


def max_pool2d_backward_reference(x, dy, kernel_size, stride, padding, dilation, ceil_mode):
    """Expected dx. Each is a sum of at most as many dy as the window has elements, or as there are in a plane."""
    dx = []
    for upstream in (_double(dy), _double(dy).abs()):
        leaf = _double(x).contiguous().requires_grad_()
        y = F.max_pool2d(leaf, kernel_size, stride, padding, dilation, ceil_mode)
        dx += torch.autograd.grad(y, leaf, upstream)
    r, s = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return Expected(*dx, terms=min(r * s, dy.shape[-2] * dy.shape[-1]))


def avg_pool2d_reference(pool, x, dy, taps):
    """Expected y and dx of pool(x), whose weights have all the same sign. `taps`: of the largest window."""
    results = []
    for tensor, upstream in ((_double(x), _double(dy)), (_double(x).abs(), _double(dy).abs())):
        leaf = tensor.contiguous().requires_grad_()
        y = pool(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, upstream)))
    terms = taps + 3  # the divisor is rounded, its reciprocal may be, and so is the quotient
    return [Expected(value, magnitude.abs(), terms) for value, magnitude in zip(*results, strict=True)]
