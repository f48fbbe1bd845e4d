"""plan() and algorithms(): pure, complete, and true to what the ops do."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastconv

DIRECTIONS = ("fprop", "dgrad", "wgrad")
ARCHS = ("cpu", "sm_75", "sm_80", "sm_90", "sm_100")
PROBLEMS = {  # x, w, stride, padding, dilation, groups
    "dense": ((2, 16, 12, 13), (24, 16, 3, 3), 1, 1, 1, 1),
    "1x1": ((4, 64, 14, 14), (32, 64, 1, 1), 1, 0, 1, 1),
    "depthwise": ((2, 32, 14, 15), (32, 1, 3, 3), (2, 1), 1, 1, 32),
    "grouped": ((2, 32, 14, 15), (64, 8, 3, 2), 1, (1, 0), 1, 4),
    "stem": ((1, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1, 1),
    "deep": ((1, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1, 1),
    "empty": ((0, 16, 12, 13), (24, 16, 3, 3), 1, 1, 1, 1),
}
NEEDS_SM_80 = ("mma", "implicit_gemm")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def meta(size, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plan_explains_itself(name, arch):
    x, w, *config = PROBLEMS[name]
    for direction, dtype in itertools.product(DIRECTIONS, DTYPES):
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = meta(x, dtype, layout), meta(w, dtype, layout)
            plan = fastconv.plan(*inputs, *config, direction=direction, arch=arch)
            assert plan.algo in fastconv.algorithms("cpu" if arch == "cpu" else "cuda")
            assert plan.direction == direction and plan.arch == arch and plan.kernel
            assert plan.split >= 1 and plan.workspace_bytes >= 0 and plan.scratch_bytes >= 0
            taken = [algo for algo, is_taken, _ in plan.reasons if is_taken]
            assert taken == [plan.algo]
            assert all(text for _, _, text in plan.reasons)
            text = str(plan)
            assert text.startswith(f"{direction} of ") and plan.kernel in text and f"on {arch}" in text
            assert all(reason in text for _, _, reason in plan.reasons)
            assert plan == fastconv.plan(*inputs, *config, direction=direction, arch=arch)


def test_a_plan_does_not_depend_on_threads_or_instruction_set(threads, isas):
    x, w, *config = PROBLEMS["dense"]
    plans = set()
    for isa, count in itertools.product(isas, (1, 2)):
        fastconv._introspect.use_isa(isa)
        threads(count)
        plans.add(str(fastconv.plan(meta(x), meta(w), *config)))
    assert len(plans) == 1


@pytest.mark.parametrize("name", PROBLEMS)
def test_sizes_and_unread_edges_are_those_of_the_op(name):
    x_size, w_size, *config = PROBLEMS[name]
    plan = fastconv.plan(torch.empty(x_size), torch.empty(w_size), *config)
    y = F.conv2d(meta(x_size), meta(w_size), None, *config)
    assert plan.output_size == tuple(y.shape)
    channels, rows, columns = w_size[1:]
    assert plan.multiply_adds == y.numel() * channels * rows * columns


@pytest.mark.parametrize("case", [*itertools.product((5, 8, 9), (1, 2, 3), (1, 2, 4), (0, 1), (1, 2))], ids=str)
def test_unread_rows_and_columns_have_no_gradient(case):
    size, kernel, stride, padding, dilation = case
    if dilation * (kernel - 1) >= size + 2 * padding or padding > kernel:
        pytest.skip("the kernel does not fit")
    x = torch.zeros(1, 1, size, size + 1, dtype=torch.float64, requires_grad=True)
    w = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    y = F.conv2d(x, w, None, stride, padding, dilation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    plan = fastconv.plan(x, w, stride, padding, dilation)
    read_rows, read_cols = (dx[0, 0].sum(dim).nonzero().max().item() + 1 for dim in (1, 0))
    assert (plan.unread_rows, plan.unread_cols) == (size - read_rows, size + 1 - read_cols)


def test_every_algorithm_can_be_asked_for_or_says_why_not():
    for arch, name in itertools.product(ARCHS, PROBLEMS):
        x, w, *config = PROBLEMS[name]
        algorithms = fastconv.algorithms("cpu" if arch == "cpu" else "cuda")
        for algo, direction in itertools.product(algorithms, DIRECTIONS):
            try:
                plan = fastconv.plan(meta(x), meta(w), *config, direction=direction, arch=arch, algo=algo)
            except ValueError as error:
                assert algo in str(error) and len(str(error)) > len(algo) + 10
                assert (
                    (algo == "depthwise" and name != "depthwise")
                    or (algo == "grouped" and name not in ("grouped", "depthwise"))
                    or (algo == "winograd" and name not in ("dense", "deep", "empty"))
                    or (arch == "sm_75" and algo in NEEDS_SM_80)
                )
                continue
            # An algorithm without a kernel for a direction takes its nearest rung there, and the plan says so.
            assert plan.algo == algo or any(a == algo and not taken for a, taken, _ in plan.reasons)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_problems_without_elements_have_plans(layout):
    for arch, direction in itertools.product(ARCHS, DIRECTIONS):
        for x, w, padding in (
            ((0, 3, 8, 9), (4, 3, 3, 2), 0),
            ((0, 3, 0, 9), (4, 3, 3, 2), 2),
            ((0, 3, 8, 0), (40, 3, 3, 2), 1),
            ((2, 0, 8, 9), (40, 0, 3, 2), 0),
            ((2, 0, 0, 0), (4, 0, 3, 2), 2),
        ):
            for algo in (None, *fastconv.algorithms("cpu" if arch == "cpu" else "cuda")):
                try:
                    plan = fastconv.plan(
                        meta(x).to(memory_format=layout), meta(w), 2, padding, direction=direction, arch=arch, algo=algo
                    )
                except ValueError:
                    continue  # the algorithm cannot do it
                assert plan.multiply_adds == 0 and plan.workspace_bytes < 2**20


def test_algorithms():
    assert fastconv.algorithms() == fastconv.algorithms("cpu") == fastconv.algorithms(torch.device("cpu"))
    assert set(fastconv.algorithms()) >= {"direct", "im2col", "depthwise", "grouped", "winograd"}
    assert fastconv.algorithms("cuda")[0] == "direct_naive"
    assert fastconv.algorithms("cuda:1") == fastconv.algorithms("cuda")


def test_the_arguments_of_conv2d_are_taken():
    x, w = meta((3, 9, 8)), meta((4, 3, 3, 2))
    assert fastconv.plan(x, w, padding="same").output_size == (1, 4, 9, 8)
    assert fastconv.plan(x, w, padding="valid").output_size == (1, 4, 7, 7)
    assert fastconv.plan(x, w, (2, 1), (0, 1), (1, 2)).output_size == (1, 4, 4, 8)
    assert "NHWC" in fastconv.plan(meta((1, 3, 9, 8), layout=torch.channels_last), w).problem
    assert "NCHW" in fastconv.plan(meta((1, 3, 9, 8)), w).problem


def test_errors():
    x, w = meta((1, 3, 9, 8)), meta((4, 3, 3, 2))
    with pytest.raises(ValueError, match="unknown direction 'sideways'"):
        fastconv.plan(x, w, direction="sideways")
    with pytest.raises(ValueError, match="unknown arch 'sm_12': expected cpu, sm_75"):
        fastconv.plan(x, w, arch="sm_12")
    with pytest.raises(ValueError, match="unknown algo 'fft'"):
        fastconv.plan(x, w, algo="fft")
    with pytest.raises(ValueError, match="no kernel for torch.complex64 on cpu"):
        fastconv.plan(torch.zeros(1, 3, 9, 8, dtype=torch.complex64), w)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5 channels instead"):
        fastconv.plan(meta((1, 5, 9, 8)), w)


def test_memory_is_bounded():
    """A plan's workspace is no multiple of its tensors: wgrad of 1×128×168×64 once took 8 GB elsewhere."""
    x, w = (1, 128, 168, 64), (128, 128, 3, 3)
    for arch, layout in itertools.product(ARCHS, (torch.contiguous_format, torch.channels_last)):
        for direction in DIRECTIONS:
            plans = [
                fastconv.plan(meta(x, d, layout), meta(w, d, layout), padding=1, direction=direction, arch=arch)
                for d in (torch.float32, torch.bfloat16)
            ]
            totals = [p.workspace_bytes + 64 * p.scratch_bytes for p in plans]
            assert totals[0] <= 512 * 2**20 and totals[1] <= totals[0]
