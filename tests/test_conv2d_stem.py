"""The CPU's kernels for images of few channels, a network's first layers: against float64, and when they are taken."""

import pytest
import torch
from references import conv2d_gradients, conv2d_reference
from test_conv2d import Case, check, check_relu, inputs_of

import fastconv

# Filters: one vector of some instruction sets, tails of one and of several, several blocks of them.
CASES = [
    Case("3x3", (2, 3, 9, 11), (32, 3, 3, 3), padding=(1, 1)),
    Case("gray", (3, 1, 12, 13), (20, 1, 5, 4), padding=(2, 1)),
    Case("two channels, strided", (2, 2, 17, 31), (33, 2, 4, 5), (3, 2), (1, 3)),
    Case("four channels", (1, 4, 14, 19), (16, 4, 3, 6), (1, 2), (0, 2)),
    Case("tall filter", (2, 3, 21, 10), (48, 3, 17, 2), (2, 1), (3, 0)),
    Case("wide filter", (2, 3, 3, 45), (35, 3, 2, 31), padding=(0, 9)),
    Case("windows side by side", (2, 3, 13, 41), (70, 3, 4, 5), (4, 5)),
    Case("one row of outputs", (3, 3, 2, 60), (17, 3, 2, 3), (1, 3), (0, 2)),
    Case("padding of the whole filter and more", (1, 3, 4, 6), (24, 3, 3, 2), padding=(4, 3)),
    Case("rows and columns never read", (2, 3, 14, 28), (19, 3, 3, 3), (3, 3)),
    Case("a row in several blocks", (1, 4, 3, 1037), (18, 4, 2, 3), padding=(1, 0)),
    Case("several blocks of filters", (1, 3, 20, 12), (139, 3, 3, 3), padding=(1, 1)),
    Case("many rows a task", (17, 1, 40, 30), (21, 1, 3, 3), (2, 1), (1, 1)),
    Case("several tasks an image", (1, 3, 93, 75), (40, 3, 7, 5), (2, 2), (3, 2)),
]
LAYOUTS = ("contiguous", "channels_last")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("fprop", "dgrad", "wgrad")


@pytest.fixture
def cpu(native_backend):
    if native_backend.name != "cpu":
        pytest.skip("CUDA has no kernels of its own for stems")
    return native_backend


def kernel(x, w, stride=1, padding=0, dilation=1, groups=1, layout="contiguous", **options):
    x, w = (torch.empty(size, device="meta", memory_format=FORMATS[layout]) for size in (x, w))
    return fastconv.plan(x, w, stride, padding, dilation, groups, arch="cpu", **options).kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(cpu, case, layout, dtype):
    for direction in DIRECTIONS:
        assert kernel(case.x, case.w, *case.config, layout, direction=direction) == f"conv2d_stem_{direction}"
    check(cpu, case, dtype, layout, "im2col", compare_with_torch=dtype.itemsize == 2)


def test_without_bias_and_in_other_strides(cpu):
    for layout in ("slices", "channels_last input", "channels_last weight"):
        check(cpu, CASES[2], torch.float32, layout, bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_in_the_same_pass(cpu, layout, dtype):
    for case in (CASES[1], CASES[3], CASES[6]):
        check_relu(cpu, case, dtype, layout, bias=case is not CASES[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(cpu, isas, isa, dtype):
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    fastconv._introspect.use_isa(isa)
    for layout in LAYOUTS:
        for case in (CASES[1], CASES[2], CASES[3], CASES[6]):
            check(cpu, case, dtype, layout, "im2col")


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_reaches_only_what_reads_it(cpu, layout, which, value):
    for case in (CASES[0], CASES[2], CASES[9]):
        tensors = inputs_of(case, torch.float32, layout)
        t = tensors[0] if which == "x" else tensors[3]
        t[0, 1 % t.shape[1], t.shape[2] // 2, t.shape[3] // 2] = value
        expected = conv2d_reference(*tensors, *case.config)
        actual = conv2d_gradients(lambda x, w, b, case=case: fastconv.conv2d(x, w, b, *case.config), *tensors)
        for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
            assert torch.equal(result.isfinite(), reference.value.isfinite()), f"{case}: {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(cpu, layout, threads):
    for case in CASES[-4:]:
        tensors = inputs_of(case, torch.float32, layout)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(conv2d_gradients(lambda x, w, b, c=case: fastconv.conv2d(x, w, b, *c.config), *tensors))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), case


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_taken_for_few_channels_only(layout, direction):
    def taken(*problem):
        return "stem" in kernel(*problem, layout=layout, direction=direction)

    assert taken((1, 3, 224, 224), (64, 3, 3, 3), 1, 1)
    assert taken((4, 3, 227, 227), (96, 3, 11, 11), 4)
    assert taken((4, 3, 224, 224), (768, 3, 16, 16), 16)
    assert not taken((4, 5, 32, 32), (64, 5, 3, 3))
    assert not taken((4, 3, 32, 32), (15, 3, 3, 3))  # would leave vectors idle
    assert not taken((4, 6, 32, 32), (64, 3, 3, 3), 1, 0, 1, 2)
    assert not taken((4, 3, 32, 32), (64, 3, 3, 3), 1, 0, 2)
    assert not taken((4, 3, 32, 32), (64, 3, 3, 3), (1, 4))  # windows that do not touch
    assert not taken((4, 3, 32, 32), (64, 3, 1, 1))
    assert not taken((4, 3, 9, 9), (64, 3, 3, 3))  # rows of seven outputs
    assert taken((1, 3, 400, 4000), (16, 3, 5, 5)) == (direction != "dgrad")  # products that would fill the caches


def test_the_plan_says_so():
    x, w = torch.empty(1, 3, 224, 224, device="meta"), torch.empty(64, 3, 7, 7, device="meta")
    for direction, words in (
        ("fprop", "few channels: windows are read in place"),
        ("dgrad", "every pixel of dy times every tap"),
        ("wgrad", "few channels: windows are read in place"),
    ):
        plan = fastconv.plan(x, w, 2, 3, direction=direction, arch="cpu")
        (reason,) = [text for algo, taken, text in plan.reasons if taken]
        assert plan.algo == "im2col" and words in reason and all(plan.tile)
        assert plan.workspace_bytes + 2 * plan.scratch_bytes < 2**21
