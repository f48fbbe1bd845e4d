"""Depthwise convolution on a CPU.

3×3 in NCHW: strides, paddings, tails of rows, blocks of rows, groups of planes. NHWC: channels that fill vectors and
that do not, taps that lie outside, tiles of all widths, odd rows, tasks of several rows or of some channels.
"""

import itertools

import pytest
import test_conv2d
import torch
from conftest import Backend
from references import conv2d_gradients, conv2d_reference
from test_conv2d import Case

import fastconv

CPU = Backend("cpu", "cpu")


def case_of(channels, height, width, stride, padding):
    name = f"{channels} planes of {height}x{width}, stride {stride}, padding {padding}"
    return Case(name, (2, channels, height, width), (channels, 1, 3, 3), stride, padding, groups=channels)


SIZES = ((3, 7, 9), (3, 1, 3), (3, 2, 2), (3, 4, 31), (3, 17, 16), (11, 6, 33), (3, 150, 70))
PADDINGS = tuple(itertools.product((0, 1, 2), (0, 1, 2)))
CASES = [
    case_of(*size, stride, padding)
    for size, stride, padding in itertools.product(SIZES, ((1, 1), (2, 2), (1, 2)), PADDINGS)
    if min(size[1] + 2 * padding[0], size[2] + 2 * padding[1]) >= 3
]


NHWC_SIZES = ((40, 7, 13), (19, 1, 3), (16, 2, 2), (130, 3, 6))
NHWC_CASES = [
    *(
        case_of(*size, (stride, stride), padding)
        for size, stride, padding in itertools.product(NHWC_SIZES, (1, 2), ((0, 0), (1, 1), (0, 1), (2, 2), (3, 4)))
        if min(size[1] + 2 * padding[0], size[2] + 2 * padding[1]) >= 3
    ),
    case_of(18, 8, 10, (2, 2), (1, 1)),
    case_of(17, 2, 150, (1, 1), (1, 1)),
    case_of(3, 9, 20, (1, 1), (1, 1)),
    Case("two vectors and a half", (2, 40, 7, 9), (40, 1, 3, 3), padding=(1, 1), groups=40),
    Case("stride 2", (1, 35, 9, 8), (35, 1, 3, 3), (2, 2), (1, 1), groups=35),
    Case("5x4", (1, 19, 8, 9), (19, 1, 5, 4), padding=(2, 3), groups=19),
    Case("no output reads inside with all taps", (1, 17, 3, 2), (17, 1, 3, 4), (1, 1), (1, 2), groups=17),
    Case("dilation", (1, 33, 9, 11), (33, 1, 3, 3), (1, 2), (2, 3), (2, 3), 33),
    Case("tasks of several rows", (2, 18, 61, 5), (18, 1, 3, 3), padding=(1, 1), groups=18),
]


def check(case, dtype, layout="contiguous"):
    try:
        test_conv2d.check(CPU, case, dtype, layout, "depthwise")
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_depthwise_3x3(isas, isa):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    fastconv._introspect.use_isa(isa)
    for case in CASES:
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_depthwise_3x3_of_other_types(isas, isa, dtype):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    fastconv._introspect.use_isa(isa)
    for case in CASES[::7]:
        check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_channels_last(isas, isa, dtype):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    fastconv._introspect.use_isa(isa)
    for case in NHWC_CASES:
        check(case, dtype, "channels_last")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_an_infinity_reaches_only_what_reads_it(which, stride, layout):
    """Not the end of the row above, whose vector goes on into its row. NHWC leaves out padding, of which the reference
    makes NaN: there the infinity lies where no tap does."""
    case = case_of(3 if layout == "contiguous" else 18, 9, 21, stride, (1, 1))
    x, w, b, dy = test_conv2d.inputs_of(case, torch.float32, layout)
    (x if which == "x" else dy)[1, 1, 3, 0 if layout == "contiguous" else 1] = torch.inf
    expected = conv2d_reference(x, w, b, dy, *case.config)
    actual = conv2d_gradients(lambda *t: fastconv.conv2d(*t, *case.config, algo="depthwise"), x, w, b, dy)
    for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        assert torch.equal(result.isfinite(), reference.value.isfinite()), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stride, padding", [((1, 1), (0, 0)), ((2, 2), (1, 1))])
def test_an_infinity_at_the_end_of_a_row_does_not_reach_outputs_that_are_not_there(stride, padding, layout):
    """Its column would be the first tap's of an output past the last one, whose dy is padding."""
    case = case_of(3 if layout == "contiguous" else 18, 9, 20, stride, padding)
    x, w, b, dy = test_conv2d.inputs_of(case, torch.float32, layout)
    x[1, 1, 3, -1] = torch.inf
    expected = conv2d_reference(x, w, b, dy, *case.config)
    actual = conv2d_gradients(lambda *t: fastconv.conv2d(*t, *case.config, algo="depthwise"), x, w, b, dy)
    for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        assert torch.equal(result.isfinite(), reference.value.isfinite()), name


def test_the_plan_names_the_kernel():
    def kernel(layout=torch.contiguous_format, taps=3, **config):
        x = torch.empty(2, 32, 14, 15, device="meta", memory_format=layout)
        return fastconv.plan(x, torch.empty(32, 1, taps, 3, device="meta"), groups=32, arch="cpu", **config).kernel

    assert kernel() == kernel(padding=2) == kernel(stride=2, padding=1) == "conv2d_depthwise_3x3_fprop"
    assert kernel(torch.channels_last, padding=3) == kernel(torch.channels_last, stride=2) == kernel()
    others = (
        kernel(torch.channels_last, dilation=2),
        kernel(torch.channels_last, stride=(1, 2), padding=1),
        kernel(taps=2),
        kernel(dilation=2),
        kernel(padding=3),
        kernel(stride=2),
        kernel(stride=(1, 2), padding=1),
    )
    assert set(others) == {"conv2d_depthwise_fprop"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_bits_do_not_depend_on_threads(threads, layout):
    for case in (case_of(3, 40, 17, (1, 1), (1, 1)), case_of(40, 6, 9, (2, 2), (1, 1))):
        tensors, results = test_conv2d.inputs_of(case, torch.float32, layout), []
        for count in (1, 2, 5):
            threads(count)
            results.append(conv2d_gradients(lambda *t, case=case: fastconv.conv2d(*t, *case.config), *tensors))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
