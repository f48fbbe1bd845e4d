"""Convolution on tensor cores: float16, bfloat16 and tf32, in all directions, over odd sizes and full vectors."""

import pytest
import torch
from references import assert_close, conv2d_gradients, conv2d_reference
from test_conv2d import CASES, MEDIUM_CASES, Case, check, check_relu, inputs_of

import fastconv
from fastconv import autograd

# Channels and filters in whole vectors of 16 bytes, over one or more tiles, steps and splits.
VECTOR_CASES = [
    Case("vectors", (2, 16, 7, 9), (24, 16, 3, 3), padding=(1, 1)),
    Case("large tiles", (3, 136, 13, 14), (136, 136, 1, 3), padding=(0, 1)),
    Case("1x1 in vectors", (2, 72, 9, 8), (64, 72, 1, 1)),
    Case("strided phases", (2, 24, 13, 11), (40, 24, 3, 5), (2, 3), (1, 2)),
    Case("phases without taps", (1, 16, 14, 13), (32, 16, 1, 2), (3, 2)),
    Case("dilated phases", (1, 16, 15, 14), (32, 16, 3, 3), (2, 4), (2, 3), (3, 2)),
    Case("groups in vectors", (2, 48, 8, 7), (96, 16, 3, 2), padding=(1, 1), groups=3),
    Case("split contraction", (1, 264, 4, 5), (32, 264, 3, 3), padding=(1, 1)),
    Case("many pixels", (4, 8, 31, 29), (16, 8, 3, 3), padding=(1, 1)),
    Case("stem", (1, 3, 29, 27), (64, 3, 7, 5), (2, 2), (3, 2)),
]


@pytest.fixture
def mma_backend(backend):
    if "mma" not in backend.algorithms:
        pytest.skip("the CPU has no tensor cores of ours")
    if backend.name == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    return backend


def round_to_tf32(tensor):
    """To the nearest value with 10 bits of mantissa, ties away from zero (cvt.rna, PTX ISA)."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def with_tf32(backend, tensors, case):
    """y, dx, dw and db of the ops, with algo="mma" and allow_tf32."""
    x, w, b, dy = map(backend.put, tensors)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    config = (*case.config, channels_last, True, "mma")
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    y = autograd.conv2d(x, w, b, *config)
    return y, *torch.autograd.grad(y, (x, w, b), dy)


def check_tf32(backend, case, layout):
    """Of operands that are tf32 already, products are exact and sums as good as float32's."""
    tensors = [round_to_tf32(t) for t in inputs_of(case, torch.float32, layout)]
    expected = conv2d_reference(*tensors, *case.config)
    for name, result, reference in zip(
        ("y", "dx", "dw", "db"), with_tf32(backend, tensors, case), expected, strict=True
    ):
        assert_close(name, result, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slices"])
@pytest.mark.parametrize("case", CASES + VECTOR_CASES, ids=str)
def test_16_bits(mma_backend, case, layout, dtype):
    check(mma_backend, case, dtype, layout, "mma", compare_with_torch=layout == "contiguous")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:6] + VECTOR_CASES, ids=str)
def test_relu(mma_backend, case, layout):
    check_relu(mma_backend, case, torch.bfloat16, layout, "mma")


@pytest.mark.parametrize("case", MEDIUM_CASES, ids=str)
def test_medium(mma_backend, case):
    check(mma_backend, case, torch.bfloat16, "channels_last", "mma")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:14] + VECTOR_CASES, ids=str)
def test_tf32(mma_backend, case, layout):
    check_tf32(mma_backend, case, layout)


def test_tf32_rounds_to_nearest(mma_backend):
    case = VECTOR_CASES[0]
    tensors = inputs_of(case, torch.float32, "channels_last")
    rounded = [round_to_tf32(t) if t is not tensors[2] else t for t in tensors]
    assert all(map(torch.equal, with_tf32(mma_backend, tensors, case), with_tf32(mma_backend, rounded, case)))


@pytest.mark.launches_nothing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_refuses_what_would_lose_digits(mma_backend, dtype):
    x, w, _, _ = inputs_of(CASES[0], dtype)
    with pytest.raises(ValueError, match="algo 'mma' cannot do this convolution: it (would round|multiplies float16)"):
        fastconv.conv2d(mma_backend.put(x), mma_backend.put(w), algo="mma")


@pytest.mark.parametrize(
    ("dtype", "precision", "arch", "algo"),
    [
        (torch.bfloat16, "ieee", "sm_80", "mma"),
        (torch.float16, "ieee", "sm_90", "mma"),
        (torch.float16, "ieee", "sm_75", "im2col"),
        (torch.float32, "tf32", "sm_90", "mma"),
        (torch.float32, "ieee", "sm_90", "implicit_gemm"),
        (torch.float64, "tf32", "sm_90", "implicit_gemm"),
    ],
    ids=str,
)
def test_is_chosen_for_what_tensor_cores_multiply(fp32_precision, dtype, precision, arch, algo):
    fp32_precision(precision)
    x, w = (torch.empty(size, dtype=dtype, device="meta") for size in ((8, 64, 28, 28), (64, 64, 3, 3)))
    plan = fastconv.plan(x, w, padding=1, arch=arch)
    assert plan.algo == algo, str(plan)
    assert ("mma", algo == "mma") in [(name, taken) for name, taken, _ in plan.reasons]


def test_same_bits_in_every_run(mma_backend):
    case = VECTOR_CASES[7]  # split
    x, w, b, dy = (mma_backend.put(t) for t in inputs_of(case, torch.bfloat16, "channels_last"))

    def conv2d(x, w, b):
        return fastconv.conv2d(x, w, b, *case.config, algo="mma")

    first, second = (conv2d_gradients(conv2d, x, w, b, dy) for _ in range(2))
    assert all(map(torch.equal, first, second))
