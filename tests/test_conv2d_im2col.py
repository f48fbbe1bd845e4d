"""The CPU's im2col where its blocks end: lines of pixels, pieces of patches, filters read in place, sums in pieces."""

import pytest
import torch
from references import conv2d_gradients
from test_conv2d import Case, check, check_relu, inputs_of

import fastconv

CASES = [
    Case("rows joined, a vector left over", (1, 21, 19, 27), (33, 21, 5, 5), padding=(2, 2)),
    Case("images joined, twice deep", (5, 40, 7, 7), (37, 40, 3, 3), padding=(1, 1)),
    Case("images joined, one tap", (3, 300, 6, 5), (40, 300, 1, 1)),
    Case("rows apart", (1, 3, 5, 300), (26, 3, 3, 3), padding=(1, 1)),
    Case("a part of a row", (1, 2, 3, 470), (25, 2, 2, 3), padding=(0, 1)),
    Case("every second pixel", (2, 16, 15, 13), (24, 16, 3, 3), stride=(2, 2), padding=(1, 1)),
    Case("every second pixel of a part of a row", (1, 5, 4, 461), (30, 5, 3, 3), stride=(2, 2), padding=(1, 1)),
    Case("every second pixel of one column", (2, 16, 9, 1), (24, 16, 3, 1), stride=(2, 2)),
    Case("one tap of every second pixel, images joined", (5, 40, 8, 7), (33, 40, 1, 1), stride=(2, 2)),
    Case("every third pixel", (1, 17, 14, 16), (40, 17, 3, 2), stride=(3, 3), padding=(1, 0)),
    Case("one tap of every second pixel", (2, 32, 9, 12), (48, 32, 1, 1), stride=(2, 2)),
    Case("padding wider than the image", (2, 16, 4, 3), (26, 16, 5, 9), padding=(2, 4)),
    Case("a filter deeper than a block", (1, 2, 9, 12), (27, 2, 17, 19), padding=(9, 9)),
    Case("dilated", (2, 16, 12, 11), (33, 16, 3, 3), padding=(3, 2), dilation=(2, 3)),
    Case("panels of one vector", (2, 48, 8, 9), (48, 48, 3, 2), padding=(1, 1)),
    Case("more channels than a block", (2, 1200, 5, 4), (42, 1200, 1, 1)),
    Case("grouped, in place", (2, 64, 9, 10), (96, 32, 3, 3), padding=(1, 1), groups=2),
    Case("sums in pieces", (3, 16, 40, 41), (35, 16, 1, 1)),
    Case("sums in pieces of many filters", (2, 5, 24, 25), (150, 5, 1, 1)),
    Case("one tap, padded", (2, 20, 9, 11), (40, 20, 1, 1), padding=(1, 2)),
    Case("one tap, many filters, images joined", (5, 70, 7, 7), (520, 70, 1, 1)),
    Case("one tap, many filters, a part of a row", (1, 65, 2, 300), (513, 65, 1, 1)),
    Case("one tap, many filters, blocks of images", (3, 520, 10, 11), (257, 520, 1, 1)),
    Case("one tap, many filters, groups", (2, 140, 9, 8), (1024, 70, 1, 1), groups=2),
    Case("wide enough for two blocks of channels", (1, 18, 13, 14), (270, 18, 3, 3), padding=(1, 0)),
]
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture
def cpu(native_backend):
    if native_backend.name != "cpu":
        pytest.skip("these are blocks of the CPU's kernels")
    return native_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(cpu, case, layout, dtype):
    check(cpu, case, dtype, layout, "im2col", compare_with_torch=dtype.itemsize == 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(cpu, case, layout, isas):
    for isa in isas[:-1]:
        fastconv.planning._introspection().use_isa(isa)
        check(cpu, case, torch.float32, layout, "im2col")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_bias(cpu, case, layout):
    check(cpu, case, torch.float32, layout, "im2col", bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_relu_in_the_same_pass(cpu, case, layout):
    check_relu(cpu, case, torch.float32, layout, "im2col")


def test_the_bits_do_not_depend_on_threads(cpu, threads):
    """Vectors end with the planes of y and dx, and with the rows of dw: those of a neighbour are another task's."""
    for case in CASES:
        torch.manual_seed(0)
        tensors = inputs_of(case, torch.float32)

        def results(count, case=case, tensors=tensors):
            threads(count)
            return conv2d_gradients(lambda *t: fastconv.conv2d(*t, *case.config, algo="im2col"), *tensors)

        for name, expected, actual in zip(("y", "dx", "dw", "db"), results(1), results(3), strict=True):
            assert torch.equal(actual, expected), (case, name)


def test_the_gradients_of_many_filters_go_along_channels():
    """The plan says so, and they take no copy of any tensor."""

    def plan(filters, direction, **config):
        x, w = torch.empty(64, 512, 7, 7, device="meta"), torch.empty(filters, 512, 1, 1, device="meta")
        return fastconv.plan(x, w, direction=direction, arch="cpu", **config)

    for direction, fewest in (("dgrad", 512), ("wgrad", 256)):
        assert "along the pixels" in str(plan(fewest - 1, direction))
        assert "along the pixels" in str(plan(fewest, direction, stride=2))
        assert "along the channels" in str(plan(fewest, direction))
        many = plan(2048, direction)
        assert many.workspace_bytes == 0 and many.scratch_bytes < 2**20
    assert "along the pixels" in str(plan(2048, "fprop"))
