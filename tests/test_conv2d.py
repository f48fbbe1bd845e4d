"""conv2d forward and backward against float64, over sizes, groups, layouts, dtypes and algorithms."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from references import (
    Expected,
    assert_close,
    conv2d_gradients,
    conv2d_reference,
    winograd_reference,
    without_onednn,
)

import fastconv


@dataclass(frozen=True)
class Case:
    """x, w: sizes. stride, padding, dilation: (H, W)."""

    name: str
    x: tuple
    w: tuple
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    @property
    def config(self):
        return self.stride, self.padding, self.dilation, self.groups

    def __str__(self):
        return self.name


# Height differs from width in every parameter, so that no kernel can mix them up.
CASES = [
    Case("plain", (2, 3, 7, 9), (4, 3, 3, 2)),
    Case("padded", (2, 3, 6, 8), (5, 3, 3, 5), padding=(1, 2)),
    Case("strided", (1, 4, 9, 7), (3, 4, 2, 3), stride=(2, 3)),
    Case("strided and padded", (2, 3, 8, 11), (4, 3, 3, 4), stride=(3, 2), padding=(2, 1)),
    Case("dilated", (1, 3, 9, 8), (4, 3, 3, 2), dilation=(2, 3)),
    Case("all at once", (2, 4, 10, 9), (6, 2, 3, 2), (2, 1), (1, 3), (2, 3), 2),
    Case("1x1", (2, 9, 5, 4), (7, 9, 1, 1)),
    Case("1x1 strided", (1, 6, 7, 6), (5, 6, 1, 1), stride=(2, 3)),
    Case("1x1 padded", (1, 3, 3, 4), (4, 3, 1, 1), padding=(2, 1)),
    Case("row", (1, 3, 4, 9), (4, 3, 1, 5), padding=(0, 2)),
    Case("column", (1, 3, 9, 4), (4, 3, 5, 1), padding=(2, 0)),
    Case("grouped", (2, 6, 5, 6), (9, 2, 3, 2), padding=(1, 0), groups=3),
    Case("depthwise", (2, 5, 7, 6), (5, 1, 3, 2), padding=(1, 1), groups=5),
    Case("depthwise, two filters a channel", (1, 4, 6, 7), (8, 1, 2, 3), (2, 1), (1, 2), groups=4),
    Case("1x1 image", (2, 5, 1, 1), (4, 5, 1, 1)),
    Case("1x1 image, padded", (1, 3, 1, 1), (4, 3, 3, 5), padding=(1, 2)),
    Case("kernel as large as the image", (2, 3, 4, 6), (5, 3, 4, 6)),
    Case("kernel larger than the image", (1, 2, 3, 2), (3, 2, 5, 6), padding=(2, 3)),
    Case("rows and columns never read", (1, 3, 8, 9), (4, 3, 3, 2), stride=(4, 5)),
    Case("stride beyond the kernel", (1, 3, 11, 10), (4, 3, 2, 1), stride=(4, 3), padding=(1, 0)),
    Case("padding beyond the kernel", (1, 2, 3, 4), (3, 2, 2, 1), padding=(4, 3)),
    Case("one channel, one filter", (3, 1, 6, 5), (1, 1, 3, 2)),
    Case("odd channels", (1, 17, 5, 6), (19, 17, 3, 2), padding=(1, 0)),
    Case("one image row", (2, 3, 1, 13), (4, 3, 1, 4), stride=(1, 2), padding=(0, 1)),
    Case("one image column", (2, 3, 13, 1), (4, 3, 4, 1), stride=(2, 1), padding=(1, 0)),
    Case("depthwise 3x3", (2, 5, 7, 6), (10, 1, 3, 3), padding=(1, 0), groups=5),
    Case("depthwise 3x3, stride 2", (2, 5, 9, 8), (5, 1, 3, 3), (2, 2), (1, 2), groups=5),
    Case("depthwise 3x3, stride 2, even padding", (1, 3, 10, 7), (6, 1, 3, 3), (2, 2), (0, 1), groups=3),
    Case("depthwise 3x3, stride 2, no padding of rows", (2, 3, 8, 7), (3, 1, 3, 3), (2, 2), (2, 0), groups=3),
    Case("depthwise, large filter", (2, 3, 8, 9), (6, 1, 5, 4), padding=(2, 1), groups=3),
    Case("image smaller than the stride", (1, 8, 2, 1), (8, 8, 3, 5), stride=(1, 4), padding=(1, 7)),
    Case("one pixel, strides", (2, 3, 1, 1), (4, 3, 4, 6), stride=(3, 5), padding=(5, 7)),
]

# Large enough for full tiles, several blocks and split contractions, also where kernels are emulated.
MEDIUM_CASES = [
    Case("full tiles", (2, 40, 11, 13), (70, 40, 3, 3), padding=(1, 1)),
    Case("many filters", (1, 130, 5, 6), (140, 130, 1, 3), padding=(0, 1)),
    Case("long contraction", (1, 300, 4, 5), (17, 300, 3, 3), padding=(1, 1)),
    Case("large image", (1, 2, 67, 70), (3, 2, 3, 5), padding=(1, 2)),
    Case("strided stem", (1, 3, 43, 37), (33, 3, 7, 5), (2, 3), (3, 2)),
    Case("medium 1x1", (2, 100, 9, 8), (75, 100, 1, 1)),
    Case("medium depthwise", (2, 67, 19, 17), (67, 1, 3, 3), (2, 1), (1, 1), groups=67),
    Case("medium groups", (2, 48, 9, 10), (96, 6, 3, 3), padding=(1, 1), groups=8),
    Case("medium dilated", (1, 33, 14, 15), (34, 33, 3, 3), padding=(4, 3), dilation=(4, 3)),
    Case("large batch", (37, 5, 6, 7), (6, 5, 3, 2), padding=(1, 0)),
    Case("patches that fill shared memory", (1, 1, 45, 90), (4, 1, 2, 2), dilation=(35, 1)),
    Case("patches of several channels that fill it", (1, 7, 67, 70), (3, 7, 3, 5), padding=(1, 2)),
    # So many taps that they come in parts, also where there is room for only 30 at a time.
    Case("wide filters", (1, 33, 3, 19), (34, 33, 2, 17), padding=(1, 0)),
    Case("row of taps in unequal parts", (1, 2, 1, 260), (13, 2, 1, 257)),
    Case("column of taps in unequal parts", (1, 2, 260, 1), (13, 2, 257, 1)),
    Case("very wide filter", (2, 2, 3, 310), (3, 2, 2, 290)),
    Case("very tall filter", (2, 2, 310, 3), (3, 2, 290, 2)),
]

LARGE_CASES = [
    Case("dense", (3, 40, 29, 31), (70, 40, 3, 3), padding=(1, 1)),
    Case("strided stem", (2, 3, 67, 53), (40, 3, 7, 5), (2, 3), (3, 2)),
    Case("many filters", (2, 130, 9, 8), (260, 130, 3, 1), padding=(1, 0)),
    Case("long contraction", (1, 600, 5, 6), (33, 600, 3, 3), padding=(1, 1)),
    Case("large image, few channels", (2, 2, 131, 117), (3, 2, 3, 5), padding=(1, 2)),
    Case("wide 1x1", (2, 200, 15, 17), (150, 200, 1, 1)),
    Case("wide depthwise", (2, 67, 33, 35), (67, 1, 3, 3), (2, 1), (1, 1), groups=67),
    Case("grouped, wide", (2, 48, 20, 21), (96, 6, 3, 3), padding=(1, 1), groups=8),
    Case("dilated, wide", (1, 33, 30, 31), (34, 33, 3, 3), padding=(4, 3), dilation=(4, 3)),
]

IMPLICIT = ("implicit_gemm_tile", "implicit_gemm_registers", "implicit_gemm_vectors", "implicit_gemm")
LAYOUTS = ("contiguous", "channels_last", "channels_last input", "channels_last weight", "slices")


def lay_out(tensor, layout, is_weight=False):
    """The same values in another order in memory."""
    wants_channels_last = {
        "channels_last": True,
        "channels_last input": not is_weight,
        "channels_last weight": is_weight,
    }
    if wants_channels_last.get(layout, False):
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout != "slices":
        return tensor.contiguous()
    # Every second element of each dimension of a larger tensor, whose last two dimensions are swapped.
    n, c, h, w = tensor.shape
    base = torch.full((2 * n, 2 * c, 2 * w, 2 * h), float("nan"), dtype=tensor.dtype)
    view = base.mT[::2, ::2, ::2, ::2]
    return view.copy_(tensor)


def inputs_of(case, dtype, layout="contiguous", bias=True):
    """x, w, bias and dy. dy is in the same layout as x."""
    x, w = torch.randn(case.x, dtype=dtype), torch.randn(case.w, dtype=dtype)
    b = torch.randn(case.w[0], dtype=dtype) if bias else None
    with without_onednn():
        dy = torch.randn_like(F.conv2d(x, w, None, *case.config))
    return lay_out(x, layout), lay_out(w, layout, is_weight=True), b, lay_out(dy, layout)


def winograd_directions(backend, case, dtype, layout, algo):
    """Those of fprop, dgrad and wgrad whose sums are formed by Winograd's algorithm, which has bounds of its own."""
    if backend.name != "cpu":
        return []
    x, w = (torch.empty(size, dtype=dtype, device="meta") for size in (case.x, case.w))
    if layout.startswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    directions = ("fprop", "dgrad", "wgrad")
    plans = {d: fastconv.plan(x, w, *case.config, direction=d, arch="cpu", algo=algo) for d in directions}
    return [direction for direction, plan in plans.items() if plan.algo == "winograd"]


def check(backend, case, dtype, layout="contiguous", algo=None, bias=True, compare_with_torch=False):
    tensors = inputs_of(case, dtype, layout, bias)
    winograd = winograd_directions(backend, case, dtype, layout, algo)
    if winograd:
        expected = winograd_reference(*tensors, case.padding, case.groups, winograd)
    else:
        expected = conv2d_reference(*tensors, *case.config)
    x, w, b, dy = map(backend.put, tensors)

    def ours(x, w, b):
        return fastconv.conv2d(x, w, b, *case.config, algo=algo)

    def theirs(x, w, b):
        return F.conv2d(x, w, b, *case.config)

    actual = conv2d_gradients(ours, x, w, b, dy)
    peers = conv2d_gradients(theirs, *(t.contiguous() for t in (x, w, b)), dy) if compare_with_torch else [None] * 4
    for name, result, reference, peer in zip(("y", "dx", "dw", "db"), actual, expected, peers, strict=True):
        if reference is not None:
            assert result.dtype is dtype
            assert_close(name, result, reference, peer)


def check_relu(backend, case, dtype, layout="contiguous", algo=None, bias=True):
    """ReLU(y), and the gradients of y at dy where ReLU(y) came out positive."""
    x, w, b, dy = inputs_of(case, dtype, layout, bias)

    def ours(x, w, b):
        return fastconv.conv2d(x, w, b, *case.config, algo=algo, activation="relu")

    y, *actual = conv2d_gradients(ours, *map(backend.put, (x, w, b, dy)))
    reference, *expected = conv2d_reference(x, w, b, torch.where(y.cpu() > 0, dy, 0), *case.config)
    assert (y >= 0).all() and (y > 0).any() and (y == 0).any()
    assert_close("y", y, Expected(reference.value.relu(), reference.magnitude, reference.terms))
    for name, result, gradient in zip(("dx", "dw", "db"), actual, expected, strict=True):
        if gradient is not None:
            assert_close(name, result, gradient)


def check_every_value(backend, dtype):
    """Every number of a two-byte dtype times some others: x·w is exact in float32 and rounded once."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 256, 256)
    w = torch.tensor([1, -1, 0.3, 1.75, 2**-9, 2**-14 / 3, 777], dtype=dtype).reshape(-1, 1, 1, 1)
    expected = (x.float() * w.float().flatten()[:, None, None]).to(dtype)
    y = fastconv.conv2d(backend.put(x), backend.put(w)).cpu()
    is_nan = expected.isnan()
    assert torch.equal(y.isnan(), is_nan)
    different = (y != expected) & ~is_nan
    assert not different.any(), f"{different.sum()} of {y.numel()}: {y[different][:3]} for {expected[different][:3]}"


def algorithm_or_skip(backend, case, algo):
    """Skips what the algorithm refuses, which must then be a ValueError that says why."""
    x, w, _, _ = inputs_of(case, torch.float32)
    try:
        fastconv.conv2d(backend.put(x), backend.put(w), None, *case.config, algo=algo)
    except ValueError as error:
        assert algo in str(error) and len(str(error)) > len(algo) + 10
        pytest.skip(str(error))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(backend, case, layout):
    check(backend, case, torch.float32, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:6] + CASES[11:14] + CASES[25:], ids=str)
def test_dtypes(backend, case, layout, dtype):
    check(backend, case, dtype, layout, compare_with_torch=dtype is not torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_low_precision(backend, dtype):
    check_every_value(backend, dtype)


@pytest.mark.parametrize(
    "algo", ["direct_naive", "direct", "im2col", *IMPLICIT, "depthwise", "grouped", "mma", "winograd"]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_algorithms(backend, case, layout, algo):
    if algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    if algo == "mma":
        pytest.skip("multiplies float32 in three products of tf32: test_conv2d_mma.py")
    algorithm_or_skip(backend, case, algo)
    check(backend, case, torch.float32, layout, algo)


@pytest.mark.parametrize("algo", ["direct_naive", "direct", "im2col"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes_by_algorithm(backend, layout, dtype, algo):
    if algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    for case in (CASES[1], CASES[5]):
        check(backend, case, dtype, layout, algo)


def test_every_algorithm_is_tested(backend):
    marks = {mark.args[0]: mark.args[1] for mark in test_algorithms.pytestmark}
    assert set(backend.algorithms) <= set(marks["algo"])
    check(backend, CASES[0], torch.float32)


@pytest.mark.parametrize("algo", [None, "direct", "im2col", "implicit_gemm", "depthwise", "grouped"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", MEDIUM_CASES, ids=str)
def test_medium(backend, case, layout, algo):
    if algo and algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    algorithm_or_skip(backend, case, algo)
    check(backend, case, torch.float32, layout, algo)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", MEDIUM_CASES, ids=str)
def test_medium_dtypes(backend, case, layout, dtype):
    check(backend, case, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large(native_backend, case, layout):
    check(native_backend, case, torch.float32, layout)


@pytest.mark.parametrize("algo", ["direct", "im2col", "depthwise", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large_by_algorithm(native_backend, case, dtype, algo):
    algorithm_or_skip(native_backend, case, algo)
    check(native_backend, case, dtype, "channels_last", algo)


@pytest.mark.parametrize("algo", ["direct_naive", "direct", "im2col", *IMPLICIT, "depthwise", "grouped"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:8] + CASES[11:14] + CASES[25:], ids=str)
def test_relu_by_algorithm(backend, case, layout, algo):
    if algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    algorithm_or_skip(backend, case, algo)
    check_relu(backend, case, torch.float32, layout, algo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", MEDIUM_CASES[:8], ids=str)
def test_relu_medium(backend, case, layout, dtype):
    check_relu(backend, case, dtype, layout, bias=case is not MEDIUM_CASES[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_keeps_nan_and_the_sign_of_zero(backend, layout):
    """As torch.relu, with every algorithm, of vectors and of single elements."""
    zeros = torch.full((1, 17, 5, 7), -0.0)
    nan = zeros.clone()
    nan[0, 3, 2, 2] = torch.nan
    for case, w in (((17, 17, 1, 1), torch.eye(17)), ((17, 1, 1, 1), torch.ones(17, 1))):
        w = w.reshape(case)
        groups = 17 // case[1]
        for algo in backend.algorithms:
            if algo in ("mma", "winograd") or (algo in ("depthwise", "grouped")) != (groups == 17):
                continue
            for x in (zeros, nan):
                x = backend.put(lay_out(x, layout))
                y = fastconv.conv2d(x, backend.put(w), groups=groups, algo=algo)
                fused = fastconv.conv2d(x, backend.put(w), groups=groups, algo=algo, activation="relu")
                assert torch.equal(y.relu().view(torch.int32), fused.view(torch.int32)), algo
                assert fused.isnan().any() == x.isnan().any()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='gelu': expected 'relu' or None"):
        fastconv.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), activation="gelu")


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_relu_with_gradients_of_some_inputs_only(backend, frozen):
    case, names = CASES[5], ("input", "weight", "bias")
    *tensors, dy = inputs_of(case, torch.float32)
    leaves = dict(zip(names, (backend.put(t).requires_grad_() for t in tensors), strict=True))
    leaves[frozen].requires_grad_(False)
    y = fastconv.conv2d(*leaves.values(), *case.config, activation="relu")
    y.backward(backend.put(dy))
    dz = torch.where(y.cpu() > 0, dy, 0)
    expected = dict(zip(names, conv2d_reference(*tensors, dz, *case.config)[1:], strict=True))
    assert leaves[frozen].grad is None
    for name in names:
        if name != frozen:
            assert_close(name, leaves[name].grad, expected[name])


@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("algo", ["direct_naive", "direct", "im2col", *IMPLICIT])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinity_reaches_only_what_reads_it(backend, layout, algo, which):
    """Elsewhere not even a product with zero is made of it, which would be NaN."""
    if algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    for case in (CASES[0], CASES[3], CASES[11]):
        x, w, b, dy = inputs_of(case, torch.float32, layout)
        infinite = x if which == "x" else dy
        infinite[0, 1, infinite.shape[2] // 2, infinite.shape[3] // 2] = torch.inf
        expected = conv2d_reference(x, w, b, dy, *case.config)

        def ours(x, w, b, case=case):
            return fastconv.conv2d(x, w, b, *case.config, algo=algo)

        actual = conv2d_gradients(ours, *map(backend.put, (x, w, b, dy)))
        for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
            assert torch.equal(result.cpu().isfinite(), reference.value.isfinite()), f"{case}: {name}"


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_gradients_of_some_inputs_only(backend, frozen):
    case = CASES[5]
    names, tensors = ("input", "weight", "bias"), inputs_of(case, torch.float32)
    expected = dict(zip(names, conv2d_reference(*tensors, *case.config)[1:], strict=True))
    leaves = dict(zip(names, (backend.put(t).requires_grad_() for t in tensors[:3]), strict=True))
    leaves[frozen].requires_grad_(False)
    fastconv.conv2d(*leaves.values(), *case.config).backward(backend.put(tensors[3]))
    assert leaves[frozen].grad is None
    for name in names:
        if name != frozen:
            assert_close(name, leaves[name].grad, expected[name])


def test_without_bias(backend):
    for case in CASES[:4]:
        check(backend, case, torch.float32, bias=False)


def test_unbatched_input(backend):
    case = Case("", (1, 3, 6, 8), (5, 3, 3, 2), (2, 1), (1, 2))
    x, w, b, dy = inputs_of(case, torch.float32)
    expected = conv2d_reference(x, w, b, dy, *case.config)
    x, w, b, dy = map(backend.put, (x.squeeze(0), w, b, dy.squeeze(0)))
    y, dx, dw, db = conv2d_gradients(lambda *inputs: fastconv.conv2d(*inputs, *case.config), x, w, b, dy)
    assert y.shape == (5, 3, 11) and dx.shape == x.shape
    for result, reference in zip((y.unsqueeze(0), dx.unsqueeze(0), dw, db), expected, strict=True):
        assert_close("unbatched", result, reference)


@pytest.mark.launches_nothing
def test_empty_batch(backend):
    w, b = backend.put(torch.randn(4, 3, 3, 2)).requires_grad_(), backend.put(torch.randn(4)).requires_grad_()
    x = backend.put(torch.empty(0, 3, 6, 7)).requires_grad_()
    y = fastconv.conv2d(x, w, b, padding=1)
    assert y.shape == (0, 4, 6, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any() and not b.grad.any()


@pytest.mark.parametrize("algo", [None, "direct", "im2col", *IMPLICIT])
def test_a_sum_over_no_channels_is_the_bias(backend, algo):
    """torch on a CPU returns no output channels here, whatever the weight says."""
    if algo and algo not in backend.algorithms:
        pytest.skip(f"{algo} is not an algorithm of this backend")
    x, w, b = backend.put(torch.empty(2, 0, 6, 7)), backend.put(torch.empty(4, 0, 3, 2)), backend.put(torch.randn(4))
    y = fastconv.conv2d(x, w, b, algo=algo)
    assert torch.equal(y, b[:, None, None].expand(2, 4, 4, 6))
    assert fastconv.conv2d(x.to("meta"), w.to("meta"), b.to("meta")).shape == y.shape


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(backend, padding):
    x, w, b = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 4, 3), torch.randn(4)
    expected = F.conv2d(x.double(), w.double(), b.double(), padding=padding, dilation=(1, 2))
    y = fastconv.conv2d(*map(backend.put, (x, w, b)), padding=padding, dilation=(1, 2))
    bound = F.conv2d(x.abs().double(), w.abs().double(), b.abs().double(), padding=padding, dilation=(1, 2)).max()
    assert y.shape == expected.shape
    assert (y.cpu() - expected).abs().max() <= (3 * 4 * 3 + 1) * 2**-23 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c for c in CASES if "image" not in c.name], ids=str)
def test_memory_format_is_torchs(native_backend, case, layout, dtype):
    x, w, _, _ = map(native_backend.put, inputs_of(case, dtype, layout))
    with without_onednn():
        theirs = F.conv2d(x, w, None, *case.config)
    assert fastconv.conv2d(x, w, None, *case.config).stride() == theirs.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_every_run(native_backend, layout, threads):
    for case in [*LARGE_CASES, *CASES[:6]]:
        for algo in (None, *native_backend.algorithms):
            tensors = [native_backend.put(t) for t in inputs_of(case, torch.float32, layout)]

            def conv2d(x, w, b, config=case.config, algo=algo):
                return fastconv.conv2d(x, w, b, *config, algo=algo)

            try:
                threads(1)
                first = conv2d_gradients(conv2d, *tensors)
            except ValueError:  # the algorithm cannot do this problem
                continue
            for count in (1, 2, 3):
                threads(count)
                for a, b in zip(first, conv2d_gradients(conv2d, *tensors), strict=True):
                    assert torch.equal(a, b), f"{case}, algo {algo}: {count} threads give other bits than one"


def test_autocast_casts_as_torch_does(native_backend):
    device = native_backend.device
    x, w, b = (native_backend.put(t) for t in inputs_of(CASES[0], torch.float32)[:3])
    w.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y, theirs = fastconv.conv2d(x, w, b), F.conv2d(x, w, b)
    assert y.dtype is theirs.dtype is torch.bfloat16
    expected = conv2d_reference(x.bfloat16(), w.bfloat16(), b.bfloat16(), torch.zeros(y.shape), *CASES[0].config)
    assert_close("y", y, expected[0])
    y.float().sum().backward()
    assert w.grad.dtype is torch.float32


def test_what_no_kernel_computes_goes_to_torch_with_one_warning():
    x, w = torch.randn(1, 2, 5, 6, dtype=torch.complex64), torch.randn(3, 2, 2, 3, dtype=torch.complex64)
    fastconv._arguments.warned.clear()
    with pytest.warns(UserWarning, match="fastconv has no conv2d kernel for torch.complex64 on cpu"):
        y = fastconv.conv2d(x, w)
    assert torch.equal(y, F.conv2d(x, w))
    with pytest.raises(ValueError, match="algo='direct'.*complex64"):
        fastconv.conv2d(x, w, algo="direct")
