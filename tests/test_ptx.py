"""The wrappers of csrc/cuda/ptx.cuh, on a GPU and as models, against what the PTX ISA defines; what the models report.

The kernels of golden/ptx.cu give a wrapper the operands in a row of words for each thread and return a row of results.
Fragments are spread over the lanes of a warp here by the formulas of the ISA's section "Matrix Fragments for mma.…".
"""

import ctypes
import math
import re

import pytest
import sanitizers
import torch
from conftest import ORDERS, ROOT

GOLDEN_LIBRARY = ROOT / "build" / "ninja" / "libfastconv_golden.so"
IN_WORDS, OUT_WORDS, UNTOUCHED = 16, 4, 0x5A5A5A5A


@pytest.fixture(params=["emulated", "cuda"])
def run(request):
    """A function that runs a kernel of golden/ptx.cu over rows of int32 words, and returns its rows of results."""
    if request.param == "emulated":
        library, device = request.getfixturevalue("emulated_library"), "cpu"
    else:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not GOLDEN_LIBRARY.exists():
            pytest.skip("no golden library: build it with `python setup.py build_ext --inplace --golden`")
        library, device = ctypes.CDLL(str(GOLDEN_LIBRARY)), "cuda"
    library.fastconv_golden_run.restype = ctypes.c_char_p

    def run(kernel, words):
        needs = 90 if kernel.startswith("stmatrix") else 80
        if device == "cuda" and torch.cuda.get_device_capability() < (needs // 10, 0):
            pytest.skip(f"{kernel} needs sm_{needs}")
        rows = torch.zeros(len(words), IN_WORDS, dtype=torch.int32)
        rows[:, : words.shape[1]] = words
        rows = rows.to(device)
        out = torch.full((len(words), OUT_WORDS), UNTOUCHED, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else None
        error = library.fastconv_golden_run(
            kernel.encode(),
            len(words),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(stream),
        )
        assert not error, error.decode()
        return out.cpu()

    return run


def random_words(*size):
    return torch.randint(-(2**31), 2**31, size).to(torch.int32)


# cp.async


@pytest.mark.parametrize("size", [16, 8, 4])
def test_cp_async_copies_and_fills_with_zeros(run, size):
    threads = torch.arange(96)
    data = random_words(96, 4)
    sizes = threads % (size + 1)
    out = run(f"cp_async_{size}", torch.cat([data, sizes.int()[:, None]], 1))
    place = torch.arange(16)
    copied = torch.where(place < sizes[:, None], data.view(torch.uint8), 0)
    ones = torch.ones(96, 4, dtype=torch.int32).view(torch.uint8)
    expected = torch.where(place < size, copied, ones)[threads ^ 5]
    assert torch.equal(out.view(torch.uint8), expected)


def test_cp_async_wait_counts_groups(run):
    data = random_words(96, 4)
    assert torch.equal(run("cp_async_wait", data), data)


# ldmatrix, stmatrix

LANES = torch.arange(32)
PAIRS = torch.stack([LANES % 4 * 2, LANES % 4 * 2 + 1], 1)  # the columns of a lane's two elements, in row lane / 4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(run, matrices, transposed):
    data = random_words(32, 4)
    rows = torch.randperm(32)
    out = run(f"ldmatrix_x{matrices}{'_trans' * transposed}", torch.cat([data, rows.int()[:, None]], 1))
    expected = torch.full((32, 4), UNTOUCHED, dtype=torch.int32)
    for m in range(matrices):
        matrix = data[rows[8 * m : 8 * m + 8]].view(torch.int16)
        if transposed:
            matrix = matrix.T
        expected[:, m] = matrix[LANES[:, None] // 4, PAIRS].view(torch.int32)[:, 0]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(run, transposed):
    registers = random_words(32, 4)
    rows = torch.randperm(32)
    out = run(f"stmatrix_x4{'_trans' * transposed}", torch.cat([registers, rows.int()[:, None]], 1))
    expected = torch.empty(32, 8, dtype=torch.int16)
    for m in range(4):
        matrix = torch.empty(8, 8, dtype=torch.int16)
        matrix[LANES[:, None] // 4, PAIRS] = registers[:, m : m + 1].contiguous().view(torch.int16)
        expected[rows[8 * m : 8 * m + 8]] = matrix.T if transposed else matrix
    assert torch.equal(out, expected.view(torch.int32))


# mma: the position (row, column) of the i-th element of a lane, for all lanes.

GROUP, THREAD = LANES >> 2, LANES % 4
MMA = {  # of each wrapper: m, n, k, dtype of A and B, positions of A, of B, of C and D
    "m16n8k16": (
        (16, 8, 16),
        [(GROUP if i < 2 or 4 <= i < 6 else GROUP + 8, THREAD * 2 + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)],
        [(THREAD * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP) for i in range(4)],
        [(GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)) for i in range(4)],
    ),
    "m16n8k8": (
        (16, 8, 8),
        [(GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)) for i in range(4)],
        [(THREAD * 2 + i, GROUP) for i in range(2)],
        [(GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)) for i in range(4)],
    ),
    "m16n8k8_tf32": (
        (16, 8, 8),
        [(GROUP if i in (0, 2) else GROUP + 8, THREAD if i < 2 else THREAD + 4) for i in range(4)],
        [(THREAD if i == 0 else THREAD + 4, GROUP) for i in range(2)],
        [(GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)) for i in range(4)],
    ),
    "m8n8k4_f64": ((8, 8, 4), [(GROUP, THREAD)], [(THREAD, GROUP)], [(GROUP, THREAD * 2 + i) for i in range(2)]),
}
WRAPPERS = {
    "mma_m16n8k16_f16": (MMA["m16n8k16"], torch.float16, torch.float32),
    "mma_m16n8k16_bf16": (MMA["m16n8k16"], torch.bfloat16, torch.float32),
    "mma_m16n8k8_f16": (MMA["m16n8k8"], torch.float16, torch.float32),
    "mma_m16n8k8_bf16": (MMA["m16n8k8"], torch.bfloat16, torch.float32),
    "mma_m16n8k8_tf32": (MMA["m16n8k8_tf32"], torch.float32, torch.float32),
    "mma_m8n8k4_f64": (MMA["m8n8k4_f64"], torch.float64, torch.float64),
}


def spread(matrix, positions):
    """The words that each lane holds of a matrix."""
    return torch.stack([matrix[row, column] for row, column in positions], 1).view(torch.int32)


def multiply(run, wrapper, a, b, c):
    """A·B + C by the wrapper, in float64."""
    (_, a_positions, b_positions, d_positions), _, accumulator = WRAPPERS[wrapper]
    words = torch.zeros(32, IN_WORDS, dtype=torch.int32)
    for first, matrix, positions in ((0, a, a_positions), (4, b, b_positions), (6, c, d_positions)):
        held = spread(matrix, positions)
        words[:, first : first + held.shape[1]] = held
    held = run(wrapper, words).view(accumulator)
    d = torch.full(c.shape, torch.nan, dtype=torch.float64)
    for i, (row, column) in enumerate(d_positions):
        d[row, column] = held[:, i].double()
    return d


def operands(wrapper, make):
    ((m, n, k), *_), dtype, accumulator = WRAPPERS[wrapper]
    a, b = make(m, k).to(dtype), make(k, n).to(dtype)
    if dtype == torch.float32:  # to tf32
        a, b = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (a, b))
    return a, b, make(m, n).to(accumulator)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mma_of_small_integers_is_exact(run, wrapper):
    a, b, c = operands(wrapper, lambda *size: torch.randint(-8, 9, size))
    assert torch.equal(multiply(run, wrapper, a, b, c), a.double() @ b.double() + c.double())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mma_places_every_element(run, wrapper):
    """With a single one in A, a row of D is a row of B: no sum can hide an element that is out of place."""
    ((m, n, k), *_), _, _ = WRAPPERS[wrapper]
    a, b, c = operands(wrapper, torch.zeros)
    b = torch.arange(1.0, k * n + 1).view(k, n).to(b.dtype)
    for i in range(m):
        for j in range(k):
            a.zero_()
            a[i, j] = 1
            expected = torch.zeros(m, n, dtype=torch.float64)
            expected[i] = b[j].double()
            assert torch.equal(multiply(run, wrapper, a, b, c), expected), (i, j)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mma_of_random_values(run, wrapper):
    """By the ISA products are exact, and sums have at least the accumulator's precision, in any order and rounded or
    truncated: k + 1 terms, each with an error of at most one unit in the last place of the sum of magnitudes."""
    a, b, c = operands(wrapper, torch.randn)
    accumulator = WRAPPERS[wrapper][2]
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    bound = (a.shape[1] + 1) * torch.finfo(accumulator).eps * magnitude
    error = (multiply(run, wrapper, a, b, c) - exact).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mma_keeps_infinities_and_nans_in_their_rows(run, wrapper):
    a, b, c = operands(wrapper, lambda *size: torch.randint(1, 9, size))
    exact = a.double() @ b.double() + c.double()
    a[1, 2], a[3, 0], c[5, 6] = math.inf, math.nan, -math.inf
    exact[1], exact[3], exact[5, 6] = math.inf, math.nan, -math.inf
    assert torch.equal(multiply(run, wrapper, a, b, c).nan_to_num(1e6), exact.nan_to_num(1e6))


# cvt


def test_cvt_rounds_to_tf32(run):
    """To 10 bits after the leading one, ties away from zero, computed in float64; subnormal values to multiples of
    2^-136."""
    bits = random_words(64, 4) & ~0x7F800000 | torch.randint(1, 254, (64, 4)).int() << 23
    values = bits.view(torch.float32)
    values[:8] = torch.randn(8, 4)
    ties = (values[8:24].view(torch.int32) & ~0x1FFF) | 0x1000
    values[8:16] = ties[:8].view(torch.float32)
    values[16:24] = (ties[8:] - 1).view(torch.float32)  # just below
    values[24, 0], values[24, 1], values[25] = math.inf, -math.inf, torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-137])
    exact = values.double()
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(exact), exponent - 11)
    rounded = torch.where(exact.isinf(), exact, torch.copysign((exact.abs() / unit + 0.5).floor() * unit, exact))
    out = run("cvt_rna_tf32", values.view(torch.int32))
    assert torch.equal(out, rounded.float().view(torch.int32))


def test_cvt_keeps_nan(run):
    assert run("cvt_rna_tf32", torch.full((1, 4), math.nan).view(torch.int32)).view(torch.float32).isnan().all()


# bar


def test_named_barriers_order_three_warps(run):
    data = random_words(96, 4)
    first = data[:32]
    from_neighbour = first[LANES ^ 3]
    assert torch.equal(run("barriers", data), torch.cat([from_neighbour, from_neighbour, first]))


# What the models report of the kernels of emulation/faults_ptx.cpp

REPORTED = {
    "never_waited_for": r"faults_ptx.cpp:\d+:\d+: cp_async_4, which the thread never waits for",
    "misaligned_source": r"cp_async_8 from 0x\w+, which is not a multiple of 8",
    "misaligned_destination": r"cp_async_16 to 0x\w+, which is not a multiple of 16",
    "too_many_bytes": r"cp_async_8 of 16 bytes",
    "copy_to_global": r"cp_async_4 to an address outside of the shared memory",
    "copy_past_the_end": r"cp_async_16 to an address outside of the shared memory",
    "copy_from_shared": r"cp_async_4 from shared memory",
    "misaligned_row": r"ldmatrix_x4: the row of lane 9, 0x\w+, is not a multiple of 16",
    "row_outside": r"ldmatrix_x4: the row of lane 9 is outside of the shared memory",
    "divergent_mma": r"waits at mma_m16n8k16_f16 .*, but thread \(9, 0, 0\) has exited",
    "mma_at_two_places": r"waits at mma_m16n8k16_f16 .*, but thread \(\d+, 0, 0\) waits at mma_m16n8k16_f16",
    "not_rounded": r"mma_m16n8k8_tf32: a\[0\] of lane 9, 0x3eaaaaab, is not rounded to tf32",
    "nobody_arrives": r"thread \(32, 0, 0\) waits at bar_sync \(.*\), where 32 of 64 threads have come",
    "half_a_warp": r"thread \(\d+, 0, 0\) waits at bar_sync of mask 0xffffffff .*, but thread \(0, 0, 0\) has exited",
    "counts_differ": r"where others came for|where 32 of 64 threads have come",
    "odd_count": r"bar_sync for 48 threads in a block of 64",
    "sixteenth_barrier": r"bar_sync at barrier 16",
}
COPYING = ("copies", "unused_address", "producer_and_consumer", "zero_is_syncthreads")
COPYING_TOO_EARLY = ("missing_wait", "missing_commit", "missing_barrier_after_wait")
RACES = ("missing_barrier_after_wait", "ring_waits_for_one_too_few")  # to ThreadSanitizer
MULTIPLYING_WRONGLY = ("wrong_row", "swapped_registers", "swapped_columns")


@pytest.fixture(params=ORDERS)
def run_case(request, emulated_library):
    """A function that runs a kernel of emulation/faults_ptx.cpp. Returns 128 floats of output and the error, or ""."""
    emulated_library.fastconv_emulation_run_ptx_case.restype = ctypes.c_char_p
    emulated_library.fastconv_emulation_set_order(ORDERS.index(request.param), ctypes.c_uint(7))

    def run(name, data):
        out = torch.full((128,), -1.0)
        error = emulated_library.fastconv_emulation_run_ptx_case(
            name.encode(), ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr())
        )
        report = sanitizers.new_report()
        if name not in RACES:
            assert not report, report
        elif request.config.getoption("--fastconv-sanitizer") == "thread" and request.param == ORDERS[0]:
            assert "data race" in report and name in report  # which is made once
        return out, (error or b"").decode()

    yield run
    chosen = ORDERS.index(request.config.getoption("--fastconv-order"))
    emulated_library.fastconv_emulation_set_order(chosen, ctypes.c_uint(1))


@pytest.mark.parametrize("name", REPORTED)
def test_faults_are_reported(run_case, name):
    _, error = run_case(name, torch.randn(256))
    assert f"kernel {name}, block (0, 0, 0)" in error
    assert re.search(REPORTED[name], error), error


@pytest.mark.parametrize("name", COPYING)
def test_right_copies(run_case, name):
    data = torch.randn(256)
    out, error = run_case(name, data)
    assert not error and torch.equal(out[:64], data[:64])


@pytest.mark.parametrize("name", COPYING_TOO_EARLY)
def test_copies_used_too_early_are_nan(run_case, name):
    out, error = run_case(name, torch.randn(256))
    assert not error and out[:64].isnan().any()


def test_a_ring_of_copies(run_case):
    data = torch.randint(-99, 99, (4, 64)).float()
    out, error = run_case("ring", data)
    assert not error and torch.equal(out[:64], data.sum(0))
    out, error = run_case("ring_waits_for_one_too_few", data)
    assert not error and out[:64].isnan().any()


def test_a_product_by_ldmatrix_and_mma(run_case):
    a, b_transposed = torch.randint(-8, 9, (16, 16)).half(), torch.randint(-8, 9, (8, 16)).half()
    data = torch.zeros(256)
    data[:128], data[128:192] = a.flatten().view(torch.float32), b_transposed.flatten().view(torch.float32)
    expected = (a.float() @ b_transposed.float().T).flatten()
    out, error = run_case("product", data)
    assert not error and torch.equal(out, expected)
    for name in MULTIPLYING_WRONGLY:
        out, error = run_case(name, data)
        assert not error and not torch.equal(out, expected), name


def test_rounded_tf32_operands(run_case):
    out, error = run_case("rounded", torch.zeros(256))
    third = 1365 / 4096  # 1/3 to eleven bits
    assert not error and torch.equal(out[:64], torch.full((64,), 8 * third * third))
