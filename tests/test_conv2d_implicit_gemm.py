"""Implicit GEMM on CUDA cores: its rungs over sizes that come in vectors, phases and splits, and when it is chosen."""

import pytest
import torch
from references import conv2d_gradients
from test_conv2d import CASES, IMPLICIT, Case, check, check_relu, inputs_of
from test_conv2d_mma import VECTOR_CASES

import fastconv

# Over several tiles in every direction, of 64 and of 128.
TILE_CASES = [
    Case("tiles of 128", (5, 136, 13, 14), (136, 136, 1, 3), padding=(0, 1)),
    Case("1x1 in vectors of pixels", (3, 72, 8, 8), (68, 72, 1, 1)),
    Case("split pixels", (3, 8, 23, 21), (36, 8, 3, 3), padding=(1, 1)),
    Case("one of many phases", (1, 4, 9, 11), (32, 4, 4, 3), (4, 5)),
    Case("strided groups", (2, 12, 11, 9), (72, 4, 3, 3), (2, 2), (1, 0), groups=3),
]


@pytest.fixture
def cuda_backend(backend):
    if "implicit_gemm" not in backend.algorithms:
        pytest.skip("the CPU has no such algorithm")
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", VECTOR_CASES + TILE_CASES, ids=str)
def test_vectors_tiles_and_splits(cuda_backend, case, layout, dtype):
    check(cuda_backend, case, dtype, layout, "implicit_gemm")


@pytest.mark.parametrize("algo", IMPLICIT[:3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [*VECTOR_CASES[:4], TILE_CASES[1]], ids=str)
def test_rungs(cuda_backend, case, layout, algo):
    for dtype in (torch.float32, torch.float64):
        check(cuda_backend, case, dtype, layout, algo)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(cuda_backend, case, layout):
    check(cuda_backend, case, torch.float64, layout, "implicit_gemm")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [VECTOR_CASES[7], *TILE_CASES[:2]], ids=str)
def test_relu_of_vectors_and_of_splits(cuda_backend, case, layout):
    for dtype in (torch.float32, torch.float64):
        check_relu(cuda_backend, case, dtype, layout, "implicit_gemm")


@pytest.mark.parametrize("algo", IMPLICIT)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_bias_and_from_tensors_that_are_not_aligned(cuda_backend, layout, algo):
    check(cuda_backend, VECTOR_CASES[0], torch.float32, layout, algo, bias=False)
    x, w, _, _ = inputs_of(VECTOR_CASES[0], torch.float32, layout)
    memory = cuda_backend.put(torch.zeros(x.numel() + 1))
    shifted = torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    x, w = cuda_backend.put(x), cuda_backend.put(w)
    assert torch.equal(fastconv.conv2d(shifted, w, algo=algo), fastconv.conv2d(x, w, algo=algo))


@pytest.mark.launches_nothing
@pytest.mark.parametrize("algo", IMPLICIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_refuses_16_bits(cuda_backend, dtype, algo):
    x, w, _, _ = inputs_of(CASES[0], dtype)
    with pytest.raises(ValueError, match=f"algo '{algo}' cannot do this convolution: it multiplies float32"):
        fastconv.conv2d(cuda_backend.put(x), cuda_backend.put(w), algo=algo)


def test_same_bits_in_every_run(cuda_backend):
    for case in (VECTOR_CASES[7], TILE_CASES[2]):  # split
        x, w, b, dy = (cuda_backend.put(t) for t in inputs_of(case, torch.float32, "channels_last"))

        def conv2d(x, w, b, config=case.config):
            return fastconv.conv2d(x, w, b, *config, algo="implicit_gemm")

        first, second = (conv2d_gradients(conv2d, x, w, b, dy) for _ in range(2))
        assert all(map(torch.equal, first, second))


def plan(x, w, *config, arch="sm_90", dtype=torch.float32, **options):
    return fastconv.plan(*(torch.empty(s, dtype=dtype, device="meta") for s in (x, w)), *config, arch=arch, **options)


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_is_chosen_where_it_saves_the_windows(fp32_precision, direction):
    fp32_precision("ieee")
    dense = ((64, 128, 28, 28), (128, 128, 3, 3), 1, 1)
    chosen = plan(*dense, direction=direction)
    im2col = plan(*dense, direction=direction, algo="im2col")
    assert chosen.algo == "implicit_gemm", str(chosen)
    assert chosen.workspace_bytes < im2col.workspace_bytes and chosen.predicted_us <= im2col.predicted_us
    assert plan(*dense, direction=direction, arch="sm_75").algo == "im2col"  # no cp.async
    one_by_one = plan((64, 128, 28, 28), (128, 128, 1, 1), direction=direction)
    assert one_by_one.algo == "im2col" and "x is its own matrix of windows" in str(one_by_one)


def test_windows_are_copied_where_many_filters_share_them(fp32_precision):
    fp32_precision("ieee")
    chosen = plan((256, 512, 7, 7), (2048, 512, 3, 3), 1, 1)
    implicit = plan((256, 512, 7, 7), (2048, 512, 3, 3), 1, 1, algo="implicit_gemm")
    assert chosen.algo == "im2col" and chosen.predicted_us < implicit.predicted_us
    assert f"by the model in µs = {int(implicit.predicted_us)} against" in str(chosen)


def test_a_prediction_is_slower_than_the_floor_and_grows_with_the_work():
    times = []
    for images in (1, 16, 256):
        explained = plan((images, 64, 56, 56), (64, 64, 3, 3), 1, 1, algo="implicit_gemm")
        assert explained.predicted_us > 2 * explained.multiply_adds / 67e6
        assert f"{explained.predicted_us:.4g} µs on an H200" in str(explained)
        times.append(explained.predicted_us)
    assert times[0] < times[1] < times[2]


@pytest.mark.parametrize(("arch", "nearest"), [("sm_75", "im2col"), ("sm_80", "implicit_gemm")])
def test_rungs_without_a_kernel_take_the_nearest(arch, nearest):
    for algo in IMPLICIT[:3]:
        sizes = (2, 16, 12, 13), (24, 16, 3, 3)
        assert plan(*sizes, arch=arch, algo=algo).kernel == f"conv2d_{algo}_kernel"
        for direction in ("dgrad", "wgrad"):
            reasons = plan(*sizes, arch=arch, algo=algo, direction=direction).reasons
            assert reasons == (
                (algo, False, f"asked for, but has no kernel for {direction}"),
                (nearest, True, f"the nearest to {algo}"),
            )
