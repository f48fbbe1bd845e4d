"""What torch refuses, fastconv refuses with the same exception and the same text."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv


def image(*size, dtype=torch.float32):
    return torch.zeros(size or (2, 4, 8, 7), dtype=dtype)


def filters(*size, dtype=torch.float32):
    return torch.zeros(size or (6, 4, 3, 3), dtype=dtype)


CONV2D = {
    "channels": lambda lib: lib.conv2d(image(), filters(6, 3, 3, 3)),
    "channels, unbatched": lambda lib: lib.conv2d(image(4, 8, 8), filters(6, 3, 3, 3)),
    "channels with groups": lambda lib: lib.conv2d(image(), filters(6, 4, 3, 3), groups=2),
    "filters not divisible by groups": lambda lib: lib.conv2d(image(), filters(5, 2, 3, 3), groups=2),
    "fewer filters than groups": lambda lib: lib.conv2d(image(), filters(1, 2, 3, 3), groups=2),
    "no filters": lambda lib: lib.conv2d(image(), filters(0, 4, 3, 3)),
    "groups 0": lambda lib: lib.conv2d(image(), filters(), groups=0),
    "groups -1": lambda lib: lib.conv2d(image(), filters(), groups=-1),
    "2D input": lambda lib: lib.conv2d(image(4, 8), filters()),
    "5D input": lambda lib: lib.conv2d(image(1, 2, 4, 8, 8), filters()),
    "0D input": lambda lib: lib.conv2d(torch.zeros(()), filters()),
    "bias of the wrong length": lambda lib: lib.conv2d(image(), filters(), image(5)),
    "2D bias": lambda lib: lib.conv2d(image(), filters(), image(6, 1)),
    "stride 0": lambda lib: lib.conv2d(image(), filters(), stride=0),
    "stride -1": lambda lib: lib.conv2d(image(), filters(), stride=(1, -1)),
    "padding -1": lambda lib: lib.conv2d(image(), filters(), padding=(0, -1)),
    "dilation 0": lambda lib: lib.conv2d(image(), filters(), dilation=(0, 1)),
    "dilation -1": lambda lib: lib.conv2d(image(), filters(), dilation=-1),
    "three strides": lambda lib: lib.conv2d(image(), filters(), stride=(1, 1, 1)),
    "three paddings": lambda lib: lib.conv2d(image(), filters(), padding=(1, 1, 1)),
    "three dilations": lambda lib: lib.conv2d(image(), filters(), dilation=(1, 1, 1)),
    "kernel larger than the image": lambda lib: lib.conv2d(image(1, 4, 2, 5), filters()),
    "dilated kernel larger than the image": lambda lib: lib.conv2d(image(), filters(), dilation=(2, 4), padding=(0, 0)),
    "no rows": lambda lib: lib.conv2d(image(2, 4, 0, 5), filters(), padding=2),
    "other dtype of the weight": lambda lib: lib.conv2d(image(), filters(dtype=torch.float64)),
    # Of a bfloat16 input torch speaks in two ways, with and without oneDNN.
    "other dtype of the input": lambda lib: lib.conv2d(image(dtype=torch.float64), filters()),
    "integer weight": lambda lib: lib.conv2d(image(), filters(dtype=torch.int32)),
    "other dtype of the bias": lambda lib: lib.conv2d(image(), filters(), image(6, dtype=torch.float64)),
    "padding 'same' with three dilations": lambda lib: lib.conv2d(
        image(), filters(), padding="same", dilation=(1, 1, 1)
    ),
    "3D weight": lambda lib: lib.conv2d(image(), filters(6, 4, 3), stride=(1,), padding=(1, 0)),
    "padding 'same' with a stride": lambda lib: lib.conv2d(image(), filters(), stride=2, padding="same"),
    "padding 'full'": lambda lib: lib.conv2d(image(), filters(), padding="full"),
}


def sequence(*size, dtype=torch.float32):
    return torch.zeros(size or (2, 4, 8), dtype=dtype)


CONV1D = {
    "channels": lambda lib: lib.conv1d(sequence(), filters(6, 3, 3)),
    "channels, unbatched": lambda lib: lib.conv1d(sequence(4, 8), filters(6, 3, 3)),
    "channels with groups": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), groups=2),
    "channels with padding by name": lambda lib: lib.conv1d(sequence(), filters(6, 3, 3), padding="same"),
    "filters not divisible by groups": lambda lib: lib.conv1d(sequence(), filters(5, 2, 3), groups=2),
    "no filters": lambda lib: lib.conv1d(sequence(), filters(0, 4, 3)),
    "groups 0": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), groups=0),
    "0D input": lambda lib: lib.conv1d(torch.zeros(()), filters(6, 4, 3)),
    "1D input": lambda lib: lib.conv1d(sequence(8), filters(6, 4, 3)),
    "4D input": lambda lib: lib.conv1d(sequence(1, 2, 4, 8), filters(6, 4, 3)),
    "2D weight": lambda lib: lib.conv1d(sequence(), filters(6, 4)),
    "4D weight": lambda lib: lib.conv1d(sequence(), filters()),
    "bias of the wrong length": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), image(5)),
    "2D bias": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), image(6, 1)),
    "stride 0": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), stride=0),
    "stride -1": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), stride=(-1,)),
    "padding -1": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), padding=-1),
    "dilation 0": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), dilation=0),
    "dilation -1": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), dilation=-1),
    "two strides": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), stride=(1, 1)),
    "no stride": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), stride=()),
    "two paddings": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), padding=(1, 1)),
    "two dilations": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), dilation=(1, 1)),
    "kernel larger than the sequence": lambda lib: lib.conv1d(sequence(1, 4, 2), filters(6, 4, 3)),
    "no elements": lambda lib: lib.conv1d(sequence(2, 4, 0), filters(6, 4, 3), padding=2),
    "other dtype of the weight": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3, dtype=torch.float64)),
    "other dtype of the bias": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), image(6, dtype=torch.float64)),
    "padding 'same' with a stride": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), stride=2, padding="same"),
    "padding 'full'": lambda lib: lib.conv1d(sequence(), filters(6, 4, 3), padding="full"),
}

MAX_POOL2D = {
    "2D input": lambda lib: lib.max_pool2d(image(4, 8), 2),
    "5D input": lambda lib: lib.max_pool2d(image(1, 2, 4, 8, 8), 2),
    "no channels": lambda lib: lib.max_pool2d(image(2, 0, 8, 8), 2),
    "no rows, unbatched": lambda lib: lib.max_pool2d(image(4, 0, 8), 2),
    "no rows": lambda lib: lib.max_pool2d(image(2, 4, 0, 8), 2),
    "kernel 0": lambda lib: lib.max_pool2d(image(), 0, 1),
    "kernel -1": lambda lib: lib.max_pool2d(image(), (2, -1), 1),
    "three kernel sizes": lambda lib: lib.max_pool2d(image(), (2, 2, 2)),
    "stride 0": lambda lib: lib.max_pool2d(image(), 2, 0),
    "stride -1": lambda lib: lib.max_pool2d(image(), 2, (1, -1)),
    "three strides": lambda lib: lib.max_pool2d(image(), 2, (1, 1, 1)),
    "padding -1": lambda lib: lib.max_pool2d(image(), 2, 2, (0, -1)),
    "padding over half the kernel": lambda lib: lib.max_pool2d(image(), 3, 2, 2),
    "padding over half the kernel's width": lambda lib: lib.max_pool2d(image(), (5, 3), 2, (2, 2)),
    "padding over half the kernel, dilated": lambda lib: lib.max_pool2d(image(), 3, 2, (2, 0), 2),
    "three paddings": lambda lib: lib.max_pool2d(image(), 2, 2, (0, 0, 0)),
    "dilation 0": lambda lib: lib.max_pool2d(image(), 2, 2, 0, 0),
    "three dilations": lambda lib: lib.max_pool2d(image(), 2, 2, 0, (1, 1, 1)),
    "window larger than the image": lambda lib: lib.max_pool2d(image(), 9),
    "dilated window larger than the image": lambda lib: lib.max_pool2d(image(), 3, dilation=(4, 1)),
}

AVG_POOL2D = {
    "0D input": lambda lib: lib.avg_pool2d(torch.zeros(()), 2),
    "2D input": lambda lib: lib.avg_pool2d(image(4, 8), 2),
    "5D input": lambda lib: lib.avg_pool2d(image(1, 2, 4, 8, 8), 2),
    "no channels": lambda lib: lib.avg_pool2d(image(2, 0, 8, 8), 2),
    "no rows": lambda lib: lib.avg_pool2d(image(2, 4, 0, 8), 2),
    "no channels, unbatched": lambda lib: lib.avg_pool2d(image(0, 8, 8), 2),
    "kernel 0": lambda lib: lib.avg_pool2d(image(), 0, 1),
    "kernel 0 without a stride": lambda lib: lib.avg_pool2d(image(), 0),
    "kernel -1": lambda lib: lib.avg_pool2d(image(), (2, -1), 1),
    "no kernel size": lambda lib: lib.avg_pool2d(image(), []),
    "three kernel sizes": lambda lib: lib.avg_pool2d(image(), (2, 2, 2)),
    "stride 0": lambda lib: lib.avg_pool2d(image(), 2, 0),
    "stride -1": lambda lib: lib.avg_pool2d(image(), 2, (1, -1)),
    "three strides": lambda lib: lib.avg_pool2d(image(), 2, (1, 1, 1)),
    "padding -1": lambda lib: lib.avg_pool2d(image(), 2, 2, (0, -1)),
    "padding over half the kernel": lambda lib: lib.avg_pool2d(image(), 3, 2, 2),
    "padding over half the kernel's width": lambda lib: lib.avg_pool2d(image(), (5, 3), 2, (2, 2)),
    "three paddings": lambda lib: lib.avg_pool2d(image(), 2, 2, (0, 0, 0)),
    "divisor 0": lambda lib: lib.avg_pool2d(image(), 2, divisor_override=0),
    "window larger than the image": lambda lib: lib.avg_pool2d(image(), 9),
    "adaptive: 0D input": lambda lib: lib.adaptive_avg_pool2d(torch.zeros(()), 1),
    "adaptive: 2D input": lambda lib: lib.adaptive_avg_pool2d(image(4, 8), 2),
    "adaptive: 2D input for a pair": lambda lib: lib.adaptive_avg_pool2d(image(4, 8), (None, 2)),
    "adaptive: 5D input": lambda lib: lib.adaptive_avg_pool2d(image(1, 2, 4, 8, 8), 2),
    "adaptive: no rows": lambda lib: lib.adaptive_avg_pool2d(image(2, 4, 0, 8), 2),
    "adaptive: no columns, unbatched": lambda lib: lib.adaptive_avg_pool2d(image(4, 8, 0), (None, 1)),
    "adaptive: size -1": lambda lib: lib.adaptive_avg_pool2d(image(), (-1, 2)),
    "adaptive: three sizes": lambda lib: lib.adaptive_avg_pool2d(image(), (2, 2, 2)),
    "adaptive: one size": lambda lib: lib.adaptive_avg_pool2d(image(), (2,)),
    "adaptive: no size": lambda lib: lib.adaptive_avg_pool2d(image(), None),
    "adaptive: a fraction": lambda lib: lib.adaptive_avg_pool2d(image(), 2.5),
}

ONES = torch.ones(4)
BATCH_NORM = {
    "one value a channel": lambda lib: lib.batch_norm(image(1, 4, 1, 1), ONES, ONES, training=True),
    "one value a channel, 2D": lambda lib: lib.batch_norm(image(1, 4), ONES, ONES, training=True),
    "1D input": lambda lib: lib.batch_norm(image(4), ONES, ONES, training=True),
    "0D input": lambda lib: lib.batch_norm(torch.zeros(()), ONES, ONES),
    "running_mean of the wrong length": lambda lib: lib.batch_norm(image(), torch.ones(3), ONES),
    "running_var of the wrong length": lambda lib: lib.batch_norm(image(), ONES, torch.ones(5), training=True),
    "weight of the wrong length": lambda lib: lib.batch_norm(image(), ONES, ONES, torch.ones(3), training=True),
    "bias of the wrong length": lambda lib: lib.batch_norm(image(), ONES, ONES, ONES, torch.ones(7)),
    "evaluation without statistics": lambda lib: lib.batch_norm(image(), None, None),
    "evaluation without running_var": lambda lib: lib.batch_norm(image(), ONES, None),
    "training with running_mean alone": lambda lib: lib.batch_norm(image(), ONES, None, training=True),
    "training with running_var alone": lambda lib: lib.batch_norm(image(), None, ONES, training=True),
    "eps 0 in training": lambda lib: lib.batch_norm(image(), ONES, ONES, training=True, eps=0.0),
    "eps -1 in training": lambda lib: lib.batch_norm(image(), ONES, ONES, training=True, eps=-1.0),
    "eps -1 in evaluation": lambda lib: lib.batch_norm(image(), ONES, ONES, eps=-1.0),
    "other dtype of the weight": lambda lib: lib.batch_norm(image(), ONES, ONES, ONES.double(), ONES.double()),
    "float64 parameters for half input": lambda lib: lib.batch_norm(
        image(dtype=torch.float16), ONES.double(), ONES.double(), ONES.double(), ONES.double()
    ),
    "momentum None": lambda lib: lib.batch_norm(image(), ONES, ONES, momentum=None),
    "training None": lambda lib: lib.batch_norm(image(), ONES, ONES, training=None),
    "a number for running_var": lambda lib: lib.batch_norm(image(), ONES, 1.0),
    "running_mean that needs a gradient": lambda lib: lib.batch_norm(image(), ONES.clone().requires_grad_(), ONES),
    "float32 parameters for float64 input": lambda lib: lib.batch_norm(image(dtype=torch.float64), ONES, ONES),
}


def raised(call, lib):
    with pytest.raises(Exception) as info:
        call(lib)
    return type(info.value), str(info.value)


def check(call):
    # A statistics argument may be changed before an error is noticed, which the peer's call must not see.
    assert raised(call, fastconv) == raised(call, F)


@pytest.mark.parametrize("name", CONV2D)
def test_conv2d(name):
    check(CONV2D[name])


@pytest.mark.parametrize("name", CONV1D)
def test_conv1d(name):
    check(CONV1D[name])


@pytest.mark.parametrize("name", MAX_POOL2D)
def test_max_pool2d(name):
    check(MAX_POOL2D[name])


@pytest.mark.parametrize("name", AVG_POOL2D)
def test_avg_pool2d(name):
    check(AVG_POOL2D[name])


@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_norm(name):
    check(BATCH_NORM[name])


def test_layers():
    for ours, theirs, x in (
        (fastconv.BatchNorm2d(4), nn.BatchNorm2d(4), image(4, 8)),
        (fastconv.BatchNorm2d(4), nn.BatchNorm2d(4), image(1, 4, 1, 1)),
        (fastconv.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3), image(2, 5, 8, 8)),
        (fastconv.MaxPool2d(9), nn.MaxPool2d(9), image()),
        (fastconv.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3), image(2, 5, 8)),
        (fastconv.BatchNorm1d(4), nn.BatchNorm1d(4), image(2, 4, 8, 8)),
        (fastconv.BatchNorm1d(4), nn.BatchNorm1d(4), image(1, 4)),
        (fastconv.AvgPool2d(9), nn.AvgPool2d(9), image()),
        (fastconv.AdaptiveAvgPool2d((-1, 2)), nn.AdaptiveAvgPool2d((-1, 2)), image()),
        (fastconv.LazyConv2d(6, 3), nn.LazyConv2d(6, 3), image(4, 8)),
        (fastconv.LazyBatchNorm1d(), nn.LazyBatchNorm1d(), image()),
    ):
        assert raised(lambda lib, x=x: lib(x), ours) == raised(lambda lib, x=x: lib(x), theirs)


def test_unknown_algorithm_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown algo 'magic' for the CPU: expected one of direct, im2col"):
        fastconv.conv2d(image(), filters(), algo="magic")


def test_an_algorithm_that_cannot_do_the_problem_says_why():
    with pytest.raises(ValueError, match="depthwise"):
        fastconv.conv2d(image(), filters(), algo="depthwise")


def test_gradients_of_the_wrong_size_are_refused():
    x, w = image(), filters()
    config = ((1, 1), (0, 0), (1, 1), 1, False, False, None)
    with pytest.raises(RuntimeError, match=r"expected dy of size \[2, 6, 6, 5\], but got \[2, 6, 6, 6\]"):
        fastconv.autograd.conv2d_dgrad(image(2, 6, 6, 6), w, x.shape, *config)
    with pytest.raises(RuntimeError, match=r"expected dy of size \[2, 6, 6, 5\], but got \[2, 6, 5, 5\]"):
        fastconv.autograd.conv2d_wgrad(image(2, 6, 5, 5), x, w.shape, True, *config)
    window = ((), (), (), False, True, None, (3, 4), False)
    with pytest.raises(RuntimeError, match=r"expected dy of size \[2, 4, 3, 4\], but got \[2, 4, 4, 3\]"):
        fastconv.autograd.avg_pool2d_backward(image(2, 4, 4, 3), x.shape, *window)


def test_no_sizes_overflow_silently():
    w = filters(1, 1, 3, 3)
    with pytest.raises(RuntimeError, match="overflow"):
        fastconv.conv2d(image(1, 1, 9, 9), w, padding=2**62)
    with pytest.raises(RuntimeError, match="overflow"):
        fastconv.max_pool2d(image(1, 1, 9, 9), 3, dilation=2**62)
    with pytest.raises(RuntimeError, match="overflow"):
        fastconv.adaptive_avg_pool2d(image(1, 1, 9, 9), (1, 2**62))
