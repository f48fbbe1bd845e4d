"""Every derivative, first and second, against finite differences in float64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastconv
from fastconv import autograd

# x, w, stride, padding, dilation, groups
CONVOLUTIONS = {
    "plain": ((2, 2, 4, 5), (3, 2, 2, 3), (1, 1), (0, 0), (1, 1), 1),
    "stride": ((1, 2, 6, 5), (2, 2, 3, 2), (2, 3), (0, 0), (1, 1), 1),
    "padding": ((1, 2, 3, 4), (2, 2, 2, 3), (1, 1), (2, 1), (1, 1), 1),
    "dilation": ((1, 2, 6, 5), (2, 2, 3, 2), (1, 1), (0, 1), (2, 3), 1),
    "groups": ((1, 4, 4, 3), (6, 2, 2, 2), (1, 2), (1, 0), (1, 1), 2),
    "depthwise": ((2, 3, 4, 5), (3, 1, 3, 2), (1, 2), (1, 1), (1, 1), 3),
    "1x1": ((2, 3, 3, 2), (4, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "never read": ((1, 2, 6, 7), (2, 2, 2, 3), (3, 5), (0, 0), (1, 1), 1),
    "all": ((1, 4, 6, 7), (4, 2, 2, 3), (2, 1), (1, 2), (2, 1), 2),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = {
    "2x2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((3, 2), (2, 1), (1, 1), (1, 1), False),
    "dilated, ceil": ((2, 3), (2, 2), (1, 1), (2, 1), True),
}

# kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, output_size
AVERAGES = {
    "2x2": ((2, 2), (2, 2), (0, 0), False, True, None, ()),
    "overlapping, padding not counted": ((3, 2), (2, 1), (1, 1), False, False, None, ()),
    "ceil, divisor": ((2, 3), (2, 2), (1, 1), True, True, -5, ()),
    "adaptive": ((), (), (), False, True, None, (3, 4)),
    "global": ((), (), (), False, True, None, (1, 1)),
}


def leaf(backend, size, layout="contiguous"):
    tensor = torch.randn(size, dtype=torch.float64)
    return backend.put(
        tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor
    ).requires_grad_()


def distinct(backend, size, layout):
    """Values at least 0.1 apart, so that finite differences do not change which one is the largest."""
    count = torch.Size(size).numel()
    values = (torch.randperm(count) / 10).double().reshape(size)
    return backend.put(values.contiguous(memory_format=LAYOUTS[layout])).requires_grad_()


def check(backend, function, inputs, second_order=True):
    # fast_mode: a random direction instead of every element
    assert gradcheck(function, inputs, fast_mode=backend.name == "emulated")
    if second_order:
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(backend, name, layout):
    x, w, *config = CONVOLUTIONS[name]
    inputs = leaf(backend, x, layout), leaf(backend, w, layout), leaf(backend, (w[0],))
    check(backend, lambda *inputs: fastconv.conv2d(*inputs, *config), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["all", "depthwise", "1x1"])
def test_conv2d_relu(backend, name, layout):
    x, w, *config = CONVOLUTIONS[name]
    inputs = leaf(backend, x, layout), leaf(backend, w, layout), leaf(backend, (w[0],))
    check(backend, lambda *inputs: fastconv.conv2d(*inputs, *config, activation="relu"), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["all", "never read"])
def test_conv2d_dgrad_and_wgrad_as_functions_of_their_own(backend, name, layout):
    x_size, w_size, *config = CONVOLUTIONS[name]
    config += [layout == "channels_last", False, None]
    x, w = leaf(backend, x_size, layout), leaf(backend, w_size, layout)
    dy = leaf(backend, fastconv.conv2d(x, w, None, *config[:4]).shape, layout)
    check(backend, lambda dy, w: autograd.conv2d_dgrad(dy, w, x_size, *config), (dy, w))
    check(backend, lambda dy, x: autograd.conv2d_wgrad(dy, x, w_size, True, *config), (dy, x))
    check(backend, lambda dy, x: autograd.conv2d_wgrad(dy, x, w_size, True, *config)[1], (dy, x))


def test_conv2d_by_algorithm(backend):
    for algo in backend.algorithms:
        x, w, *config = ((1, 2, 3, 4), (2, 2, 3, 3), 1, 1) if algo == "winograd" else CONVOLUTIONS["depthwise"]
        inputs = leaf(backend, x), leaf(backend, w), leaf(backend, (w[0],))
        if algo != "mma":  # has no float64
            check(
                backend,
                lambda *inputs, config=config, algo=algo: fastconv.conv2d(*inputs, *config, algo=algo),
                inputs,
                algo == "direct",
            )


@pytest.mark.parametrize("config", [(1, 0, 1, 1), (2, 3, 2, 2), (1, "same", 3, 1)], ids=str)
def test_conv1d(backend, config):
    inputs = leaf(backend, (2, 4, 9)), leaf(backend, (6, 4 // config[3], 2)), leaf(backend, (6,))
    check(backend, lambda *inputs: fastconv.conv1d(*inputs, *config), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WINDOWS)
def test_max_pool2d(backend, name, layout):
    check(backend, lambda x: fastconv.max_pool2d(x, *WINDOWS[name]), (distinct(backend, (2, 2, 5, 6), layout),))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WINDOWS)
def test_max_pool2d_backward_and_gather(backend, name, layout):
    window = (*WINDOWS[name], layout == "channels_last")
    x = distinct(backend, (1, 2, 5, 6), layout)
    y, offsets = autograd.max_pool2d(x, *window, return_offsets=True)
    dy = leaf(backend, y.shape, layout)
    check(backend, lambda dy: autograd.max_pool2d_backward(dy, offsets, x.shape, *window), (dy,))
    check(backend, lambda x: autograd.max_pool2d_gather(x, offsets, *window), (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", AVERAGES)
def test_avg_pool2d_and_its_backward(backend, name, layout):
    window = (*AVERAGES[name], layout == "channels_last")
    x = leaf(backend, (2, 2, 5, 6), layout)
    check(backend, lambda x: autograd.avg_pool2d(x, *window), (x,))
    dy = leaf(backend, autograd.avg_pool2d(x, *window).shape, layout)
    check(backend, lambda dy: autograd.avg_pool2d_backward(dy, x.shape, *window), (dy,))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 2, 2, 3), (5, 3)], ids=str)
def test_batch_norm(backend, size, layout, training):
    mean, var = (backend.put(torch.rand(size[1], dtype=torch.float64)) for _ in range(2))
    inputs = leaf(backend, size, layout), leaf(backend, (size[1],)), leaf(backend, (size[1],))

    def batch_norm(x, weight, bias):
        return fastconv.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    check(backend, batch_norm, inputs)
    check(backend, lambda x: batch_norm(x, None, None), inputs[:1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 2, 2, 3), (5, 3)], ids=str)
def test_batch_norm_activation(backend, size, layout, training):
    mean, var = (backend.put(torch.rand(size[1], dtype=torch.float64)) for _ in range(2))
    inputs = leaf(backend, size, layout), leaf(backend, (size[1],)), leaf(backend, (size[1],))

    def batch_norm(x, weight, bias, residual=None):
        statistics = mean.clone(), var.clone()
        return fastconv.batch_norm(x, *statistics, weight, bias, training, activation="relu", residual=residual)

    check(backend, batch_norm, inputs)
    check(backend, batch_norm, (*inputs, leaf(backend, size, layout)))
    check(backend, lambda x, residual: batch_norm(x, None, None, residual), (inputs[0], leaf(backend, size, layout)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_activations_are_the_same_with_create_graph(backend, layout, training):
    """Which goes another way, and would agree with finite differences of itself."""
    x, residual, weight = leaf(backend, (3, 4, 5, 2), layout), leaf(backend, (3, 4, 5, 2), layout), leaf(backend, (4,))
    mean, var, dy = (backend.put(torch.rand(size, dtype=torch.float64)) for size in ((4,), (4,), (3, 4, 5, 2)))
    for inputs in ((x, weight), (x, weight, residual)):
        y = fastconv.batch_norm(
            x, mean, var, weight, None, training, activation="relu", residual=inputs[2] if len(inputs) == 3 else None
        )
        expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for a, b in zip(torch.autograd.grad(y, inputs, dy, create_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ops_called_directly_keep_their_gradients(backend):
    ops = torch.ops.fastconv_emulated if backend.name == "emulated" else torch.ops.fastconv
    x_size, w_size, *config = CONVOLUTIONS["all"]
    x, w, b = leaf(backend, x_size), leaf(backend, w_size), leaf(backend, (w_size[0],))
    assert gradcheck(lambda *t: ops.conv2d_fprop(*t, *config, False, False, None), (x, w, b), fast_mode=True)
    assert gradcheck(lambda *t: ops.conv2d_fprop(*t, *config, False, False, None, True), (x, w, b), fast_mode=True)
    pooled = distinct(backend, (1, 2, 5, 6), "contiguous")
    window = (*WINDOWS["overlapping"], False)
    assert gradcheck(lambda x: ops.max_pool2d_forward(x, *window, True)[0], (pooled,), fast_mode=True)
    for average in AVERAGES.values():
        assert gradcheck(lambda x, a=average: ops.avg_pool2d_forward(x, *a, False), (pooled,), fast_mode=True)
    mean, var = (backend.put(torch.rand(4, dtype=torch.float64)) for _ in range(2))
    weight, bias = leaf(backend, (4,)), leaf(backend, (4,))
    assert gradcheck(
        lambda x, w, b: ops.batch_norm_eval(x, w, b, mean, var, 1e-5, False), (x, weight, bias), fast_mode=True
    )
    for residual in (None, leaf(backend, x_size)):
        assert gradcheck(
            lambda x, w, b, r=residual: ops.batch_norm_act_eval(x, w, b, mean, var, r, 1e-5, False),
            (x, weight, bias),
            fast_mode=True,
        )
    residual = leaf(backend, x_size)
    assert gradcheck(
        lambda r: ops.batch_norm_act_eval(x.detach(), weight, bias, mean, var, r, 1e-5, False),
        (residual,),
        fast_mode=True,
    )


def test_ops_called_directly_raise_where_they_have_no_derivative(backend):
    ops = torch.ops.fastconv_emulated if backend.name == "emulated" else torch.ops.fastconv
    x_size, w_size, *config = CONVOLUTIONS["all"]
    config += [False, False, None]
    x, w = leaf(backend, x_size), leaf(backend, w_size)
    dy = fastconv.conv2d(x.detach(), w.detach(), None, *config[:4]).requires_grad_()
    window = (*WINDOWS["2x2"], False)
    with torch.no_grad():
        y, offsets = ops.max_pool2d_forward(x, *window, True)
    for call in (
        lambda: ops.conv2d_dgrad(dy, w, x_size, *config),
        lambda: ops.conv2d_wgrad(dy, x, w_size, True, *config)[0],
        lambda: ops.max_pool2d_backward(y.requires_grad_(), offsets, x_size, *window),
        lambda: ops.avg_pool2d_backward(y.requires_grad_(), x_size, *AVERAGES["2x2"], False),
        lambda: ops.batch_norm_train(x, None, None, None, None, 0.1, 1e-5, False)[0],
        lambda: ops.batch_norm_act_train(x, None, None, None, None, None, 0.1, 1e-5, False)[0],
        lambda: ops.batch_norm_act_train(x.detach(), None, None, None, None, x, 0.1, 1e-5, False)[0],
    ):
        with pytest.raises(NotImplementedError, match="differentiable"):
            call().sum().backward()
    with pytest.raises(RuntimeError, match="needs return_offsets=True"):
        ops.max_pool2d_forward(x, *window, False)[0].sum().backward()
