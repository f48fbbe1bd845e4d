"""What lectures on convolutional networks state and work through by hand: free oracles (docs/lectures.md)."""

import costs
import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    cost = fastconv.cost(layer, (3, 32, 32))
    assert (cost.output_size, cost.parameters, cost.multiply_adds) == ((10, 32, 32), 760, 75 * 10_240)


def test_six_5x5_filters_on_32x32x3():
    layer = fastconv.Conv2d(3, 6, 5)
    assert layer(torch.randn(1, 3, 32, 32)).shape == (1, 6, 28, 28)
    assert sum(p.numel() for p in layer.parameters()) == 456
    assert fastconv.plan(torch.empty(1, 3, 32, 32), layer.weight).multiply_adds == 352_800
    cost = fastconv.cost(layer, (3, 32, 32))
    assert (cost.output_size, cost.parameters, cost.multiply_adds) == ((6, 28, 28), 456, 352_800)


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


# What the layers and networks cost. Where a printed total is not what its own lines give, benchmarks/costs.py has both.


def summary(build, size, **arguments):
    with torch.device("meta"):
        return fastconv.summary(fastconv.convert(build(**arguments)), size)


def maps(rows, *layers):
    """The sizes of the outputs of the layers that are named."""
    return [row.output_size for row in rows if row.layer in layers]


def weighted(rows):
    return [row.weights for row in rows if row.weights]


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 5), (2, 0, 3), (3, 0, 2), (1, 1, 7)])
def test_the_size_of_7x7_with_3x3(stride, padding, size):
    layers = nn.Conv2d(1, 1, 3, stride, padding), fastconv.MaxPool2d(3, stride, padding)
    assert [fastconv.cost(layer, (1, 7, 7)).output_size for layer in layers] == [(1, size, size)] * 2


def test_strides_paddings_and_kernels_differ_by_axis():
    cost = fastconv.cost(fastconv.Conv2d(3, 4, (3, 5), (2, 1), (0, 2)), (3, 9, 8))
    assert cost.output_size == (4, (9 - 3) // 2 + 1, (8 - 5 + 2 * 2) // 1 + 1)


def test_1x1_convolutions_of_64_maps_of_56x56():
    cost = fastconv.cost(fastconv.Conv2d(64, 32, 1), (64, 56, 56))
    assert cost.output_size == (32, 56, 56) and cost.multiply_adds == 32 * 56 * 56 * 64
    assert cost.receptive_field == (1, 1)


def test_weights_in_one_and_three_dimensions():
    c_in, c_out, k = 5, 7, 3
    assert fastconv.cost(fastconv.Conv1d(c_in, c_out, k), (c_in, 9)).weights == c_out * c_in * k
    assert fastconv.cost(nn.Conv3d(c_in, c_out, k), (c_in, 9, 9, 9)).weights == c_out * c_in * k**3


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_receptive_field_of_stacked_layers(kernel_size):
    layers = [fastconv.Conv2d(2, 2, kernel_size) for _ in range(6)]
    rows = fastconv.summary(nn.Sequential(*layers), (2, 64, 64))
    assert [row.receptive_field for row in rows] == [(1 + n * (kernel_size - 1),) * 2 for n in range(1, 7)]


def test_three_3x3_layers_have_27_weights_where_one_7x7_has_49():
    channels = 16
    small = fastconv.cost(nn.Sequential(*(nn.Conv2d(channels, channels, 3) for _ in range(3))), (channels, 32, 32))
    large = fastconv.cost(nn.Conv2d(channels, channels, 7), (channels, 32, 32))
    assert small.receptive_field == large.receptive_field == (7, 7)
    assert (small.weights, large.weights) == (27 * channels**2, 49 * channels**2)


def test_pooling_and_batch_norm_of_the_lectures():
    rows = fastconv.summary(nn.Sequential(nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2), nn.BatchNorm2d(96)), (96, 110, 110))
    assert maps(rows, "MaxPool2d") == [(96, 55, 55), (96, 27, 27)]
    assert [row.parameters for row in rows] == [0, 0, 2 * 96] and rows.total.multiply_adds == 0


def test_lenet_as_drawn():
    rows = summary(networks.LeNet5, (1, 28, 28))
    assert [row.output_size for row in rows if row.layer != "ReLU"] == [
        (20, 28, 28), (20, 14, 14), (50, 14, 14), (50, 7, 7), (2450,), (500,), (10,)
    ]  # fmt: skip
    assert networks.LeNet5()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_lenet_as_printed():
    """60k weights and 341k operations are the parameters and the connections of the paper of 1998."""
    rows = summary(networks.LeNet1998, (1, 32, 32))
    fixed_codes = rows[-1].weights
    assert rows.total.parameters - fixed_codes == 60_000
    c1, s2, *c3, s4, c5, f6 = [row.parameters for row in rows if row.parameters][:-1]
    assert (c1, s2, sum(c3), s4, c5, f6) == (156, 12, 1_516, 32, 48_120, 10_164)
    assert costs.connections(networks.LeNet1998(), (1, 32, 32)) == 340_908


def test_alexnet_as_printed():
    rows = summary(networks.AlexNet, (3, 227, 227))
    assert maps(rows, "Conv2d", "MaxPool2d", "LocalResponseNorm", "Linear") == [
        (96, 55, 55), (96, 27, 27), (96, 27, 27), (256, 27, 27), (256, 13, 13), (256, 13, 13), (384, 13, 13),
        (384, 13, 13), (256, 13, 13), (256, 6, 6), (4096,), (4096,), (1000,),
    ]  # fmt: skip
    assert (rows[0].weights, rows[0].biases) == (34_848, 96) and rows[0].weights == 11 * 11 * 3 * 96
    total, grouped = rows.total, summary(networks.AlexNet, (3, 227, 227), groups=2).total
    assert (total.parameters, total.multiply_adds) == (62_378_344, 1_135_256_096)
    assert (grouped.parameters, grouped.multiply_adds) == (60_965_224, 724_406_816)


def test_zfnet():
    rows = summary(networks.ZFNet, (3, 224, 224))
    with torch.device("meta"):
        convolutions = [layer for layer in networks.ZFNet() if isinstance(layer, nn.Conv2d)]
    assert (convolutions[0].kernel_size, convolutions[0].stride) == ((7, 7), (2, 2))
    assert [size[0] for size in maps(rows, "Conv2d")] == [96, 256, 512, 1024, 512]
    assert [size[1:] for size in maps(rows, "MaxPool2d")] == [(55, 55), (13, 13), (6, 6)]


def test_vgg_as_printed():
    rows = summary(networks.VGG, (3, 224, 224))
    assert weighted(rows) == [
        1_728, 36_864, 73_728, 147_456, 294_912, 589_824, 589_824, 1_179_648, *[2_359_296] * 5,
        102_760_448, 16_777_216, 4_096_000,
    ]  # fmt: skip
    assert maps(rows, "MaxPool2d") == [(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7)]
    assert maps(rows, "Linear") == [(4096,), (4096,), (1000,)]
    convolutions = maps(rows, "Conv2d")
    assert len(convolutions) == 13
    # maps shrink and channels grow
    assert all(a[0] <= b[0] and a[1:] >= b[1:] for a, b in zip(convolutions, convolutions[1:], strict=False))


def test_inception():
    naive = summary(networks.NaiveInception, (256, 28, 28), channels=256, f1=128, f3=192, f5=96)
    assert naive.total.multiply_adds == 854_196_224 == 28 * 28 * (128 * 256 + 192 * 9 * 256 + 96 * 25 * 256)
    assert naive.total.output_size == (128 + 192 + 96 + 256, 28, 28)
    branches = {"channels": 256, "f1": 128, "r3": 64, "f3": 192, "r5": 64, "f5": 96, "pool": 64}
    bottlenecks = summary(networks.Inception, (256, 28, 28), **branches)
    assert bottlenecks.total.multiply_adds == sum(row.multiply_adds for row in bottlenecks) == 271_351_808
    assert bottlenecks.total.output_size == (480, 28, 28)
    middle = next(row for row in bottlenecks if row.weights == 192 * 64 * 9)
    assert round((bottlenecks.total.multiply_adds + middle.multiply_adds) / 1e6) == 358  # the slide adds it twice


def test_googlenet_as_printed():
    rows = summary(networks.GoogLeNet, (3, 224, 224))
    assert sum(row.layer == "Conv2d" for row in rows) == 57 and sum(row.layer == "Linear" for row in rows) == 1
    assert (rows.total.parameters, rows.total.multiply_adds) == (6_998_552, 1_582_671_872)
    rounded_down = summary(networks.GoogLeNet, (3, 224, 224), ceil_mode=False).total
    assert round(rounded_down.multiply_adds / 1e9, 2) == 1.43  # what the slide prints


def test_what_the_lectures_say_of_the_networks():
    """VGG needs the most memory and operations, GoogLeNet stores least, AlexNet computes little and stores much."""
    named = ("AlexNet", "VGG-16", "VGG-19", "GoogLeNet", *(f"ResNet-{depth}" for depth in (18, 34, 50, 101, 152)))
    totals = {name: summary(networks.NETWORKS[name].build, networks.NETWORKS[name].size).total for name in named}

    def in_order(figure):
        return sorted(named, key=lambda name: figure(totals[name]))

    assert in_order(lambda total: total.parameters)[0] == "GoogLeNet"
    assert in_order(lambda total: total.parameters)[-2:] == ["VGG-16", "VGG-19"]
    assert in_order(lambda total: total.multiply_adds)[-2:] == ["VGG-16", "VGG-19"]
    assert in_order(lambda total: total.multiply_adds)[0] == "AlexNet"
    assert in_order(lambda total: total.multiply_adds / total.parameters)[0] == "AlexNet"
    assert in_order(lambda total: total.intensity)[0] == "AlexNet"


def test_the_table_of_printed_and_computed_figures():
    computed = {(what, value) for what, _, value, _ in costs.printed_and_computed()}
    assert ("AlexNet, operations", 724_406_816) in computed and ("LeNet-5, operations", 340_908) in computed
    text = costs.markdown()
    assert "| Inception with bottlenecks, operations | 358M | 271,351,808 |" in text
    assert "| GoogLeNet, operations | 1.43G | 1,582,671,872 |" in text
    assert all(f"| {name} |" in text for name in networks.NETWORKS)
    assert f"<!-- benchmark:lectures -->\n{text}\n<!-- /benchmark:lectures -->" in costs.PAGE.read_text()
