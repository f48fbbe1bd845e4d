"""Products of bfloat16 in pairs (AVX512_BF16): odd depths and pixel counts, blocks and tails, what is not finite."""

import pytest
import torch
from references import conv2d_gradients
from test_conv2d import Case, check, check_relu, inputs_of

import fastconv

# Large enough for every direction to multiply pairs: 16 channels and filters, and 16 elements of a patch.
CASES = [
    Case("odd depth, tails", (2, 19, 9, 8), (17, 19, 3, 2), (2, 1), (1, 2), (1, 2)),
    Case("1x1", (3, 40, 7, 9), (50, 40, 1, 1)),
    Case("1x1, odd", (5, 17, 7, 7), (33, 17, 1, 1)),
    Case("1x1 of single pixels", (70, 32, 1, 1), (32, 32, 1, 1)),
    Case("1x1 strided", (2, 35, 9, 11), (37, 35, 1, 1), (2, 3)),
    Case("1x1 padded", (1, 33, 3, 4), (34, 33, 1, 1), padding=(2, 1)),
    Case("grouped", (2, 38, 12, 15), (34, 19, 5, 3), (2, 3), (4, 0), (1, 2), 2),
    Case("stem", (2, 3, 33, 31), (64, 3, 7, 7), (2, 2), (3, 3)),
    Case("stem of many taps", (1, 3, 29, 37), (40, 3, 11, 11), (4, 4)),
    Case("stem deeper than a block", (1, 4, 29, 30), (20, 4, 12, 11), (2, 2)),
    Case("one channel", (9, 1, 15, 14), (20, 1, 5, 5), padding=(2, 2)),
    Case("blocks of depth", (1, 70, 9, 9), (64, 70, 3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("blocks of channels", (2, 24, 7, 5), (300, 24, 3, 3), padding=(1, 1)),
    Case("blocks of patches", (1, 96, 6, 7), (48, 96, 5, 5), padding=(2, 2)),
    Case("blocks of a row of taps", (1, 30, 4, 21), (17, 30, 2, 17), padding=(0, 1)),
    Case("blocks of pixels", (1, 17, 40, 43), (17, 17, 3, 3), padding=(1, 1)),
    Case("phases", (1, 34, 15, 14), (66, 34, 3, 3), (3, 3), (1, 1)),
    Case("phases without taps", (1, 18, 9, 10), (18, 18, 2, 1), (3, 4)),
    Case("window larger than the image", (2, 17, 3, 2), (18, 17, 5, 6), padding=(2, 3)),
    Case("whole registers of channels", (1, 64, 9, 9), (33, 64, 3, 3), (2, 1), (1, 2), (1, 2)),
    Case("more taps than a block", (1, 17, 18, 19), (16, 17, 17, 17), padding=(1, 0)),
    Case("rows of two registers", (1, 18, 5, 150), (17, 18, 2, 3), (2, 3), (1, 2)),
    Case("one output a register", (1, 17, 3, 300), (18, 17, 1, 2), (1, 70), (0, 69)),
    Case("registers of padding", (1, 17, 3, 50), (18, 17, 1, 2), (1, 1), (0, 70)),
]
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(params=["avx512", "avx512_bf16"])
def isa(request, native_backend, isas):
    """Every case runs with the same plans by either instruction set: in pairs, and converted to float."""
    if native_backend.name != "cpu" or request.param not in isas:
        pytest.skip(f"not a CPU with {request.param}")
    fastconv._introspect.use_isa(request.param)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(isa, native_backend, case, layout):
    check(native_backend, case, torch.bfloat16, layout, "im2col", compare_with_torch=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_relu_and_bias(isa, native_backend, layout, bias):
    for case in (CASES[0], CASES[1], CASES[11]):
        check_relu(native_backend, case, torch.bfloat16, layout, "im2col", bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_not_finite_reaches_what_it_reaches_in_float(isa, case, layout):
    """Were one of a pair's two zeros missing, or a neighbour read in its place, a NaN would reach others too."""

    def gradients(tensors):
        return conv2d_gradients(lambda x, w, b: fastconv.conv2d(x, w, b, *case.config, algo="im2col"), *tensors)

    tensors = inputs_of(case, torch.bfloat16, layout)
    for spoilt in (0, 1, 3):
        values = [t.clone() for t in tensors]
        flat = values[spoilt].as_strided((values[spoilt].numel(),), (1,))
        for at, value in ((0, "nan"), (flat.numel() // 2, "inf"), (flat.numel() - 1, "nan")):
            flat[at] = float(value)
        expected = gradients([t.float() for t in values])
        for name, result, reference in zip(("y", "dx", "dw", "db"), gradients(values), expected, strict=True):
            assert torch.equal(result.isnan(), reference.isnan()), f"{name}, spoilt by tensor {spoilt}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_numbers_are_taken_for_zero(isa, layout):
    """That is what the instruction does. It also shows that its products are the ones in use, in all directions."""
    x, w, _, dy = inputs_of(CASES[1], torch.bfloat16, layout, bias=False)
    small = 2.0**-130
    for factor in range(2):
        scaled = (x * small, w, dy) if factor == 0 else (x, w * small, dy)
        y, dx, dw, _ = conv2d_gradients(lambda x, w, _: fastconv.conv2d(x, w, algo="im2col"), *scaled[:2], None, dy)
        affected = (y, dw) if factor == 0 else (y, dx)
        assert all(bool(t.any()) == (isa == "avx512") for t in affected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stems_multiply_pairs_in_fprop_and_wgrad(isa, layout):
    x, w, _, dy = inputs_of(CASES[7], torch.bfloat16, layout, bias=False)
    y, _, dw, _ = conv2d_gradients(
        lambda x, w, _: fastconv.conv2d(x, w, None, *CASES[7].config), x * 2.0**-130, w, None, dy
    )
    assert all(bool(t.any()) == (isa == "avx512") for t in (y, dw))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[14]], ids=str)
def test_bits_do_not_depend_on_threads(isa, case, layout, threads):
    tensors, results = inputs_of(case, torch.bfloat16, layout), []
    for count in (1, 2, 3):
        threads(count)
        results.append(conv2d_gradients(lambda x, w, b: fastconv.conv2d(x, w, b, *case.config), *tensors))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_unasked_it_goes_before_winograd():
    x, w = torch.empty(4, 64, 56, 56, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
    for direction in ("fprop", "dgrad", "wgrad"):
        plan = fastconv.plan(x.bfloat16(), w.bfloat16(), padding=1, direction=direction, arch="cpu")
        assert plan.algo == "im2col"
        (reason,) = [text for algo, _, text in plan.reasons if algo == "winograd"]
        assert reason == "its transforms are computed in float, where a product takes twice as long as in bfloat16"
    # With few channels or filters nothing is gained.
    few = fastconv.plan(x.bfloat16()[:, :8], w.bfloat16()[:8, :8], padding=1, arch="cpu")
    assert all("bfloat16" not in text for _, _, text in few.reasons)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_a_call_copies_its_filters_alone(layout):
    """Neither x nor dy is copied. Other instruction sets keep filters as float; wgrad keeps what it adds up."""
    x = torch.empty(32, 64, 28, 28, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    w = torch.empty(96, 64, 3, 3, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    for direction in ("fprop", "dgrad", "wgrad"):
        plan = fastconv.plan(x, w, padding=1, direction=direction, arch="cpu")
        copies = plan.split * (w.numel() + 96) if direction == "wgrad" else w.numel()
        assert plan.workspace_bytes <= 4 * copies < 2 * x.numel(), direction
