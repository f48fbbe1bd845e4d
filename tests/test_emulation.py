"""The emulation of CUDA finds what hardware leaves undefined, and runs right kernels alike in every order."""

import ctypes
import re

import pytest
import torch

FAULTS = {
    "exit_before_barrier": r"waits at __syncthreads \(faults.cpp:\d+:\d+\), but thread \(40, 0, 0\) has exited",
    "two_barriers": r"waits at __syncthreads \(faults.cpp:\d+:\d+\), but thread \(\d, 0, 0\) waits at __syncthreads",
    "exited_lane": r"waits at __shfl_xor_sync of mask 0xffffffff .*, but thread \(3, 0, 0\) has exited",
    "lane_outside_mask": r"__any_sync of mask 0x0000ffff, which this lane is not in",
    "source_outside_mask": r"lane \d+ reads lane \d+, which does not take part",
    "shared_overrun": r"wrote outside of its shared memory",
    "misaligned_vector": r"is not a multiple of 16",
    "misaligned_load": r"is not a multiple of 8",
    "endless_spin": r"its threads spin, and none goes on",
}


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def run_case(request, emulated_library):
    """A function that runs a kernel of emulation/faults.cpp and returns its output and the error, "" if none."""
    if request.config.getoption("--fastconv-sanitizer"):
        pytest.skip("a sanitizer would end the process: see test_sanitizers.py")
    order = ("forward", "reverse", "shuffled").index(request.param)
    emulated_library.fastconv_emulation_run_case.restype = ctypes.c_char_p
    emulated_library.fastconv_emulation_set_order(order, ctypes.c_uint(7))

    def run(name):
        out = torch.full((64,), torch.nan)
        error = emulated_library.fastconv_emulation_run_case(name.encode(), ctypes.c_void_p(out.data_ptr()))
        return out, (error or b"").decode()

    yield run
    chosen = ("forward", "reverse", "shuffled").index(request.config.getoption("--fastconv-order"))
    emulated_library.fastconv_emulation_set_order(chosen, ctypes.c_uint(1))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(run_case, name):
    _, error = run_case(name)
    assert f"kernel {name}, block (0, 0, 0)" in error
    assert re.search(FAULTS[name], error), error


def test_a_missing_barrier_shows(run_case):
    out, error = run_case("missing_barrier")
    assert not error and out.isnan().any()


def test_a_race_shows_in_another_order(run_case, request):
    out, error = run_case("race_in_order")
    right = torch.equal(out, (torch.arange(64) // 2).float())
    assert not error and right == ("forward" in request.node.callspec.params.values())


def test_too_much_shared_memory_is_reported(run_case):
    assert run_case("too_much_shared_memory")[1] == "too much shared memory"


def test_what_no_kernel_wrote_is_nan(emulated_library):
    x = torch.zeros(64)
    for _ in range(3):
        torch.zeros(64)  # leaves zeros where the next tensor may be
        assert torch.ops.fastconv_emulated.unwritten_output(x).isnan().all()


def test_a_spin_wait_lets_others_run(run_case):
    out, error = run_case("spin")
    assert not error and out[:2].tolist() == [5, 5]


def test_masked_shuffles(run_case):
    out, error = run_case("halves")
    lanes = torch.arange(16.0)
    expected = torch.cat([(lanes + 1).clamp(max=15), 16 + torch.where(lanes < 3, lanes, lanes - 3)])
    assert not error and torch.equal(out, expected.repeat(2))


def test_reductions(run_case):
    out, error = run_case("sum")
    assert not error and torch.equal(out, torch.full((64,), sum(range(64)) + 32e4 + 5e6))


def test_integer_reductions_and_matches(run_case):
    out, error = run_case("reduce")
    # Of lane 3 in the second warp: lanes 0 … 31 or 0 … 15, the odd ones negative where the sign counts.
    assert not error and out[:10].tolist() == [sum(range(32)), -8, -31, 15, 32, 0b1111, 0, 5, 11, 0]


def test_pairs_round_to_nearest_even(run_case):
    out, error = run_case("pairs")
    assert not error and out[:4].tolist() == [1, torch.inf, 1 + 4 / 256, -1]
