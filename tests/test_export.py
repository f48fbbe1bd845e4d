"""Converted models through torch.export, torch.jit.trace and torch.fx, and torch.compile with sizes that vary."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastconv


class Network(nn.Sequential):
    """conv-bn-pool twice, with every kind of convolution: dense, 1×1, grouped, strided."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, (2, 1), (1, 2), groups=2), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.MaxPool2d((2, 3), (1, 2)),
        )  # fmt: skip


@pytest.fixture
def model():
    torch._dynamo.reset()
    return fastconv.convert(Network())


def training_step(network, model, x, state):
    """Output, gradients and buffers after one step from `state`."""
    model.load_state_dict(state)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = network(leaf)
    grads = torch.autograd.grad(y.float().square().sum(), [leaf, *model.parameters()])
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def check_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride() and a.dtype is b.dtype
        torch.testing.assert_close(a, b)  # what is between the ops, a compiler may compute in another order


def images(batch, height, width, layout=torch.contiguous_format, dtype=torch.float32):
    return torch.randn(batch, 3, height, width).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dims", [(0,), (2, 3), (0, 2, 3)], ids=["batch", "image", "batch and image"])
def test_sizes_that_vary_are_compiled_once(model, dims, layout):
    """Forward and backward in one graph each, whatever the sizes: torch may specialize once more, not for each size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    state = copy.deepcopy(model.state_dict())
    for step in range(8):
        size = [2 + step if 0 in dims else 2, *((10 + step, 19 - step) if 2 in dims else (12, 11))]
        x = images(*size, layout)
        for dim in dims:
            torch._dynamo.mark_dynamic(x, dim)
        model.load_state_dict(state)
        y = compiled(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        buffers = [b.clone() for b in model.buffers()]
        model.load_state_dict(state)
        expected = model(x)
        expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        check_same([y, *grads, *buffers], [expected, *expected_grads, *model.buffers()])
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times for 8 sizes"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile_without_gradients(model, mode, training):
    model.train(training)
    x, state = images(2, 9, 10, torch.channels_last), copy.deepcopy(model.state_dict())
    with mode():
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        buffers = [b.clone() for b in model.buffers()]
        model.load_state_dict(state)
        check_same([y, *buffers], [model(x), *model.buffers()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_compile_in_bfloat16(model, layout):
    model = model.bfloat16().to(memory_format=layout)
    x, state = images(2, 9, 10, layout, torch.bfloat16), copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check_same(training_step(compiled, model, x, state), training_step(model, model, x, state))


def test_compile_under_autocast(model):
    x, state = images(2, 9, 10), copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (training_step(network, model, x, state) for network in (compiled, model))
    assert actual[0].dtype is torch.bfloat16
    check_same(actual, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_export_save_and_load(model, layout):
    model.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(3, 12, 11, layout),), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if "fastconv" in str(node.target)}
    assert names == {f"fastconv.{op}.default" for op in ("conv2d_fprop", "batch_norm_eval", "max_pool2d_forward")}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for size in (2, 5):
        x = images(size, 12, 11, layout)
        for exported in (program, loaded):
            assert torch.equal(exported.module()(x), model(x))


def test_export_of_training(model):
    """Statistics are updated; a gradient is refused aloud, since the op alone has none."""
    program = torch.export.export(model.train(), (images(3, 12, 11),))
    x, state = images(3, 12, 11), copy.deepcopy(model.state_dict())
    module = program.module()
    module.load_state_dict(state)
    with pytest.raises(NotImplementedError, match="fastconv.batch_norm is the differentiable one"):
        module(x)
    module.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(module(x), model(x))
    updated = dict(module.named_buffers())
    assert all(torch.equal(updated[name], buffer) for name, buffer in model.named_buffers())


def test_jit_trace(model):
    model.eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, 12, 11))
        x = images(3, 12, 11)
        assert torch.equal(traced(x), model(x))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), model(x))


@pytest.mark.parametrize("order", ["trace, then convert", "convert, then trace"])
def test_fx_symbolic_trace(order):
    """fastconv's layers are recorded as calls, as torch.nn's are, though fx looks into layers from elsewhere."""
    torch._dynamo.reset()
    if order == "trace, then convert":
        network = Network()
        graph = fastconv.convert(torch.fx.symbolic_trace(copy.deepcopy(network)))
        graph.load_state_dict(network.state_dict())
        model = fastconv.convert(network)
    else:
        model = fastconv.convert(Network())
        copied = copy.deepcopy(model)
        graph = torch.fx.symbolic_trace(copied)
    assert {type(m) for m in graph.modules()} >= {fastconv.Conv2d, fastconv.BatchNorm2d, fastconv.MaxPool2d}
    x, state = images(2, 9, 10), copy.deepcopy(model.state_dict())
    for a, b in zip(training_step(graph, graph, x, state), training_step(model, model, x, state), strict=True):
        assert torch.equal(a, b)


def test_fx_records_every_layer_of_a_fused_model_as_one_call():
    torch._dynamo.reset()
    model = fastconv.fuse(fastconv.convert(Network()))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes][1:-1] == ["call_module"] * 7  # and two ReLUs that are gone
    x, state = images(2, 9, 10), copy.deepcopy(model.state_dict())
    for a, b in zip(training_step(graph, graph, x, state), training_step(model, model, x, state), strict=True):
        assert torch.equal(a, b)
