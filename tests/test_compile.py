"""torch.compile, fake tensors and the registration of the ops."""

import pytest
import torch
from layouts import lay_out
from torch._subclasses import FakeTensorMode

import fastconv

CONFIG = ([2, 1], [1, 0], [1, 2], 2)
WINDOW = ([3, 2], [2, 1], [1, 0], [1, 1], False)
AVERAGE = ([3, 2], [2, 1], [1, 0], True, False, None, [])
ADAPTIVE = ([], [], [], False, True, None, [4, 3])


def leaf(*size, layout=torch.contiguous_format):
    tensor = torch.randn(size)
    return (tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor).requires_grad_()


def op_arguments(nhwc):
    """Every op with arguments it takes."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x, w, b = (leaf(*s, layout=layout) for s in ((2, 4, 9, 8), (6, 2, 3, 2), (6,)))
    dy = torch.ops.fastconv.conv2d_fprop(x, w, b, *CONFIG, nhwc, False, None).detach()
    y, offsets = torch.ops.fastconv.max_pool2d_forward(x, *WINDOW, nhwc, True)
    mean, var = torch.zeros(4), torch.ones(4)
    x_size, w_size, xd, wd = list(x.shape), list(w.shape), x.detach(), w.detach()
    return {
        "conv2d_fprop": (x, w, b, *CONFIG, nhwc, False, None),
        "conv2d_dgrad": (dy, wd, x_size, *CONFIG, nhwc, False, None),
        "conv2d_wgrad": (dy, xd, w_size, True, *CONFIG, nhwc, False, None),
        "max_pool2d_forward": (x, *WINDOW, nhwc, True),
        "max_pool2d_backward": (y.detach(), offsets, x_size, *WINDOW, nhwc),
        "max_pool2d_indices": (offsets, x_size, *WINDOW, nhwc),
        "max_pool2d_gather": (xd, offsets, *WINDOW, nhwc),
        "avg_pool2d_forward": (x, *AVERAGE, nhwc),
        "avg_pool2d_backward": (torch.ops.fastconv.avg_pool2d_forward(xd, *ADAPTIVE, nhwc), x_size, *ADAPTIVE, nhwc),
        "batch_norm_train": (xd, mean.clone(), var.clone(), mean, var, 0.1, 1e-5, nhwc),
        "batch_norm_eval": (x, mean.clone(), var.clone(), mean, var, 1e-5, nhwc),
        "batch_norm_backward": (xd, xd, var.clone(), mean, var, True, nhwc),
        "batch_norm_act_train": (xd, mean.clone(), var.clone(), mean, var, None, 0.1, 1e-5, nhwc),
        "batch_norm_act_eval": (x, mean.clone(), var.clone(), mean, var, leaf(*x.shape, layout=layout), 1e-5, nhwc),
        "batch_norm_act_backward": (xd, xd, var.clone(), mean, var, None, xd, True, nhwc),
        "batch_norm_moments": (xd, nhwc),
        "batch_norm_backward_sums": (xd, xd, mean, var, nhwc),
        "batch_norm_backward_apply": (xd, xd, var.clone(), mean, var, torch.zeros(2, 4), nhwc),
    }


def test_every_op_is_checked():
    assert set(op_arguments(False)) == set(fastconv._ops.OPS)


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", fastconv._ops.OPS)
def test_opcheck(name, nhwc):
    torch.library.opcheck(getattr(torch.ops.fastconv, name).default, op_arguments(nhwc)[name])


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_opcheck_of_what_may_be_left_out(nhwc):
    ops, arguments = torch.ops.fastconv, op_arguments(nhwc)
    torch.library.opcheck(ops.conv2d_fprop.default, (*arguments["conv2d_fprop"], True))
    x, *rest = arguments["batch_norm_act_train"]
    torch.library.opcheck(ops.batch_norm_act_train.default, (x, *rest[:4], torch.randn_like(x), *rest[5:]))
    dy, x, weight, mean, var, *_ = arguments["batch_norm_act_backward"]
    affine = torch.randn(2, 4)
    torch.library.opcheck(ops.batch_norm_act_backward.default, (dy, x, weight, mean, var, affine, None, True, nhwc))


ODD_LAYOUTS = ("transposed", "outside in", "slices", "expanded", "overlapping")


def laid_out(arguments, layout):
    """The same arguments with their images and filters in another layout."""
    return [
        lay_out(a.detach(), layout) if isinstance(a, torch.Tensor) and a.dim() == 4 and a.is_floating_point() else a
        for a in arguments
    ]


@pytest.mark.parametrize("name", fastconv._ops.OPS)
def test_opcheck_of_transposed_tensors(name):
    arguments = laid_out(op_arguments(False)[name], "transposed")
    torch.library.opcheck(getattr(torch.ops.fastconv, name).default, tuple(arguments))


@pytest.mark.parametrize("layout", ("as it is", *ODD_LAYOUTS))
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", fastconv._ops.OPS)
def test_fake_kernels_give_the_strides_of_the_real_ones(name, nhwc, layout):
    op, arguments = getattr(torch.ops.fastconv, name), op_arguments(nhwc)[name]
    if layout != "as it is":
        arguments = laid_out(arguments, layout)
    with torch.no_grad():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, f in zip(*(t if isinstance(t, (tuple, list)) else (t,) for t in (real, fake)), strict=True):
        assert r.shape == f.shape and r.stride() == f.stride() and r.dtype is f.dtype


@pytest.mark.parametrize("w_layout", ("contiguous", "channels_last", "transposed"))
@pytest.mark.parametrize("x_layout", ("contiguous", "channels_last", *ODD_LAYOUTS))
def test_functions_of_fake_tensors_give_the_strides_of_real_ones(x_layout, w_layout):
    def results(x, w):
        y = fastconv.conv2d(x, w, padding=(1, 0))
        return (
            y,
            *fastconv.max_pool2d(x, (2, 3), 2, 1, return_indices=True),
            fastconv.batch_norm(x, None, None, training=True),
        )

    for size in ((2, 4, 9, 8), (2, 1, 5, 6), (3, 4, 1, 1), (1, 4, 5, 1), (4, 6, 7)):
        x = lay_out(torch.randn(size), x_layout)
        w = lay_out(torch.randn(3, size[-3], min(size[-2], 3), 1), w_layout)
        if x.shape[-1] == 1:  # too small for the pool
            x = x.expand(*x.shape[:-1], 4)
        real = results(x, w)
        with FakeTensorMode() as mode:
            fake = results(mode.from_tensor(x), mode.from_tensor(w))
        for r, f in zip(real, fake, strict=True):
            assert r.shape == f.shape and r.stride() == f.stride() and r.dtype is f.dtype


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pointwise, self.spatial = fastconv.Conv2d(3, 8, 1), fastconv.Conv2d(8, 6, 3, padding=(1, 2), stride=(2, 1))
        self.norm, self.pool = fastconv.BatchNorm2d(6), fastconv.MaxPool2d(3, 2, 1)

    def forward(self, x):
        x = fastconv.avg_pool2d(self.norm(self.spatial(self.pointwise(x).relu())).relu(), 2, 1)
        return fastconv.adaptive_avg_pool2d(self.pool(x), (None, 3))


def check_compiled(compile_backend, layout):
    torch._dynamo.reset()
    model, x = Network(), leaf(2, 3, 10, 9, layout=layout)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for network in (model, torch.compile(model, backend=compile_backend, fullgraph=True)):
        model.load_state_dict(state)
        model.zero_grad()
        x.grad = None
        y = network(x)
        y.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        results.append([y, *(g.clone() for g in gradients), *(b.clone() for b in model.buffers())])
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)  # what is between the ops, the compiler may compute in another order
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=compile_backend, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_189239_173068_compile_without_graph_breaks(layout):
    check_compiled("aot_eager", layout)


def test_inductor_holds_the_fake_kernels_to_their_strides():
    check_compiled("inductor", torch.channels_last)


def test_compile_of_functions_with_every_argument():
    def function(x, w, b):
        y = fastconv.conv2d(x, w, b, (2, 1), (1, 2), (1, 2), 2, algo="direct")
        y, indices = fastconv.max_pool2d(y, (3, 2), (2, 1), (1, 0), 1, True, True)
        return fastconv.batch_norm(y, None, None, training=True), indices

    x, w, b = leaf(2, 4, 9, 8), leaf(6, 2, 3, 2), leaf(6)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x, w, b)
    for a, e in zip(compiled, function(x, w, b), strict=True):
        assert torch.equal(a, e)


def test_compile_of_layers_for_sequences():
    model = torch.nn.Sequential(
        fastconv.Conv1d(4, 6, 3, padding="same"), fastconv.BatchNorm1d(6), fastconv.Conv1d(6, 2, 2, 2, 1, groups=2)
    )
    x = torch.randn(3, 4, 10, requires_grad=True)
    results = []
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = network(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


def test_dynamic_batch_size_compiles_once():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    w = torch.randn(4, 3, 3, 3)
    compiled = torch.compile(lambda x: fastconv.conv2d(x, w, padding=1), backend=backend, dynamic=True, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 6, 7)
        assert torch.equal(compiled(x), fastconv.conv2d(x, w, padding=1))
    assert len(graphs) == 1


def test_dynamic_sizes_of_average_pooling_compile_once():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def pool(x):
        return fastconv.avg_pool2d(x, 3, 2, 1), fastconv.adaptive_avg_pool2d(x, (2, None))

    compiled = torch.compile(pool, backend=backend, dynamic=True, fullgraph=True)
    for size in ((2, 3, 6, 7), (3, 3, 9, 8), (5, 4, 11, 10)):
        x = torch.randn(size)
        for actual, expected in zip(compiled(x), pool(x), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_meta_tensors():
    x, w = torch.empty(2, 3, 9, 8, device="meta"), torch.empty(4, 3, 3, 2, device="meta")
    assert fastconv.conv2d(x, w, stride=2).shape == (2, 4, 4, 4)
    y, indices = fastconv.max_pool2d(x, 2, return_indices=True)
    assert y.shape == indices.shape == (2, 3, 4, 4) and indices.dtype is torch.int64
    assert fastconv.avg_pool2d(x, 2, ceil_mode=True).shape == (2, 3, 5, 4)
    assert fastconv.adaptive_avg_pool2d(x, (3, None)).shape == (2, 3, 3, 8)
    assert fastconv.batch_norm(x, None, None, training=True).shape == x.shape


def test_fake_tensors():
    with FakeTensorMode():
        x, w = torch.empty(2, 3, 9, 8), torch.empty(4, 3, 3, 2, requires_grad=True)
        y = fastconv.conv2d(x.contiguous(memory_format=torch.channels_last), w)
        assert y.shape == (2, 4, 7, 7) and y.is_contiguous(memory_format=torch.channels_last)
        (dw,) = torch.autograd.grad(y.sum(), w)
        assert dw.shape == w.shape
