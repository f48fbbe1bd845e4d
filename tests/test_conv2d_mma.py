"""Convolution on tensor cores: every type, in all directions, over odd sizes and full vectors."""

import dataclasses
import itertools
import math

import pytest
import torch
from references import assert_close, conv2d_gradients, conv2d_reference, largest_error
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
# Channels and filters that are loaded in pieces of fewer bytes, or from copies with more of them.
PIECE_CASES = [
    Case("four a group", (1, 12, 17, 13), (12, 4, 3, 2), padding=(1, 1), groups=3),
    Case("eight a group, strided", (2, 16, 11, 9), (16, 8, 3, 3), (2, 1), (1, 0), groups=2),
    Case("six and ten a group", (1, 12, 9, 11), (20, 6, 2, 3), (1, 2), (0, 1), (2, 1), groups=2),
    Case("odd groups", (1, 9, 7, 6), (15, 3, 3, 3), padding=(1, 1), groups=3),
    Case("odd 1x1", (2, 35, 6, 5), (37, 35, 1, 1)),
    Case("one channel", (2, 1, 12, 14), (20, 1, 5, 5), padding=(2, 2)),
]
# Enough work, on the four multiprocessors of the emulated device, for each kind of tile: of 16, 64 and 128 filters (or,
# for dgrad, channels). The small tiles are taken for less.
TILE_CASES = [
    Case("narrow tiles", (4, 16, 16, 17), (16, 16, 5, 5), padding=(2, 2)),
    Case("half tiles", (4, 32, 16, 17), (64, 32, 5, 5), padding=(2, 2)),
    Case("whole tiles", (4, 128, 16, 16), (256, 128, 1, 1)),
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
@pytest.mark.parametrize("case", CASES + VECTOR_CASES + PIECE_CASES + TILE_CASES[:1], ids=str)
def test_16_bits(mma_backend, case, layout, dtype):
    check(mma_backend, case, dtype, layout, "mma", compare_with_torch=layout == "contiguous")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:6] + VECTOR_CASES, ids=str)
def test_relu(mma_backend, case, layout):
    check_relu(mma_backend, case, torch.bfloat16, layout, "mma")


@pytest.mark.parametrize("case", MEDIUM_CASES + TILE_CASES, ids=str)
def test_medium(mma_backend, case):
    check(mma_backend, case, torch.bfloat16, "channels_last", "mma")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[:14] + VECTOR_CASES + PIECE_CASES + TILE_CASES[:1], ids=str)
def test_tf32(mma_backend, case, layout):
    check_tf32(mma_backend, case, layout)


def test_tf32_rounds_to_nearest(mma_backend):
    case = VECTOR_CASES[0]
    tensors = inputs_of(case, torch.float32, "channels_last")
    rounded = [round_to_tf32(t) if t is not tensors[2] else t for t in tensors]
    assert all(map(torch.equal, with_tf32(mma_backend, tensors, case), with_tf32(mma_backend, rounded, case)))


def float32_results(backend, tensors, case, algo):
    def conv2d(x, w, b):
        return fastconv.conv2d(x, w, b, *case.config, algo=algo)

    return conv2d_gradients(conv2d, *map(backend.put, tensors))


def check_float32(backend, case, layout, tensors=None):
    """Within float32's rounding bound. A product of split operands is off by 8u more than a fused multiply-add's; from
    16 terms on the sums outside of the tensor cores, one for eight products, make up for it."""
    tensors = inputs_of(case, torch.float32, layout) if tensors is None else tensors
    expected = conv2d_reference(*tensors, *case.config)
    results = float32_results(backend, tensors, case, "mma")
    for name, result, reference in zip(("y", "dx", "dw", "db"), results, expected, strict=True):
        if reference.terms < 16:
            reference = dataclasses.replace(reference, terms=reference.terms + 8)
        assert_close(name, result, reference)
    return results, expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slices"])
@pytest.mark.parametrize("case", CASES + VECTOR_CASES + PIECE_CASES, ids=str)
def test_float32(mma_backend, case, layout):
    check_float32(mma_backend, case, layout)


def test_float32_is_as_accurate_as_fused_multiply_adds(mma_backend):
    """Of longer sums, on the average the largest error is at most that of im2col, whose products are exact. In one
    result it may be three times that, as im2col may have cut the sum into shorter ones."""
    ratios = []
    for case in VECTOR_CASES[1:3] + VECTOR_CASES[7:] + MEDIUM_CASES[:3]:
        tensors = inputs_of(case, torch.float32, "channels_last")
        results, expected = check_float32(mma_backend, case, "channels_last", tensors)
        peers = float32_results(mma_backend, tensors, case, "im2col")
        for name, result, peer, reference in zip(("y", "dx", "dw", "db"), results, peers, expected, strict=True):
            if reference.terms >= 64:
                error, peer_error = (largest_error(r, reference.value) for r in (result, peer))
                assert error <= 3 * peer_error, f"{case}: {name}: {error:.3g}, im2col's {peer_error:.3g}"
                ratios.append(error / peer_error)
    mean = math.prod(ratios) ** (1 / len(ratios))
    assert mean <= 1, f"{mean:.3g} times im2col's error"


@pytest.mark.parametrize("which", ["x", "dy"])
def test_float32_keeps_nan_where_it_is(mma_backend, which):
    case = CASES[11]  # grouped
    tensors = dict(zip(("x", "w", "b", "dy"), inputs_of(case, torch.float32), strict=True))
    tensors[which][0, 1, 1, 1] = torch.nan
    expected = conv2d_reference(*tensors.values(), *case.config)
    for name, result, reference in zip(
        ("y", "dx", "dw", "db"), float32_results(mma_backend, tensors.values(), case, "mma"), expected, strict=True
    ):
        assert torch.equal(result.cpu().isnan(), reference.value.isnan()), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES + VECTOR_CASES + PIECE_CASES[:4], ids=str)
def test_float64(mma_backend, case, layout):
    check(mma_backend, case, torch.float64, layout, "mma")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_addresses_that_are_no_multiple_of_16(mma_backend, dtype):
    """A dense view that begins one element after an aligned address: what is loaded at once is cut down to it."""
    case = VECTOR_CASES[0]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs_of(case, dtype)]
    moved = []
    for tensor in map(mma_backend.put, tensors):
        place = torch.empty(tensor.numel() + 1, dtype=dtype, device=tensor.device)[1:]
        moved.append(torch.as_strided(place, tensor.shape, tensor.stride(), 1).copy_(tensor))
    assert all(t.data_ptr() % 16 for t in moved)

    def conv2d(x, w, b):
        return fastconv.conv2d(x, w, b, *case.config, algo="mma")

    expected = conv2d_gradients(conv2d, *map(mma_backend.put, tensors))
    assert all(map(torch.equal, conv2d_gradients(conv2d, *moved), expected))


@pytest.mark.parametrize(
    ("dtype", "precision", "arch", "algo"),
    [
        (torch.bfloat16, "ieee", "sm_80", "mma"),
        (torch.float16, "ieee", "sm_90", "mma"),
        (torch.float16, "ieee", "sm_75", "im2col"),
        (torch.float32, "tf32", "sm_90", "mma"),
        (torch.float32, "ieee", "sm_90", "implicit_gemm"),
        (torch.float64, "tf32", "sm_90", "mma"),
        (torch.float64, "tf32", "sm_86", "implicit_gemm"),
    ],
    ids=str,
)
def test_is_chosen_for_what_tensor_cores_multiply_well(fp32_precision, dtype, precision, arch, algo):
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


def plan(x, w, arch="sm_90", dtype=torch.bfloat16, layout=torch.channels_last, **options):
    x, w = (torch.empty(size, dtype=dtype, device="meta", memory_format=layout) for size in (x, w))
    return fastconv.plan(x, w, arch=arch, **options)


def test_a_tile_fits_the_product():
    dense = {"x": (64, 256, 28, 28), "w": (256, 256, 3, 3), "padding": 1}
    assert plan(**dense).tile == (128, 128, 32)
    assert plan(**dense, dtype=torch.float64).tile == (64, 64, 8)
    grouped = {"x": (64, 256, 28, 28), "w": (256, 8, 3, 3), "padding": 1, "groups": 32}
    assert plan(**grouped).algo == "mma"  # eight filters a group
    assert plan(**grouped).tile == (128, 16, 32) and plan(**grouped, direction="wgrad").tile == (16, 128, 32)
    stem = {"x": (64, 3, 224, 224), "w": (64, 3, 7, 7), "stride": 2, "padding": 3}
    assert plan(**stem).tile == (128, 64, 32)
    assert plan(**stem, direction="dgrad").tile == (128, 16, 32)


def test_small_maps_are_split_until_they_fill_the_device():
    small = {"x": (8, 512, 7, 7), "w": (512, 512, 3, 3), "padding": 1}
    chosen = plan(**small)
    blocks = -(-8 * 49 // chosen.tile[0]) * -(-512 // chosen.tile[1]) * chosen.split
    busy = blocks / (-(-blocks // 132) * 132)  # of the multiprocessors, over all waves
    assert chosen.split > 1 and busy >= 0.9 and blocks <= 8 * 132
    assert plan(x=(256, 512, 28, 28), w=(512, 512, 3, 3), padding=1).split == 1


def test_odd_channels_are_copied_where_wider_loads_are_worth_it():
    stem = {"x": (64, 3, 224, 224), "w": (64, 3, 7, 7), "stride": 2, "padding": 3}
    padded = plan(**stem)
    assert "channels 3 a group, 4 in a copy, take 8" in str(padded)
    assert padded.workspace_bytes >= 2 * 64 * 4 * 224 * 224
    assert plan(x=(64, 64, 56, 56), w=(64, 64, 3, 3), padding=1).workspace_bytes == 0
    assert "in a copy" not in str(plan(x=(64, 4, 56, 56), w=(64, 4, 3, 3), padding=1))


def test_predicted_time():
    """Where there is a model: between the limits of an H200 and ten times that, and more for more work."""
    x, w = (64, 256, 28, 28), (256, 256, 3, 3)
    for direction, layout in itertools.product(
        ("fprop", "dgrad", "wgrad"), (torch.channels_last, torch.contiguous_format)
    ):
        chosen = plan(x, w, padding=1, direction=direction, layout=layout)
        floor = 2 * chosen.multiply_adds / 790e6
        assert floor <= chosen.predicted_us <= 10 * floor
        assert f"predicted  {chosen.predicted_us:.4g} µs" in str(chosen)
        assert plan((128, *x[1:]), w, padding=1, direction=direction, layout=layout).predicted_us > chosen.predicted_us
        others = [text for algo, taken, text in chosen.reasons if algo == "mma" and not taken]
        assert len(others) == 3 and all("the model's time is" in text for text in others)
    assert plan(x, w, padding=1, arch="sm_80").predicted_us is None
    assert plan(x, w, padding=1, algo="direct").predicted_us is None


def test_a_wave_more_takes_longer():
    """264 blocks are two on each of 132 multiprocessors; of 272, some get three, and the others wait for them."""
    times = [plan((1, 504, 128, rows), (1024, 504, 1, 1)).predicted_us for rows in (32, 33, 34)]
    assert times[0] == times[1] < 0.8 * times[2]
