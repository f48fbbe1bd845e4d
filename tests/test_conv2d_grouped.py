"""Grouped convolution on a CPU: blocks of groups, runs of taps, staged rows and columns, tails of all of them."""

import pytest
import test_conv2d
import torch
from conftest import Backend
from references import conv2d_gradients, conv2d_reference
from test_conv2d import Case

import fastconv

CPU = Backend("cpu", "cpu")

# Vectors hold 2 to 16 channels: groups that share one, fill one or several, or leave lanes idle in the last.
CASES = [
    Case("groups of 2", (2, 26, 7, 9), (26, 2, 3, 3), padding=(1, 1), groups=13),
    Case("groups of 3", (1, 21, 6, 8), (21, 3, 3, 3), padding=(1, 0), groups=7),
    Case("groups of 4", (2, 20, 9, 17), (20, 4, 3, 3), padding=(1, 1), groups=5),
    Case("groups of 8", (1, 24, 8, 33), (24, 8, 3, 3), padding=(1, 1), groups=3),
    Case("groups of 12", (1, 24, 7, 9), (24, 12, 3, 3), padding=(0, 1), groups=2),
    Case("groups of 16", (2, 48, 14, 14), (48, 16, 3, 3), padding=(1, 1), groups=3),
    Case("groups of 24", (1, 48, 6, 11), (48, 24, 3, 3), padding=(1, 1), groups=2),
    Case("groups of 37", (1, 74, 6, 7), (74, 37, 3, 3), padding=(1, 1), groups=2),
    Case("groups of 38", (1, 76, 5, 6), (76, 38, 3, 3), padding=(1, 1), groups=2),
    Case("more filters than channels", (2, 6, 9, 10), (21, 2, 3, 3), padding=(1, 1), groups=3),
    Case("more channels than filters", (2, 21, 9, 10), (6, 7, 3, 3), padding=(1, 1), groups=3),
    Case("one channel, many filters", (2, 3, 9, 10), (60, 1, 3, 3), padding=(1, 1), groups=3),
    Case("many channels, one filter", (2, 60, 9, 10), (3, 20, 3, 3), padding=(1, 1), groups=3),
    Case("1x1", (2, 24, 5, 7), (24, 8, 1, 1), groups=3),
    Case("5x4", (1, 16, 9, 11), (16, 4, 5, 4), padding=(2, 1), groups=4),
    Case("1x7", (1, 16, 5, 19), (16, 4, 1, 7), padding=(0, 3), groups=4),
    Case("stride 2", (2, 24, 11, 13), (24, 8, 3, 3), (2, 2), (1, 1), groups=3),
    Case("stride 2, dilation 2", (1, 12, 12, 15), (12, 4, 3, 3), (2, 2), (2, 3), (2, 2), 3),
    Case("strides 3 and 5", (1, 12, 14, 17), (12, 4, 4, 3), (3, 5), (2, 1), groups=3),
    Case("stride beyond the kernel", (1, 8, 31, 40), (8, 4, 2, 2), (9, 11), groups=2),
    Case("stride beyond the image", (1, 8, 3, 2), (8, 4, 3, 3), (7, 8), (2, 2), groups=2),
    Case("dilation", (1, 12, 13, 17), (12, 4, 3, 3), padding=(3, 4), dilation=(3, 4), groups=3),
    Case("taps far apart", (1, 8, 83, 71), (8, 4, 3, 2), padding=(2, 30), dilation=(40, 65), groups=2),
    Case("rows in several blocks of columns", (1, 8, 5, 300), (8, 4, 3, 3), padding=(1, 1), groups=2),
    Case("many rows", (1, 8, 150, 3), (8, 4, 3, 3), padding=(1, 1), groups=2),
    Case("phases in several blocks of columns", (1, 8, 6, 301), (8, 4, 3, 3), (2, 2), (1, 1), groups=2),
    Case("padding beyond the kernel", (1, 8, 3, 4), (8, 4, 2, 3), padding=(4, 5), groups=2),
    Case("one row, one column", (3, 8, 1, 1), (8, 4, 3, 3), padding=(1, 1), groups=2),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_grouped(isas, isa, dtype, layout):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    if isa == "avx512_bf16" and dtype is not torch.bfloat16:
        pytest.skip("these are AVX-512's")
    fastconv._introspect.use_isa(isa)
    for case in CASES:
        try:
            test_conv2d.check(CPU, case, dtype, layout, "grouped")
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinity_stays_in_its_group(dtype, which, layout):
    for case in (CASES[0], CASES[2], CASES[3], CASES[5], CASES[15]):
        x, w, b, dy = test_conv2d.inputs_of(case, dtype, layout)
        infinite = x if which == "x" else dy
        infinite[0, 1, infinite.shape[2] // 2, infinite.shape[3] // 2] = torch.inf
        expected = conv2d_reference(x, w, b, dy, *case.config)

        def ours(x, w, b, case=case):
            return fastconv.conv2d(x, w, b, *case.config, algo="grouped")

        actual = conv2d_gradients(ours, x, w, b, dy)
        for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
            assert torch.equal(result.isfinite(), reference.value.isfinite()), f"{case}: {name}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_threads(threads, dtype, layout):
    for case in (CASES[3], CASES[15]):
        tensors = test_conv2d.inputs_of(case, dtype, layout)
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(
                conv2d_gradients(lambda *t, case=case: fastconv.conv2d(*t, *case.config, algo="grouped"), *tensors)
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_it_is_taken_for_few_channels_a_group():
    def plan(channels, filters, groups):
        x = torch.empty(2, channels * groups, 14, 14, device="meta")
        w = torch.empty(filters * groups, channels, 3, 3, device="meta")
        return fastconv.plan(x, w, padding=1, groups=groups, arch="cpu")

    assert plan(4, 4, 32).algo == plan(32, 32, 2).algo == plan(1, 2, 16).algo == "grouped"
    assert plan(1, 1, 16).algo == "depthwise"
    large = plan(40, 8, 4)
    assert large.algo != "grouped"
    assert [text for algo, _, text in large.reasons if algo == "grouped"] == [
        "for groups of at most 32 channels and filters; with more, a product is faster"
    ]
    with pytest.raises(ValueError, match="grouped needs more than one group"):
        fastconv.plan(torch.empty(1, 4, 5, 5), torch.empty(4, 4, 3, 3), algo="grouped")
