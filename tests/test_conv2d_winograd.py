"""Winograd's F(4×4, 3×3) and F(2×2, 5×5) on the CPU: matrices, error, what is not finite, and where it is taken."""

import math
import re
from fractions import Fraction

import pytest
import torch
from references import conv2d_gradients, conv2d_reference, largest_error, toom_cook
from test_conv2d import LARGE_CASES, Case, check, inputs_of

import fastconv

CASES = [
    Case("3x3", (2, 5, 9, 11), (7, 5, 3, 3)),
    Case("whole tiles", (2, 16, 10, 14), (32, 16, 3, 3)),
    Case("padded", (1, 19, 13, 6), (35, 19, 3, 3), padding=(1, 2)),
    Case("padding of the whole filter and more", (2, 3, 4, 5), (4, 3, 3, 3), padding=(3, 5)),
    Case("grouped 3x3", (2, 12, 7, 9), (21, 4, 3, 3), padding=(1, 0), groups=3),
    Case("one pixel", (1, 3, 1, 1), (4, 3, 3, 3), padding=(1, 1)),
    Case("one output", (3, 2, 3, 3), (3, 2, 3, 3)),
    Case("several boxes of tiles a row", (1, 3, 5, 150), (4, 3, 3, 3), padding=(1, 1)),
    Case("deep", (1, 530, 6, 5), (34, 530, 3, 3), padding=(1, 1)),
    Case("5x5", (2, 5, 9, 11), (7, 5, 5, 5)),
    Case("5x5, whole tiles", (2, 16, 10, 14), (32, 16, 5, 5), padding=(2, 2)),
    Case("5x5, padded", (1, 19, 13, 6), (35, 19, 5, 5), padding=(1, 3)),
    Case("5x5, padding of the whole filter and more", (2, 3, 4, 5), (4, 3, 5, 5), padding=(5, 6)),
    Case("grouped 5x5", (2, 12, 7, 9), (21, 4, 5, 5), padding=(2, 0), groups=3),
    Case("5x5, one pixel", (1, 3, 1, 1), (4, 3, 5, 5), padding=(2, 2)),
    Case("5x5, a task a chunk", (3, 9, 70, 66), (35, 9, 5, 5), padding=(2, 2)),
    Case("5x5, deep", (1, 330, 6, 5), (66, 330, 5, 5), padding=(2, 2)),
    Case("filters once for all chunks of tiles", (2, 330, 39, 37), (20, 330, 3, 3), padding=(1, 1)),
    Case("filters for each block of tiles", (1, 33, 38, 36), (34, 33, 3, 3), padding=(1, 1)),
    Case("several chunks of tiles", (3, 1000, 31, 17), (33, 1000, 3, 3), padding=(1, 1)),
    Case("a task a chunk", (3, 9, 70, 66), (35, 9, 3, 3), padding=(1, 1)),
]
LAYOUTS = ("contiguous", "channels_last")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ("y", "dx", "dw", "db")


@pytest.fixture
def cpu(native_backend):
    if native_backend.name != "cpu":
        pytest.skip("Winograd's algorithm has no CUDA kernel")
    return native_backend


@pytest.mark.parametrize(("outputs", "taps"), [(4, 3), (3, 4), (2, 5)])
def test_the_matrices_compute_the_sum_in_exact_fractions(outputs, taps):
    a, g, b = toom_cook(outputs, taps)
    for p in range(outputs):
        for q in range(taps):
            for i in range(6):
                coefficient = sum(a[p][f] * g[f][q] * b[f][i] for f in range(6))
                assert coefficient == Fraction(int(i == p + q))


@pytest.mark.parametrize(
    ("size", "height", "width"),
    [(3, 6, 6), (3, 5, 6), (3, 6, 4), (3, 3, 6), (3, 4, 5), (3, 5, 3), (5, 6, 6), (5, 5, 6), (5, 5, 5)],
)
def test_each_value_of_a_tile_is_transformed_by_those_matrices(cpu, size, height, width):
    """One product at a time: x is zero but for one pixel, w but for one tap. That leaves one of y, the rest are zero up
    to the rounding of the matrices. Any wrong number in a transform shows. Smaller tiles take fewer points."""
    pixels = height * width
    x, w = torch.zeros(pixels, 1, height, width).double(), torch.zeros(size**2, 1, size, size).double()
    x.view(pixels, pixels).fill_diagonal_(1)
    w.view(size**2, size**2).fill_diagonal_(1)
    dy = torch.zeros(pixels, size**2, height - size + 1, width - size + 1).double()
    expected = conv2d_reference(x, w, None, dy, 1, 0, 1, 1)[0]
    y = fastconv.conv2d(x, w, algo="winograd")
    assert largest_error(y, expected.value) <= 2**-48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(cpu, full, case, layout, dtype):
    if dtype.itemsize == 2 and math.prod(case.x) > 500_000 and not full:
        pytest.skip("the largest cases in 16 bits, which take long, need --full")
    check(cpu, case, dtype, layout, "winograd", compare_with_torch=dtype.itemsize == 2)


def test_without_bias_and_in_other_strides(cpu):
    for layout in ("slices", "channels_last input", "channels_last weight"):
        check(cpu, CASES[2], torch.float32, layout, "winograd", bias=False)


def gradients(case, tensors, algo):
    """y, dx, dw and db by an algorithm."""
    return conv2d_gradients(lambda x, w, b: fastconv.conv2d(x, w, b, *case.config, algo=algo), *tensors)


@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_in_the_same_pass(cpu, layout, value):
    case = CASES[2]
    x, w, b, _ = inputs_of(case, torch.float32, layout)
    x[0, 1, 2, 3] = value
    y = fastconv.conv2d(x, w, b, *case.config, algo="winograd", activation="relu")
    expected = fastconv.conv2d(x, w, b, *case.config, algo="winograd").relu()
    assert (expected == 0).any() and torch.equal(y.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("size", [(2, 16, 18, 14), (2, 64, 18, 14), (2, 256, 18, 14), (2, 64, 56, 56)], ids=str)
def test_its_error_stays_within_four_times_that_of_the_sum(cpu, size, taps, layout):
    case = Case("", size, (size[1], size[1], taps, taps), padding=(taps // 2, taps // 2))
    tensors = inputs_of(case, torch.float32, layout)
    expected = conv2d_reference(*tensors, *case.config)
    for name, winograd, im2col, e in zip(
        NAMES[:3], gradients(case, tensors, "winograd"), gradients(case, tensors, "im2col"), expected, strict=False
    ):
        error, least = largest_error(winograd, e.value), largest_error(im2col, e.value)
        assert not torch.equal(winograd, im2col)
        assert error <= 4 * least, f"{name}: the largest error is {error:.3g}, im2col's {least:.3g}"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("which", ["x", "w", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_reaches_only_what_reads_it(cpu, layout, which, value):
    """The transforms would spread it over a tile, and of 3e38 they overflow, where the sum does not. im2col's results
    are held to float64's in test_conv2d.py, for x and dy."""
    for case in (CASES[0], CASES[4], CASES[7], CASES[9]):
        tensors = inputs_of(case, torch.float32, layout)
        x, w, _, dy = (t.clamp_(-0.5, 0.5) for t in tensors)
        t = {"x": x, "w": w, "dy": dy}[which]
        t[0, 1, t.shape[2] // 2, t.shape[3] // 2] = value
        results = gradients(case, tensors, "winograd"), gradients(case, tensors, "im2col")
        expected = conv2d_reference(*tensors, *case.config)
        for name, winograd, im2col, e in zip(NAMES, *results, expected, strict=True):
            finite = im2col.isfinite()
            assert torch.equal(winograd.isfinite(), finite), f"{case}: {name}"
            assert torch.equal(winograd[~finite].nan_to_num(0.5), im2col[~finite].nan_to_num(0.5)), f"{case}: {name}"
            if which != "w":
                assert torch.equal(finite, e.value.isfinite()), f"{case}: {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(cpu, layout, threads):
    for case in CASES[-5:]:
        tensors = inputs_of(case, torch.float32, layout)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(gradients(case, tensors, "winograd"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def plan(x, w, padding=1, dtype=torch.float32, layout="contiguous", **options):
    x, w = (torch.empty(size, dtype=dtype, device="meta", memory_format=FORMATS[layout]) for size in (x, w))
    return fastconv.plan(x, w, padding=padding, arch="cpu", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_it_is_taken_unasked_where_it_pays(direction, layout):
    def algo(x, w, **options):
        return plan(x, w, layout=layout, direction=direction, **options).algo

    assert algo((4, 64, 56, 56), (64, 64, 3, 3)) == "winograd"
    assert algo((4, 256, 14, 14), (256, 256, 3, 3)) == "winograd"
    assert algo((4, 64, 56, 56), (64, 64, 3, 3), dtype=torch.float16) == "winograd"
    assert algo((4, 64, 56, 56), (64, 64, 3, 3), dtype=torch.bfloat16) == "im2col"
    assert algo((4, 64, 56, 56), (64, 64, 3, 3), dtype=torch.float64) == "im2col"
    assert algo((4, 64, 56, 56), (64, 64, 3, 3), stride=2) == "im2col"
    assert algo((4, 64, 56, 56), (64, 64, 3, 3), dilation=2) == "im2col"
    assert algo((4, 64, 56, 56), (64, 64, 3, 1)) == "im2col"
    assert algo((4, 3, 224, 224), (64, 3, 3, 3)) == "im2col"  # nothing pays for the transforms of y
    assert algo((4, 8, 56, 56), (8, 8, 3, 3)) == "im2col"
    assert algo((1, 64, 56, 56), (64, 1, 3, 3), groups=64) == "depthwise"
    few_tiles = algo((1, 512, 7, 7), (512, 512, 3, 3))  # wgrad: nor for those of the filters
    assert few_tiles == ("im2col" if direction == "wgrad" else "winograd")
    assert algo((4, 64, 28, 28), (96, 64, 5, 5), padding=2) == "winograd"
    assert algo((4, 3, 224, 224), (64, 3, 5, 5), padding=2) == "im2col"
    little_depth = algo((32, 20, 14, 14), (50, 20, 5, 5), padding=2)
    assert little_depth == ("im2col" if direction == "wgrad" else "winograd")
    assert algo((1, 64, 4, 4), (64, 64, 3, 3)) == "im2col"  # too little work
    large = algo((1, 1024, 56, 56), (1024, 1024, 3, 3))  # wgrad: sums of 144 MiB
    assert large == ("im2col" if direction == "wgrad" else "winograd")


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_last_tiles_of_few_outputs_take_few_products(direction):
    def saving(size):
        reasons = plan((4, 256, size, size), (256, 256, 3, 3), direction=direction).reasons
        (reason,) = [text for algo, _, text in reasons if algo == "winograd"]
        return float(re.search(r"a factor of ([0-9.]+)", reason)[1])

    # 13 outputs, in tiles of 4, 4, 4 and 1, take 6 + 6 + 6 + 3 points, 16 take 24: (13/21)² is 86 % of (16/24)².
    whole, uneven = saving(16), saving(13)
    assert (13 / 16) ** 2 * whole < 0.8 * whole < uneven < whole


def test_the_plan_says_what_it_saves_and_takes():
    taken = plan((4, 64, 56, 56), (64, 64, 3, 3))
    (reason,) = [text for algo, is_taken, text in taken.reasons if algo == "winograd" and is_taken]
    assert "36 products for 16 outputs, not 144" in reason and "less work" in reason
    assert taken.kernel == "conv2d_winograd_fprop"
    assert taken.workspace_bytes >= 4 * 36 * 64 * 64  # the transformed filters
    for x, w in [((1, 512, 28, 28), 512), ((32, 512, 7, 7), 512), ((32, 256, 14, 14), 256), ((64, 64, 56, 56), 64)]:
        for direction in ("fprop", "dgrad", "wgrad"):
            large = plan(x, (w, x[1], 3, 3), direction=direction)
            assert large.algo == "winograd" and large.workspace_bytes < 30 * 2**20, (x, direction)
    with pytest.raises(ValueError, match="algo='winograd': winograd needs 3×3 or 5×5 filters, here 3×2"):
        plan((1, 3, 8, 8), (4, 3, 3, 2), algo="winograd")
    with pytest.raises(ValueError, match="algo='winograd': winograd needs stride 1 and dilation 1"):
        plan((1, 3, 8, 8), (4, 3, 3, 3), stride=2, algo="winograd")
    assert "winograd" in fastconv.algorithms() and "winograd" not in fastconv.algorithms("cuda")


@pytest.mark.parametrize("x", [(0, 3, 8, 9), (0, 3, 0, 9), (2, 0, 8, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_problems_without_elements(cpu, x, layout):
    for direction in ("fprop", "dgrad", "wgrad"):
        assert plan(x, (40, x[1], 3, 3), 2, layout=layout, direction=direction, algo="winograd").workspace_bytes < 2**20
    image, w = torch.ones(x).to(memory_format=FORMATS[layout]).requires_grad_(), torch.ones(40, x[1], 3, 3)
    b = torch.ones(40)
    y = fastconv.conv2d(image, w.requires_grad_(), b, padding=2, algo="winograd")
    assert torch.equal(y, torch.ones_like(y))
    y.sum().backward()
    assert image.grad.shape == x and not w.grad.any()


def test_a_case_of_other_tests_takes_it_unasked(cpu):
    case = LARGE_CASES[0]
    assert plan(case.x, case.w, case.padding).algo == "winograd"
    check(cpu, case, torch.float32)
