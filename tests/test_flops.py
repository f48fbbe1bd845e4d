"""torch.utils.flop_counter counts fastconv's convolutions as it counts torch's."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastconv

# stride, padding, dilation, groups, size of the weight; x is 2×4×9×8
CONVOLUTIONS = {
    "plain": (1, 0, 1, 1, (6, 4, 3, 2)),
    "padding": (1, (1, 2), 1, 1, (6, 4, 3, 2)),
    "stride": ((2, 1), 1, 1, 1, (6, 4, 3, 2)),
    "dilation": (1, 2, (1, 3), 1, (6, 4, 3, 2)),
    "groups": (2, 1, 1, 2, (6, 2, 3, 2)),
    "depthwise": (1, 1, 1, 4, (8, 1, 3, 3)),
}


def counts(step):
    """In all, and by what was called: each of fprop, dgrad and wgrad for fastconv."""
    with FlopCounterMode(display=False) as counter:
        step()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return counter.get_total_flops(), by_op


def inputs(weight_size):
    return [torch.randn(size, requires_grad=True) for size in ((2, 4, 9, 8), weight_size, weight_size[:1])]


def products(y, w):
    """Two FLOPs for each product of a forward pass."""
    return 2 * y.numel() * w[0].numel()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_forward(name):
    *config, weight_size = CONVOLUTIONS[name]
    tensors = inputs(weight_size)
    expected = products(F.conv2d(*tensors, *config), tensors[1])
    assert counts(lambda: fastconv.conv2d(*tensors, *config)) == (expected, {"fastconv.conv2d_fprop": expected})
    assert counts(lambda: F.conv2d(*tensors, *config))[0] == expected


@pytest.mark.parametrize("frozen", [None, "input", "weight"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_backward(name, frozen):
    *config, weight_size = CONVOLUTIONS[name]
    tensors = inputs(weight_size)
    if frozen:
        tensors[("input", "weight").index(frozen)].requires_grad_(False)
    total, by_op = counts(lambda: fastconv.conv2d(*tensors, *config).sum().backward())
    assert total == counts(lambda: F.conv2d(*tensors, *config).sum().backward())[0]
    assert ("fastconv.conv2d_dgrad" in by_op) == (frozen != "input")
    assert ("fastconv.conv2d_wgrad" in by_op) == (frozen != "weight")
    if frozen != "input":
        assert by_op["fastconv.conv2d_dgrad"] == by_op["fastconv.conv2d_fprop"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_double_backward(name):
    """Nine convolutions, three in each direction; torch's backward passes count otherwise where they are grouped."""
    *config, groups, weight_size = CONVOLUTIONS[name]
    tensors = inputs(weight_size)

    def step(conv2d):
        grads = torch.autograd.grad(conv2d(*tensors, *config, groups).square().sum(), tensors[:2], create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()

    total, by_op = counts(lambda: step(fastconv.conv2d))
    once = products(F.conv2d(*tensors, *config, groups), tensors[1])
    assert by_op["fastconv.conv2d_fprop"] == by_op["fastconv.conv2d_dgrad"] == 3 * once
    assert by_op["fastconv.conv2d_wgrad"] == 3 * once * groups
    if groups == 1:
        assert total == counts(lambda: step(F.conv2d))[0] == 9 * once


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_a_converted_network_counts_as_before(layout):
    model = nn.Sequential(*list(networks.ResNet(18))[:6])
    x = torch.randn(2, 3, 33, 30).contiguous(memory_format=layout)

    def step():
        model(x).square().sum().backward()

    expected, _ = counts(step)
    fastconv.convert(model)
    total, by_op = counts(step)
    assert total == expected > 0 and "aten.convolution" not in by_op
    assert counts(lambda: fastconv.revert(model)(x))[0] == counts(lambda: fastconv.convert(model)(x))[0] > 0


def test_meta_tensors_are_counted():
    with torch.device("meta"):
        model, x = fastconv.convert(networks.ResNet(18)), torch.empty(1, 3, 224, 224)
        assert counts(lambda: model(x))[0] == counts(lambda: fastconv.revert(model)(x))[0] == 2 * 1_814_073_344
