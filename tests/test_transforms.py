"""Forward-mode AD and torch.func: every transform against a loop, finite differences or torch's own operators."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastconv

CONFIG = (2, 1), (1, 2), (1, 2)  # stride, padding, dilation
WINDOW = (3, 2), (2, 1), (1, 0), 1, True


def random(*size):
    return torch.randn(size, dtype=torch.float64)


def distinct(*size):
    return (torch.randperm(torch.Size(size).numel()) / 10).double().reshape(size)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def loop(function, in_dims, batch, *args):
    """What vmap should give: one call for each index of the mapped dimension."""
    results = [
        function(*(a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(batch)
    ]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True)))
    return torch.stack(results)


def mapped(size, dim, batch=3):
    """A tensor of this size with another dimension at `dim`, unless that is None."""
    size = list(size)
    if dim is not None:
        size.insert(dim, batch)
    return random(*size)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("in_dims", [d for d in itertools.product((None, 0, 2), (None, 0, 1), (None, 0)) if any(
    x is not None for x in d)], ids=str)  # fmt: skip
def test_vmap_of_conv2d_and_its_gradients(in_dims, groups):
    sizes = ((2, 4, 6, 7), (6, 4 // groups, 3, 2), (6,))
    args = [mapped(size, dim) for size, dim in zip(sizes, in_dims, strict=True)]

    def conv2d(x, w, b):
        return fastconv.conv2d(x, w, b, *CONFIG, groups)

    def gradients(x, w, b):
        return grad(lambda *t: conv2d(*t).square().sum(), argnums=(0, 1, 2))(x, w, b)

    assert_close(vmap(conv2d, in_dims)(*args), loop(conv2d, in_dims, 3, *args))
    assert_close(vmap(gradients, in_dims)(*args), loop(gradients, in_dims, 3, *args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_vmap_of_max_pool2d_and_its_gradient(layout):
    x = torch.stack([distinct(2, 3, 7, 8).contiguous(memory_format=layout) for _ in range(3)])

    def pool(x):
        return fastconv.max_pool2d(x, *WINDOW, return_indices=True)

    def gradient(x):
        return grad(lambda x: pool(x)[0].square().sum())(x)

    assert_close(vmap(pool)(x), loop(pool, (0,), 3, x))
    assert_close(vmap(gradient)(x), loop(gradient, (0,), 3, x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["avg_pool2d", "adaptive_avg_pool2d"])
def test_vmap_of_avg_pool2d_and_its_gradient(name, layout):
    pool = functions()[name][0]
    x = torch.stack([random(2, 3, 7, 8).contiguous(memory_format=layout) for _ in range(3)])

    def gradient(x):
        return grad(lambda x: pool(x).square().sum())(x)

    assert_close(vmap(pool)(x), loop(pool, (0,), 3, x))
    assert_close(vmap(gradient)(x), loop(gradient, (0,), 3, x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (2, 1, 0), (None, 0, 0)], ids=str)
def test_vmap_of_batch_norm_and_its_gradients(in_dims, training):
    args = [mapped(size, dim) for size, dim in zip(((4, 5, 3, 2), (5,), (5,)), in_dims, strict=True)]
    statistics = (None, None) if training else (random(5), random(5).square() + 0.1)

    def batch_norm(x, w, b):
        return fastconv.batch_norm(x, *statistics, w, b, training)

    def gradients(x, w, b):
        return grad(lambda *t: batch_norm(*t).square().sum(), argnums=(0, 1, 2))(x, w, b)

    assert_close(vmap(batch_norm, in_dims)(*args), loop(batch_norm, in_dims, 3, *args))
    assert_close(vmap(gradients, in_dims)(*args), loop(gradients, in_dims, 3, *args))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (2, 1, None, None), (None, 0, 0, 1), (1, 0, 1, None)], ids=str)
def test_vmap_of_activated_batch_norm_and_its_gradients(in_dims, training):
    sizes = ((4, 5, 3, 2), (5,), (5,), (4, 5, 3, 2))
    args = [mapped(size, dim) for size, dim in zip(sizes, in_dims, strict=True)]
    statistics = (None, None) if training else (random(5), random(5).square() + 0.1)
    for count in (3, 4):  # without the residual and with it

        def batch_norm(x, w, b, residual=None):
            return fastconv.batch_norm(x, *statistics, w, b, training, activation="relu", residual=residual)

        def gradients(*args, count=count):
            return grad(lambda *t: batch_norm(*t).square().sum(), argnums=tuple(range(count)))(*args)

        dims, tensors = in_dims[:count], args[:count]
        assert_close(vmap(batch_norm, dims)(*tensors), loop(batch_norm, dims, 3, *tensors))
        assert_close(vmap(gradients, dims)(*tensors), loop(gradients, dims, 3, *tensors))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, None, 0), (1, 0, None), (None, None, 0), (0, 0, 0)], ids=str)
def test_vmap_of_conv2d_with_relu(in_dims):
    args = [mapped(size, dim) for size, dim in zip(((2, 4, 6, 7), (6, 2, 3, 2), (6,)), in_dims, strict=True)]

    def conv2d(x, w, b):
        return fastconv.conv2d(x, w, b, *CONFIG, 2, activation="relu")

    assert_close(vmap(conv2d, in_dims)(*args), loop(conv2d, in_dims, 3, *args))


def test_vmap_updates_mapped_running_statistics_and_refuses_others():
    x, mean, var = random(3, 4, 5, 2, 2), random(3, 5), random(3, 5).square()
    expected_mean, expected_var = mean.clone(), var.clone()
    vmap(lambda x, m, v: fastconv.batch_norm(x, m, v, training=True))(x, mean, var)
    for i in range(3):
        F.batch_norm(x[i], expected_mean[i], expected_var[i], training=True)
    assert_close((mean, var), (expected_mean, expected_var))
    with pytest.raises(RuntimeError, match="running statistics that are not mapped"):
        vmap(lambda x: fastconv.batch_norm(x, mean[0], var[0], training=True))(x)


def functions():
    """Name: a function and its differentiable inputs."""
    mean, var = random(4), random(4).square() + 0.1
    return {
        "conv2d": (lambda *t: fastconv.conv2d(*t, *CONFIG, 2), (random(2, 4, 5, 4), random(6, 2, 2, 2), random(6))),
        "conv1d": (lambda *t: fastconv.conv1d(*t, 2, 1, 2, 2), (random(2, 4, 9), random(6, 2, 3), random(6))),
        "max_pool2d": (lambda x: fastconv.max_pool2d(x, *WINDOW), (distinct(2, 2, 5, 6),)),
        "avg_pool2d": (
            lambda x: fastconv.avg_pool2d(x, (3, 2), (2, 1), (1, 0), True, False),
            (random(2, 2, 5, 6),),
        ),
        "adaptive_avg_pool2d": (lambda x: fastconv.adaptive_avg_pool2d(x, (3, 4)), (random(2, 2, 5, 6),)),
        "batch_norm, training": (
            lambda *t: fastconv.batch_norm(t[0], None, None, *t[1:], training=True),
            (random(3, 4, 2, 3), random(4), random(4)),
        ),
        "batch_norm, evaluation": (
            lambda *t: fastconv.batch_norm(t[0], mean, var, *t[1:]),
            (random(3, 4, 2, 3), random(4), random(4)),
        ),
        "conv2d, ReLU": (
            lambda *t: fastconv.conv2d(*t, *CONFIG, 2, activation="relu"),
            (random(2, 4, 5, 4), random(6, 2, 2, 2), random(6)),
        ),
        "batch_norm, training, ReLU": (
            lambda *t: fastconv.batch_norm(t[0], None, None, *t[1:], training=True, activation="relu"),
            (random(3, 4, 2, 3), random(4), random(4)),
        ),
        "batch_norm, evaluation, add, ReLU": (
            lambda *t: fastconv.batch_norm(t[0], mean, var, *t[1:3], activation="relu", residual=t[3]),
            (random(3, 4, 2, 3), random(4), random(4), random(3, 4, 2, 3)),
        ),
        "training, add, ReLU": (
            lambda *t: fastconv.batch_norm(t[0], None, None, *t[1:3], True, activation="relu", residual=t[3]),
            (random(3, 4, 2, 3), random(4), random(4), random(3, 4, 2, 3)),
        ),
    }


POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
ACTIVATED = ("conv2d, ReLU", "batch_norm, training, ReLU", "batch_norm, evaluation, add, ReLU", "training, add, ReLU")
FUNCTIONS = ("conv2d", "conv1d", *POOLS, "batch_norm, training", "batch_norm, evaluation", *ACTIVATED)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_and_batched_gradients(name):
    function, inputs = functions()[name]
    for tensor in inputs:
        tensor.requires_grad_()
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_of_each_input_alone(name):
    function, inputs = functions()[name]
    for i in range(len(inputs)):

        def alone(tensor, i=i):
            return function(*inputs[:i], tensor, *inputs[i + 1 :])

        assert gradcheck(alone, (inputs[i].clone().requires_grad_(),), check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_and_hessians_agree_in_every_mode(name):
    function, (x, *rest) = functions()[name]
    x = x[:2, :2] if name in POOLS else x

    def scalar(x):
        return function(x, *rest).sin().sum()

    assert_close(jacfwd(lambda x: function(x, *rest))(x), jacrev(lambda x: function(x, *rest))(x))
    assert_close(hessian(scalar)(x), jacrev(jacrev(scalar))(x))


def test_jvp_of_the_gradient_is_the_hessian_vector_product():
    x, w, v = random(2, 3, 5, 4), random(4, 3, 2, 3), random(4, 3, 2, 3)

    def ours(w):
        return fastconv.conv2d(x, w).sin().sum()

    def theirs(w):
        return F.conv2d(x, w).sin().sum()

    assert_close(jvp(grad(ours), (w,), (v,)), jvp(grad(theirs), (w,), (v,)))


def test_per_sample_gradients_of_a_network():
    model = torch.nn.Sequential(fastconv.Conv2d(2, 4, 3), torch.nn.ReLU(), fastconv.MaxPool2d(2)).double()
    parameters, x = dict(model.named_parameters()), random(5, 2, 8, 7)

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        gradients = torch.autograd.grad(loss(parameters, x[i]), parameters.values())
        for name, gradient in zip(parameters, gradients, strict=True):
            assert_close(per_sample[name][i], gradient)
