"""The networks of benchmarks/networks: as in their papers, and with fastconv's layers as with torch's."""

import copy
import os

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from references import without_onednn
from torch import nn

import fastconv

# Known counts: of the papers, and of the model collections that have the same network.
PARAMETERS = {
    "VGG-13": 133_047_848, "VGG-16": 138_357_544, "VGG-19": 143_667_240, "NIN": 966_986, "GoogLeNet": 6_998_552,
    "ResNet-18": 11_689_512, "ResNet-34": 21_797_672, "ResNet-50": 25_557_032, "ResNet-101": 44_549_160,
    "ResNet-152": 60_192_808, "WideResNet-50-2": 68_883_240, "ResNeXt-50": 25_028_904, "DenseNet-121": 7_978_856,
    "SqueezeNet 1.1": 1_235_496, "MobileNet": 4_231_976, "ShuffleNet v2": 2_278_604,
}  # fmt: skip

# Billions of multiply-adds, as papers and model collections give them.
OPERATIONS = {
    "AlexNet": 1.135, "VGG-13": 11.308, "VGG-16": 15.470, "VGG-19": 19.632, "GoogLeNet": 1.583, "ResNet-18": 1.814,
    "ResNet-34": 3.664, "ResNet-50": 4.089, "ResNet-101": 7.801, "ResNet-152": 11.514, "WideResNet-50-2": 11.398,
    "ResNeXt-50": 4.230, "DenseNet-121": 2.834, "SqueezeNet 1.1": 0.349, "MobileNet": 0.569, "ShuffleNet v2": 0.145,
}  # fmt: skip

# Arguments and an input that make a network small. What has fully connected layers for maps of one size keeps the image
# and gets narrow layers.
OTHERS = {"classes": 10}, (2, 3, 64, 64)
SMALL = {
    "LeNet-5": ({}, (4, 1, 28, 28)),
    "AlexNet": ({"classes": 10, "width": 32}, (1, 3, 227, 227)),
    "ZFNet": ({"classes": 10, "width": 32}, (1, 3, 224, 224)),
    **dict.fromkeys(("VGG-13", "VGG-16", "VGG-19"), ({"classes": 10, "size": 1, "width": 32}, (2, 3, 32, 32))),
    "NIN": ({}, (2, 3, 32, 32)),
    **{
        f"ResNet-{depth}": ({"classes": 10, "channels": 16, "width": 16}, OTHERS[1]) for depth in (18, 34, 50, 101, 152)
    },
    "WideResNet-50-2": ({"classes": 10, "channels": 16, "width": 32}, OTHERS[1]),
    "ResNeXt-50": ({"classes": 10, "channels": 16, "width": 2}, OTHERS[1]),
    "DenseNet-121": ({"classes": 10, "growth": 16}, OTHERS[1]),
    "FractalNet": ({}, (3, 3, 32, 32)),
}
MORE = {
    "VGG-16 with BatchNorm": (
        networks.VGG,
        {"classes": 10, "batch_norm": True, "size": 1, "width": 32},
        (3, 3, 32, 32),
    ),
    "AlexNet in two groups": (networks.AlexNet, {"classes": 10, "groups": 2, "width": 32}, (1, 3, 227, 227)),
    "LeNet-5 of 1998": (networks.LeNet1998, {}, (4, 1, 32, 32)),
}
CASES = {name: (network.build, *SMALL.get(name, OTHERS)) for name, network in NETWORKS.items()} | MORE


def on_meta(build, **arguments):
    with torch.device("meta"):
        return build(**arguments)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def gradients(model, loss):
    return dict(
        zip([n for n, _ in model.named_parameters()], torch.autograd.grad(loss, model.parameters()), strict=True)
    )


def assert_close(a, b, scale=None):
    """Within 1e-10 of the largest magnitude, in float64."""
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = b.abs().max() if scale is None else scale
    assert (a - b).abs().max() <= 1e-10 * scale


def seeded(model, x):
    """model(x) with the same dropout every time."""
    torch.manual_seed(1)
    return model(x)


# As in their papers


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert parameters(on_meta(NETWORKS[name].build)) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    network = NETWORKS[name]
    total = fastconv.cost(on_meta(network.build), network.size)
    assert round(total.multiply_adds / 1e9, 3) == OPERATIONS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes(name):
    network = NETWORKS[name]
    model = on_meta(network.build)
    classes = 10 if name in ("LeNet-5", "NIN") else 100 if name == "FractalNet" else 1000
    assert model(torch.empty(2, *network.size, device="meta")).shape == (2, classes)
    table = fastconv.coverage(fastconv.convert(model))
    assert {row.reason for row in table} == {"", "fastconv has no such layer"}


def test_parameters_of_variants():
    assert parameters(on_meta(networks.AlexNet)) == 62_378_344
    assert parameters(on_meta(networks.AlexNet, groups=2)) == 60_965_224
    assert parameters(on_meta(networks.ZFNet, filters=(384, 384, 256))) == 62_357_608
    assert parameters(on_meta(networks.VGG, depth=16, batch_norm=True)) == 138_365_992
    fixed_codes = 84 * 10
    assert parameters(on_meta(networks.LeNet1998)) - fixed_codes == 60_000


@pytest.mark.parametrize(("name", "depth"), [("VGG-13", 13), ("VGG-16", 16), ("VGG-19", 19), ("ResNet-18", 18),
                         ("ResNet-34", 34), ("ResNet-50", 50), ("ResNet-101", 101), ("ResNet-152", 152),
                         ("WideResNet-50-2", 50), ("ResNeXt-50", 50), ("DenseNet-121", 121)])  # fmt: skip
def test_depth(name, depth):
    model = on_meta(NETWORKS[name].build)
    shortcuts = sum(len(layers(block.shortcut, nn.Conv2d)) for block in layers(model, networks.residual.Residual))
    assert len(layers(model, (nn.Conv2d, nn.Linear))) - shortcuts == depth


def test_the_fractal_network_is_40_convolutions_deep_and_joins_by_means():
    def depth(fractal):
        return 1 if not fractal.halves else max(1, sum(depth(half) for half in fractal.halves))

    model = on_meta(networks.FractalNet)
    blocks = [layer for layer in model if isinstance(layer, networks.fractal.Fractal)]
    assert sum(map(depth, blocks)) == 40
    assert parameters(model) == pytest.approx(4.8e6, rel=0.01)  # the paper prints 4.8M
    block = networks.fractal.Fractal(3, 3, 3)
    x = torch.rand(1, 3, 4, 4)
    for conv in layers(block, nn.Conv2d):
        nn.init.dirac_(conv.weight)
    for batch_norm in layers(block, nn.BatchNorm2d):
        nn.init.constant_(batch_norm.weight, 0.5)
    block.eval()
    with torch.no_grad():
        unit = 0.5 / (1 + 1e-5) ** 0.5  # what a convolution that copies and its BatchNorm multiply by
        inner = x * (unit + unit**2) / 2  # the join inside: of the columns of one and two convolutions
        torch.testing.assert_close(block(x), (x * unit + inner * unit + inner * unit**2) / 3)


def test_googlenet_has_9_modules_57_convolutions_and_one_fully_connected_layer():
    model = on_meta(networks.GoogLeNet)
    assert [len(layers(model, kind)) for kind in (networks.Inception, nn.Conv2d, nn.Linear)] == [9, 57, 1]


def test_blocks_keep_what_they_should():
    x = torch.randn(2, 8, 6, 6)
    for block in (networks.residual.basic(8, 8, 1), networks.residual.bottleneck(8, 4, 8, 1, groups=2)):
        nn.init.zeros_(layers(block, nn.BatchNorm2d)[-1].weight)
        assert torch.equal(block(x), x.relu())
    assert torch.equal(networks.dense.Dense(8, 2)(x)[:, :8], x)
    assert torch.equal(networks.mobile.Shuffle(8, 8, 1)(x)[:, ::2], x[:, :4])
    assert torch.equal(networks.NaiveInception(8, 3, 4, 5)(x)[:, 12:], F.max_pool2d(x, 3, 1, 1))


# With fastconv's layers


@pytest.mark.parametrize("name", CASES)
def test_a_converted_network_gives_the_same_outputs_and_gradients(name):
    build, arguments, size = CASES[name]
    compare(build(**arguments).double().train(), torch.randn(size, dtype=torch.float64))


@pytest.mark.parametrize("name", NETWORKS)
def test_of_full_size(name, threads, full):
    if not full:
        pytest.skip("networks of full size: --full")
    threads(os.cpu_count())
    network = NETWORKS[name]
    compare(network.build().double().train(), torch.randn(2, *network.size, dtype=torch.float64))


def compare(model, x):
    """A training step's output, gradients and running statistics, and an evaluation, before and after convert()."""
    state = copy.deepcopy(model.state_dict())
    with without_onednn():
        expected = seeded(model, x)
        expected_grads = gradients(model, expected.square().mean())
    expected_state = copy.deepcopy(model.state_dict())

    model.load_state_dict(state)
    assert fastconv.convert(model) is model
    actual = seeded(model, x)
    assert_close(actual, expected)
    largest = max(g.abs().max() for g in expected_grads.values())
    for key, grad in gradients(model, actual.square().mean()).items():
        assert_close(grad, expected_grads[key], largest)
    statistics = [key for key in state if "running" in key]
    largest = max(
        (expected_state[key].abs().max() for key in statistics), default=0
    )  # a mean may be 0 but for rounding
    for key in statistics:
        assert_close(model.state_dict()[key], expected_state[key], largest)
    model.eval()
    with torch.no_grad():
        y = model(x)
        assert_close(y, fastconv.revert(model)(x))


@pytest.mark.parametrize("name", CASES)
def test_training_lowers_the_loss(name):
    build, arguments, size = CASES[name]
    model, x = fastconv.convert(build(**arguments)), torch.randn(size)
    targets = torch.arange(len(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(seeded(model, x), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", CASES)
def test_convert_and_revert_keep_everything_but_the_classes(name):
    build, arguments, _ = CASES[name]
    model = on_meta(build, **arguments)
    classes, before = [type(m) for m in model.modules()], repr(model)
    ids = [id(p) for p in model.parameters()]
    fastconv.convert(model)
    converted = [type(m) for m in model.modules()]
    names = ("Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "BatchNorm2d")
    swaps = {getattr(nn, name): getattr(fastconv, name) for name in names}
    assert converted == [swaps.get(c, c) for c in classes] and converted != classes
    assert [id(p) for p in model.parameters()] == ids and repr(model) == before
    fastconv.convert(model)
    assert [type(m) for m in model.modules()] == converted
    fastconv.revert(model)
    assert [type(m) for m in model.modules()] == classes
