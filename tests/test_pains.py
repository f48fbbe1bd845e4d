"""What users of other libraries suffered from. Numbers are issues and pull requests of pytorch/pytorch."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from batch_norm_reference import batch_norm_reference
from references import assert_close, conv2d_gradients, conv2d_reference, largest_error, without_onednn
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv import autograd

NAN, INF = torch.nan, torch.inf


def meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", ["cpu", "sm_90"])
def test_117736_half_convolution_of_more_than_2_31_elements_is_planned_without_overflow(arch):
    x, w = meta(1, 514, 2048, 2048, dtype=torch.float16), meta(64, 514, 3, 3, dtype=torch.float16)
    for direction in ("fprop", "dgrad", "wgrad"):
        plan = fastconv.plan(x, w, padding=1, direction=direction, arch=arch)
        assert plan.output_size == (1, 64, 2048, 2048)
        assert plan.multiply_adds == 64 * 2048 * 2048 * 514 * 9
        assert 0 <= plan.workspace_bytes <= 8 * 2**30 and plan.split >= 1


@pytest.mark.parametrize("arch", ["cpu", "sm_90"])
def test_80020_152816_grouped_and_depthwise_beyond_2_31_elements_are_planned_without_overflow(arch):
    for channels, groups in ((1024, 1024), (1024, 32)):
        x, w = meta(2, channels, 1200, 1100), meta(channels, channels // groups, 3, 3)
        for direction in ("fprop", "dgrad", "wgrad"):
            plan = fastconv.plan(x, w, padding=1, groups=groups, direction=direction, arch=arch)
            assert plan.output_size == tuple(x.shape)
            assert 0 <= plan.workspace_bytes <= 8 * 2**30 and plan.split >= 1


def huge_image(layout):
    """More than 2^31 elements, of which only every 2^13th row and column is ever touched, so that little memory is."""
    step, size = 2**13, (1, 2, 2**15 + 1, 2**15 + 1)
    x = torch.empty(size, dtype=torch.float16, memory_format=layout)
    assert x.numel() > 2**31
    x[:, :, ::step, ::step] = torch.randn(1, 2, 5, 5).half()
    return x, step


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_117736_152816_offsets_beyond_2_31_in_convolutions(backend, layout):
    x, step = huge_image(layout)
    touched = x[:, :, ::step, ::step].contiguous()
    if backend.device != "cpu":
        x = backend.put(x)
    for algo in (None, *backend.algorithms):
        groups = 2 if algo in ("depthwise", "grouped") else 1
        w, dy = torch.randn(2, 2 // groups, 1, 1).half(), torch.randn(1, 2, 5, 5).half()
        expected = conv2d_reference(touched, w, None, dy, 1, 0, 1, groups)
        leaf, upstream = backend.put(w).requires_grad_(), backend.put(dy)
        try:
            y = fastconv.conv2d(x, leaf, None, step, groups=groups, algo=algo)
        except ValueError as error:  # an algorithm may refuse such sizes, but then another one must do them
            assert algo not in (None, "direct") and re.search("32 bits|this is float16|3×3", str(error))
            continue
        y.backward(upstream)
        assert_close("y", y, expected[0])
        assert_close("dw", leaf.grad, expected[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_34083_offsets_and_indices_beyond_2_31_in_pooling(backend, layout):
    x, step = huge_image(layout)
    touched = x[:, :, ::step, ::step].contiguous()
    y, indices = fastconv.max_pool2d(backend.put(x), 2, 2 * step, 0, step, return_indices=True)
    expected, small_indices = F.max_pool2d(touched, 2, 2, return_indices=True)
    assert torch.equal(y.cpu(), expected)
    rows, columns = small_indices // 5 * step, small_indices % 5 * step
    assert torch.equal(indices.cpu(), rows * x.shape[3] + columns)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_34083_offsets_beyond_2_31_in_average_pooling(backend, layout):
    x, step = huge_image(layout)
    y = fastconv.avg_pool2d(backend.put(x), 1, step)
    assert torch.equal(y.cpu(), x[:, :, ::step, ::step])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_117736_whole_convolution_of_more_than_2_31_elements(full, layout):
    """All of it, forward and backward: 9 GB."""
    if not full:
        pytest.skip("takes 9 GB: --full runs it")
    size, pattern = (1, 514, 2048, 2048), torch.randn(1, 514, 16, 16).half()
    x = torch.empty(size, dtype=torch.float16, memory_format=layout)
    x.view(1, 514, 128, 16, 128, 16).copy_(pattern.view(1, 514, 1, 16, 1, 16).expand(1, 514, 128, 16, 128, 16))
    w = torch.randn(2, 514, 1, 1).half()
    y = fastconv.conv2d(x, w)
    expected = conv2d_reference(pattern, w, None, torch.zeros(1, 2, 16, 16), 1, 0, 1, 1)[0]
    tiles = y.view(1, 2, 128, 16, 128, 16)
    for row, column in ((0, 0), (0, 127), (63, 64), (127, 0), (127, 127)):
        assert_close("y", tiles[:, :, row, :, column], expected)
    assert (tiles == tiles[:, :, :1, :, :1]).all()
    dy = torch.zeros_like(y)
    dy[0, 1, -1, -1], dy[0, 0, 0, 0] = 2, 1
    del y, tiles
    config = ((1, 1), (0, 0), (1, 1), 1, layout is torch.channels_last, False, None)
    dw, _ = autograd.conv2d_wgrad(dy, x, w.shape, False, *config)
    assert torch.equal(dw[:, :, 0, 0], torch.stack([pattern[0, :, 0, 0], 2 * pattern[0, :, -1, -1]]))
    del x
    dx = autograd.conv2d_dgrad(dy, w, size, *config)
    assert torch.equal(dx[0, :, 0, 0], w[0, :, 0, 0]) and torch.equal(dx[0, :, -1, -1], 2 * w[1, :, 0, 0])
    assert dx.count_nonzero() == 2 * 514


@pytest.mark.parametrize("arch", ["cpu", "sm_90"])
def test_132300_166643_22741_memory_is_bounded(arch):
    """No direction asks for GB, as cuDNN did for the first of these, nor for more in bfloat16 than in float32."""
    for x_size, w_size in (
        ((1, 128, 168, 64), (128, 128, 3, 3)),
        ((1, 128, 168, 64), (256, 128, 5, 5)),
        ((32, 64, 56, 56), (64, 64, 3, 3)),
        ((8, 3, 224, 224), (64, 3, 7, 7)),
    ):
        for direction in ("fprop", "dgrad", "wgrad"):
            wanted = {}
            for dtype in (torch.float32, torch.bfloat16):
                plan = fastconv.plan(
                    meta(*x_size, dtype=dtype), meta(*w_size, dtype=dtype), direction=direction, arch=arch
                )
                wanted[dtype] = plan.workspace_bytes + plan.scratch_bytes
            assert wanted[torch.float32] <= 256 * 2**20, (x_size, w_size, direction)
            assert wanted[torch.bfloat16] <= wanted[torch.float32], (x_size, w_size, direction)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_150700_bfloat16_gradients_agree_with_float64(backend, layout):
    x, w, b = torch.randn(4, 24, 9, 8), torch.randn(20, 24, 3, 3), torch.randn(20)
    x, w, b, dy = (t.bfloat16() for t in (x, w, b, torch.randn(4, 20, 9, 8)))
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    config = (1, 1, 1, 1)
    expected = conv2d_reference(x, w, b, dy, *config)
    actual = conv2d_gradients(lambda *t: fastconv.conv2d(*t, *config), *map(backend.put, (x, w, b, dy)))
    for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        assert_close(name, result, reference)


def test_70042_2831_85425_repeated_backward_is_bitwise_equal(backend):
    x, w, weight = torch.randn(3, 6, 9, 8), torch.randn(5, 6, 3, 3), torch.randn(5)

    def step():
        leaves = [backend.put(t.clone()).requires_grad_() for t in (x, w, weight)]
        y = fastconv.conv2d(*leaves[:2], padding=1)
        y = fastconv.batch_norm(y, None, None, leaves[2], None, training=True)
        fastconv.max_pool2d(y, 3, 2, 1).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_19599_12013_189831_empty_batch_through_a_network_keeps_statistics_finite():
    model = torch.nn.Sequential(fastconv.Conv2d(3, 4, 3), fastconv.BatchNorm2d(4), fastconv.MaxPool2d(2))
    x = torch.empty(0, 3, 8, 9, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert torch.equal(model[1].running_mean, torch.zeros(4)) and torch.equal(model[1].running_var, torch.ones(4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_28714_pool_indices_beyond_2_24_are_exact(native_backend, layout):
    rows = 2**24 + 1
    x = torch.zeros(1, 1, rows, 2, dtype=torch.bfloat16)
    x[0, 0, -3:, 1] = torch.tensor([1.0, 3, 2])
    x = native_backend.put(x.contiguous(memory_format=layout))
    y, indices = fastconv.max_pool2d(x, (3, 2), (2**22, 1), return_indices=True)
    last = y.shape[2] - 1
    assert y.shape == (1, 1, 4, 1) and indices[0, 0, last, 0] == last * 2**22 * 2
    y, indices = fastconv.max_pool2d(x, (3, 2), (rows - 3, 1), return_indices=True)
    assert y.flatten().tolist() == [0, 3] and indices.flatten().tolist() == [0, (rows - 2) * 2 + 1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_34083_large_channels_last_pooling(full, layout):
    if not full:
        pytest.skip("takes 2 GB: --full runs it")
    x = torch.randint(-100, 100, (200, 512, 28, 28), dtype=torch.int8).bfloat16().contiguous(memory_format=layout)
    y, indices = fastconv.max_pool2d(x, 2, return_indices=True)
    expected, expected_indices = F.max_pool2d(x.contiguous(), 2, return_indices=True)
    assert torch.equal(y, expected) and torch.equal(indices, expected_indices)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_1466_23161_39044_pool_windows_of_inf_or_nan(backend, layout):
    plane = torch.tensor([[-INF, -INF, 1, NAN], [-INF, -INF, NAN, 2], [INF, 3, -INF, -INF], [NAN, INF, -INF, 0]])
    x = backend.put(plane[None, None].contiguous(memory_format=layout)).requires_grad_()
    y, indices = fastconv.max_pool2d(x, 2, return_indices=True)
    assert y[0, 0, 0, 0] == -INF and y[0, 0, 1, 1] == 0
    assert y[0, 0, 0, 1].isnan() and y[0, 0, 1, 0].isnan()
    assert indices.flatten().tolist() == [0, 6, 12, 15]  # of NaNs the last, of −inf the first
    y.sum().backward()
    assert x.grad.flatten().nonzero().flatten().tolist() == [0, 6, 12, 15]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_122024_193104_197409_bad_offsets_reach_no_other_memory(backend, layout):
    nhwc = layout == "NHWC"
    x_size, window = (2, 3, 4, 5), (2, 2, 0, 1, False, nhwc)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    offsets = torch.full((2, 3, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=memory_format)
    dy, x = torch.ones(2, 3, 2, 2), torch.ones(x_size)
    offsets, dy, x = map(backend.put, (offsets, dy, x))
    dx = autograd.max_pool2d_backward(dy, offsets, x_size, *window)
    assert torch.equal(dx, torch.zeros_like(dx))
    indices = fastconv._ops.max_pool2d_indices(offsets, x_size, *window)
    assert indices.min() >= 0 and indices.max() < 4 * 5
    gathered = autograd.max_pool2d_gather(x, offsets, *window)
    assert torch.equal(gathered, torch.zeros_like(gathered))


def test_offsets_of_another_pooling_are_an_error():
    dy, window = torch.ones(2, 3, 2, 2), (2, 2, 0, 1, False, False)
    for offsets in (torch.zeros(2, 3, 2, 1, dtype=torch.uint8), torch.zeros(2, 3, 2, 2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"expected offsets of size \[2, 3, 2, 2\] and 1 bytes each"):
            autograd.max_pool2d_backward(dy, offsets, (2, 3, 4, 5), *window)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "size", [(131_073, 2), (2, 131_073), (131_073, 1, 1, 2), (2, 1, 3, 65_537), (1, 65_537, 2, 3)], ids=str
)
def test_3038_2917_19911_29744_batch_norm_with_many_of_any_dimension(native_backend, size, training):
    x, dy = torch.randn(size) + 1, torch.randn(size)
    weight, bias, mean = (torch.randn(size[1]) for _ in range(3))
    var = torch.rand(size[1]) + 0.5
    expected = batch_norm_reference(x, weight, bias, mean, var, dy, training, 0.1, 1e-5)
    leaves = [native_backend.put(t).requires_grad_() for t in (x, weight, bias)]
    y = fastconv.batch_norm(leaves[0], native_backend.put(mean), native_backend.put(var), *leaves[1:], training)
    y.backward(native_backend.put(dy))
    for name, result in zip(("y", "dx", "dweight", "dbias"), (y, *(leaf.grad for leaf in leaves)), strict=True):
        assert largest_error(result, expected[name].value) <= expected[name].bound(torch.float32), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["NCDHW", "NDHWC"])
def test_4107_51776_batch_norm_of_more_than_2_31_elements(full, layout):
    """70×32×100³, whose values depend on the channel and the parity of the image only."""
    if not full:
        pytest.skip("takes 9 GB: --full runs it")
    x = torch.empty(70, 32, 100, 100, 100, dtype=torch.bfloat16, memory_format=layout)
    assert x.numel() > 2**31
    channel = torch.arange(32).view(1, 32, 1, 1, 1)
    x[::2], x[1::2] = channel + 1, channel - 1
    mean, var = torch.zeros(32), torch.ones(32)
    y = fastconv.batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-12)
    del x
    torch.testing.assert_close(mean, torch.arange(32.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var, torch.ones(32), rtol=1e-4, atol=0)
    assert (y[::2] == 1).all() and (y[1::2] == -1).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_5410_162489_batch_norm_of_constant_channels(backend, layout):
    for value in (0.0, 0.1, 1.0, -12345.678, 1e30):
        x = torch.full((4, 3, 5, 7), value).contiguous(memory_format=layout)
        weight, bias = torch.randn(3), torch.randn(3)
        leaf = backend.put(x).requires_grad_()
        mean, var = backend.put(torch.zeros(3)), backend.put(torch.ones(3))
        y = fastconv.batch_norm(leaf, mean, var, *map(backend.put, (weight, bias)), training=True, momentum=1.0)
        y.square().sum().backward()
        assert torch.equal(y.cpu(), bias[:, None, None].expand(y.shape)), value
        assert torch.equal(var.cpu(), torch.zeros(3)) and torch.equal(mean.cpu(), x[0, :, 0, 0]), value
        assert leaf.grad.isfinite().all()


def test_5410_batch_norm_of_huge_values_stays_finite(backend):
    x = torch.randn(4, 3, 5, 7) * 1e30
    leaf = backend.put(x).requires_grad_()
    y = fastconv.batch_norm(leaf, None, None, training=True)
    y.square().sum().backward()
    assert y.isfinite().all() and leaf.grad.isfinite().all()


def test_mmsegmentation_272_one_value_a_channel_is_a_clear_error():
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel when training, got input size .*\[1, 512, 1, 1\]"
    ):
        fastconv.BatchNorm2d(512)(torch.randn(1, 512, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_82493_batch_norm_gradients_in_half_agree_with_float64(backend, dtype):
    x, dy, weight, bias = torch.randn(4, 6, 9, 8) * 3 + 2, torch.randn(4, 6, 9, 8), torch.randn(6), torch.randn(6)
    x, dy = x.to(dtype), dy.to(dtype)
    expected = batch_norm_reference(x, weight, bias, torch.zeros(6), torch.ones(6), dy, True, 0.1, 1e-5)
    leaves = [backend.put(t).requires_grad_() for t in (x, weight, bias)]
    y = fastconv.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
    y.backward(backend.put(dy))
    for name, result in zip(("y", "dx", "dweight", "dbias"), (y, *(leaf.grad for leaf in leaves)), strict=True):
        assert largest_error(result, expected[name].value) <= expected[name].bound(result.dtype), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_157363_cuda_graphs_and_other_streams():
    x, w = torch.randn(2, 8, 9, 8, device="cuda"), torch.randn(6, 8, 3, 3, device="cuda")

    def step(x):
        y = fastconv.batch_norm(fastconv.conv2d(x, w, padding=1), None, None, training=True)
        return fastconv.max_pool2d(y, 2)

    expected = step(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(step(x), expected)
    stream.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = step(static)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_89128_the_bias_gradient_costs_no_pass_of_its_own():
    class Calls(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, w, b = (torch.randn(size, requires_grad=True) for size in ((2, 3, 5, 6), (4, 3, 2, 2), (4,)))
    y = fastconv.conv2d(x, w, b)
    dy = torch.randn_like(y)
    with Calls() as calls:
        torch.autograd.grad(y, (x, w, b), dy)
    computing = [name for name in calls.names if "detach" not in name]
    assert computing == ["fastconv.conv2d_dgrad.default", "fastconv.conv2d_wgrad.default"]


def test_narrow_channels_last_convolution_that_crashes_onednn(backend):
    x, w, b = torch.randn(2, 6, 5, 1), torch.randn(8, 3, 4, 1), torch.randn(8)
    config = (2, 3, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    with without_onednn():
        dy = torch.randn_like(F.conv2d(x, w, b, *config))
    expected = conv2d_reference(x, w, b, dy, *config)
    actual = conv2d_gradients(lambda *t: fastconv.conv2d(*t, *config), *map(backend.put, (x, w, b, dy)))
    for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        assert_close(name, result, reference)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_pool_windows_without_any_input_element(backend, layout):
    x = torch.randn(1, 3, 1, 10).contiguous(memory_format=layout)
    leaf = backend.put(x).requires_grad_()
    y, indices = fastconv.max_pool2d(leaf, 3, padding=1, dilation=(2, 1), ceil_mode=True, return_indices=True)
    assert y.shape == indices.shape
    assert indices.min() >= 0 and indices.max() < 10
    y.nan_to_num(neginf=0).sum().backward()
    # By hand: stride 3, so row p reads image rows 3p − 1 + {0, 2, 4}, and column q columns 3q − 1 + {0, 1, 2}.
    gradient = torch.zeros_like(x)
    for c, p, q in itertools.product(range(3), range(y.shape[2]), range(y.shape[3])):
        rows = [r for r in (3 * p - 1, 3 * p + 1, 3 * p + 3) if r == 0]
        columns = [s for s in range(3 * q - 1, 3 * q + 2) if 0 <= s < 10]
        if not rows or not columns:
            assert y[0, c, p, q] == -INF
            continue
        best = max(columns, key=lambda s: x[0, c, 0, s].item())  # noqa: B023
        assert y[0, c, p, q] == x[0, c, 0, best] and indices[0, c, p, q] == best
        gradient[0, c, 0, best] += 1
    assert torch.equal(leaf.grad.cpu(), gradient)


def test_dilation_that_overflows_the_effective_kernel_is_an_error():
    with pytest.raises(RuntimeError):
        fastconv.conv2d(torch.zeros(2, 1, 2, 12), torch.zeros(4, 1, 1, 3), None, 3, (0, 1), 2**62)
