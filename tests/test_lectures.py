"""What lectures on convolutional networks state and work through by hand: free oracles (docs/lectures.md)."""

import pytest
import torch
import torch.nn.functional as F

import fastconv

DOUBLE_ROUNDOFF = 2**-53


def put(backend, *tensors):
    return [backend.put(t) for t in tensors]


def assert_equal_by_norm(actual, expected, terms):
    """Both in float64, each a chain of sums of `terms` products, compared with their own maximum."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 4 * terms * DOUBLE_ROUNDOFF * expected.abs().max()


@pytest.mark.parametrize(
    ("stride", "padding", "expected"), [(1, 0, 5), (2, 0, 3), (3, 0, 2), (1, 1, 7)], ids=["s1", "s2", "s3", "s1 p1"]
)
def test_7x7_with_3x3(backend, stride, padding, expected):
    x, w = torch.randn(1, 1, 7, 7), torch.randn(1, 1, 3, 3)
    y = fastconv.conv2d(*put(backend, x, w), stride=stride, padding=padding)
    assert y.shape == (1, 1, expected, expected)
    p = q = expected - 1  # the last output, by the definition
    window = F.pad(x, [padding] * 4)[0, 0, p * stride : p * stride + 3, q * stride : q * stride + 3].double()
    bound = 9 * 2**-23 * (window * w[0, 0]).abs().sum()
    assert abs(y[0, 0, -1, -1].item() - (window * w[0, 0]).sum()) <= bound


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_row_and_column_that_stride_3_does_not_reach_are_never_read(backend, layout):
    x, w = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3)
    y = fastconv.conv2d(*put(backend, x.contiguous(memory_format=layout), w), stride=3)
    x[:, :, 6, :] = x[:, :, :, 6] = torch.nan
    poisoned = backend.put(x.contiguous(memory_format=layout)).requires_grad_()
    again = fastconv.conv2d(poisoned, backend.put(w).requires_grad_(), stride=3)
    assert torch.equal(again, y)
    again.sum().backward()
    assert not poisoned.grad[:, :, 6, :].any() and not poisoned.grad[:, :, :, 6].any()
    assert poisoned.grad[:, :, :6, :6].all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_nan_in_unread_rows_reaches_nothing(backend, layout):
    x, dy = torch.randn(2, 3, 7, 7), torch.randn(2, 4, 2, 2)
    x[:, :, 6, :] = x[:, :, :, 6] = torch.nan
    x, dy = backend.put(x.contiguous(memory_format=layout)), backend.put(dy)
    for algo in (None, *({"direct", "im2col"} & set(backend.algorithms))):
        w = backend.put(torch.randn(4, 3, 3, 3)).requires_grad_()
        y = fastconv.conv2d(x, w, stride=3, algo=algo)
        y.backward(dy)
        assert y.isfinite().all() and w.grad.isfinite().all(), algo


def test_plan_names_the_rows_and_columns_never_read():
    x, w = torch.empty(1, 1, 7, 7, device="meta"), torch.empty(1, 1, 3, 3, device="meta")
    plan = fastconv.plan(x, w, stride=3)
    assert (plan.unread_rows, plan.unread_cols) == (1, 1)
    assert "never read 1 rows, 1 columns" in str(plan)
    assert fastconv.plan(x, w, stride=2).unread_rows == 0


def test_ten_5x5_filters_on_32x32x3():
    layer = fastconv.Conv2d(3, 10, 5, stride=1, padding=2)
    assert layer(torch.randn(1, 3, 32, 32)).shape == (1, 10, 32, 32)
    assert sum(p.numel() for p in layer.parameters()) == 760 == 10 * 76
    plan = fastconv.plan(torch.empty(1, 3, 32, 32), layer.weight, padding=2)
    assert plan.multiply_adds == 768_000 and plan.output_size == (1, 10, 32, 32)


def test_six_5x5_filters_on_32x32x3():
    layer = fastconv.Conv2d(3, 6, 5)
    assert layer(torch.randn(1, 3, 32, 32)).shape == (1, 6, 28, 28)
    assert sum(p.numel() for p in layer.parameters()) == 456
    assert fastconv.plan(torch.empty(1, 3, 32, 32), layer.weight).multiply_adds == 352_800


def test_padding_by_half_the_kernel_preserves_the_size(backend):
    for kernel in (1, 3, 5, 7):
        x, w = put(backend, torch.randn(1, 2, 9, 8), torch.randn(3, 2, kernel, kernel))
        assert fastconv.conv2d(x, w, padding=(kernel - 1) // 2).shape == (1, 3, 9, 8)


def test_each_output_is_a_dot_product_over_the_full_depth(backend):
    x, w, b = (t.double() for t in (torch.randn(2, 5, 6, 7), torch.randn(4, 5, 3, 2), torch.randn(4)))
    y = fastconv.conv2d(*put(backend, x, w, b)).cpu()
    for n, k, p, q in ((0, 0, 0, 0), (1, 3, 3, 5), (0, 2, 1, 4)):
        expected = torch.dot(x[n, :, p : p + 3, q : q + 2].flatten(), w[k].flatten()) + b[k]
        bound = 4 * 31 * DOUBLE_ROUNDOFF * (x[n].abs().max() * w[k].abs().sum() + b[k].abs())
        assert abs(y[n, k, p, q] - expected) <= bound


def test_1x1_convolutions_are_an_mlp_at_each_pixel(backend):
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    w1, w2 = torch.randn(8, 5, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    b1, b2 = torch.randn(8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    pixels = x.permute(0, 2, 3, 1)
    expected = F.linear(F.linear(pixels, w1, b1).relu(), w2, b2).permute(0, 3, 1, 2)
    hidden = fastconv.conv2d(*put(backend, x, w1[:, :, None, None], b1)).relu()
    y = fastconv.conv2d(hidden, *put(backend, w2[:, :, None, None], b2))
    assert_equal_by_norm(y, expected, terms=6 * 9)


def test_convolution_is_equivariant_to_shifts(backend):
    x = torch.zeros(1, 3, 12, 13)
    x[:, :, 4:8, 4:9] = torch.randn(1, 3, 4, 5)
    w = torch.randn(4, 3, 3, 3)
    y = fastconv.conv2d(*put(backend, x, w), padding=1)
    shifted = fastconv.conv2d(*put(backend, x.roll((2, -1), (2, 3)), w), padding=1)
    # The products and their order are the same, but a kernel may group them by their place in a tile.
    bound = 2 * 27 * 2**-24 * F.conv2d(x.abs(), w.abs(), padding=1).max().item()
    assert (shifted - y.roll((2, -1), (2, 3))).abs().max() <= bound


def test_two_stacked_convolutions_are_one(backend):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    w1, w2 = torch.randn(4, 3, 3, 2, dtype=torch.float64), torch.randn(5, 4, 2, 3, dtype=torch.float64)
    twice = fastconv.conv2d(fastconv.conv2d(*put(backend, x, w1)), backend.put(w2))
    # w[k, c] = Σ_m w2[k, m] ∗ w1[m, c], a full convolution of the two kernels
    w = fastconv.conv2d(*put(backend, w1.transpose(0, 1), w2.flip(2, 3)), padding=(1, 2)).transpose(0, 1)
    assert w.shape == (5, 3, 4, 4)
    assert_equal_by_norm(twice, fastconv.conv2d(backend.put(x), w), terms=(18 + 24) * 9)


def test_three_3x3_layers_see_7x7(backend):
    w = torch.rand(1, 1, 3, 3) + 0.5
    x = backend.put(torch.zeros(1, 1, 15, 15)).requires_grad_()
    y = x
    for _ in range(3):
        y = fastconv.conv2d(y, backend.put(w), padding=1)
    y[0, 0, 7, 7].backward()
    seen = x.grad[0, 0].cpu().nonzero()
    assert seen.amin(0).tolist() == [4, 4] and seen.amax(0).tolist() == [10, 10] and len(seen) == 7 * 7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_pooling_example(backend, layout):
    plane = torch.tensor([[1.0, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]])
    x = torch.stack([plane, 10 * plane])[None].contiguous(memory_format=layout)
    leaf = backend.put(x).requires_grad_()
    y, indices = fastconv.max_pool2d(leaf, 2, 2, return_indices=True)
    assert y[0, 0].tolist() == [[6, 8], [3, 4]] and y[0, 1].tolist() == [[60, 80], [30, 40]]
    assert indices[0, 0].tolist() == indices[0, 1].tolist() == [[5, 7], [8, 15]]
    y.backward(backend.put(torch.tensor([[1.0, 2], [3, 4]])).expand_as(y))
    expected = torch.zeros(16).index_put((torch.tensor([5, 7, 8, 15]),), torch.tensor([1.0, 2, 3, 4]))
    assert torch.equal(leaf.grad[0, 0].cpu(), expected.view(4, 4))
    assert torch.equal(leaf.grad[0, 1].cpu(), expected.view(4, 4))


def test_the_batch_norm_formula(backend):
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) * 2 + 1
    scale, shift = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    expected = scale[:, None, None] * (x - mean) / (variance + 1e-5).sqrt() + shift[:, None, None]
    y = fastconv.batch_norm(backend.put(x), None, None, *put(backend, scale, shift), training=True)
    assert_equal_by_norm(y, expected, terms=4 * 5 * 6)


def test_lenet_as_drawn():
    x = torch.randn(2, 1, 28, 28)
    x = fastconv.MaxPool2d(2)(fastconv.Conv2d(1, 20, 5, padding=2)(x).relu())
    assert x.shape == (2, 20, 14, 14)
    x = fastconv.MaxPool2d(2)(fastconv.Conv2d(20, 50, 5, padding=2)(x).relu())
    assert x.flatten(1).shape == (2, 2450)
