"""The modes of torch that a model runs in: autocast, memory formats, streams, and those of the autograd engine."""

import copy
import gc
import weakref

import pytest
import torch
from references import largest_error
from small_network import assert_close, assert_same, converted, images, network, train
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastconv

LOW_PRECISION = (torch.bfloat16, torch.float16)


# ---- autocast, GradScaler, precision ----


def outputs(model, x):
    """What each layer gave, by name."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y))
        for name, layer in model.named_children()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_gives_the_dtypes_of_torch_in_every_layer(dtype):
    model, x = network(), images()
    with torch.autocast("cpu", dtype):
        ours, theirs = outputs(converted(model), x), outputs(copy.deepcopy(model), x)
    assert {name: y.dtype for name, y in ours.items()} == {name: y.dtype for name, y in theirs.items()}
    assert ours["0"].dtype is ours["1"].dtype is ours["3"].dtype is dtype


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_keeps_statistics_and_gradients_in_float32(dtype):
    model = converted(network())
    x = images()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(b.dtype is torch.float32 for b in model.buffers() if b.is_floating_point())
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())
    # The statistics are those of the rounded images, but are not rounded themselves.
    with torch.autocast("cpu", dtype):
        features = model[0](x).detach().double()
    expected = 0.1 * features.mean((0, 2, 3))
    assert largest_error(model[1].running_mean, expected) <= 1e-6


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_autocast_leaves_float64_alone_and_casts_other_low_precision(dtype):
    layer = fastconv.Conv2d(3, 4, 3)
    other = LOW_PRECISION[dtype is torch.bfloat16]
    with torch.autocast("cpu", dtype):
        assert layer(images(other)).dtype is dtype
        assert layer.double()(images(torch.float64)).dtype is torch.float64


def test_autocast_of_a_layer_used_twice_adds_up_its_gradients():
    """Also after no_grad in the same region: a cache of casts could keep one without a gradient."""
    theirs, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 7)
    ours = converted(theirs)
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=layer is ours):
            with torch.no_grad():
                layer(x)
            loss = layer(layer(x)).float().sum()
        loss.backward()
    expected = theirs.weight.grad
    assert (ours.weight.grad - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_autocast_disabled_within_autocast():
    layer, x = fastconv.Conv2d(3, 4, 3), images()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inner = layer(x)
        assert layer(x).dtype is torch.bfloat16
    assert torch.equal(inner, layer(x)) and inner.dtype is torch.float32


class InFloat32(torch.autograd.Function):
    """A user's Function around a convolution, which wants float32 whatever autocast says."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return fastconv.conv2d(x, w)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(fastconv.conv2d(x, w), (x, w), dy)


def test_custom_fwd_and_custom_bwd_switch_autocast_off_inside():
    x, w = images().requires_grad_(), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = InFloat32.apply(x, w)
        y.sum().backward()
    grads = x.grad, w.grad
    expected = fastconv.conv2d(x, w)
    assert y.dtype is torch.float32 and torch.equal(y, expected)
    assert_same(grads, torch.autograd.grad(expected.sum(), (x, w)))


def test_grad_scaler_trains_in_float16_and_skips_a_step_that_overflows():
    model, x = converted(network()), images()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=128)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    losses = [step(x) for _ in range(8)]
    assert losses[-1] < losses[0] and scaler.get_scale() == 128
    before = [p.clone() for p in model.parameters()]
    step(torch.full_like(x, 1e6))  # infinite in float16
    assert_same(model.parameters(), before)
    assert scaler.get_scale() == 64


class Calls(TorchDispatchMode):
    """The arguments that an op is called with."""

    def __init__(self, op):
        super().__init__()
        self.op, self.arguments = op, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.op.default:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_is_an_argument_of_float32_convolutions_on_cuda(fp32_precision, precision):
    fp32_precision(precision)
    for device, dtype, allowed in (
        ("cuda", torch.float32, precision == "tf32"),
        ("cuda", torch.float64, False),
        ("cuda", torch.bfloat16, False),
        ("cpu", torch.float32, False),
    ):
        with FakeTensorMode(), Calls(torch.ops.fastconv.conv2d_fprop) as calls:
            x, w = (torch.empty(size, dtype=dtype, device=device) for size in ((2, 3, 8, 9), (4, 3, 3, 3)))
            fastconv.conv2d(x, w)
        (arguments,) = calls.arguments  # without those that have their default
        assert (arguments[8] if len(arguments) > 8 else False) == allowed


# ---- Memory formats, streams and graphs ----


@pytest.mark.parametrize("which", ["input", "weights", "both"])
def test_channels_last_goes_through_a_network_as_in_torch(native_backend, which):
    model, x = network().to(native_backend.device), native_backend.put(images())
    if which != "weights":
        x = x.contiguous(memory_format=torch.channels_last)
    if which != "input":
        model = model.to(memory_format=torch.channels_last)
    ours, theirs = outputs(converted(model), x), outputs(model, x)
    strides = {name: y.stride() for name, y in ours.items()}
    assert strides == {name: y.stride() for name, y in theirs.items()}
    assert ours["5"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_training_step_on_another_stream_and_in_a_cuda_graph():
    model, x = converted(network()).cuda(), images().cuda()
    expected = [grad.clone() for grad in train(model, x)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            grads = train(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(grads, expected)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        grads = train(model, static)
    static.copy_(x)
    graph.replay()
    assert_same(grads, expected)


# ---- The autograd engine ----


def test_inference_mode_and_no_grad_compute_the_same_and_keep_nothing():
    model, x = converted(network()).eval(), images()
    expected = model(x)
    with torch.no_grad():
        y = model(x)
    assert torch.equal(y, expected) and not y.requires_grad
    with torch.inference_mode():
        y, x = model(x), x.clone()
    assert torch.equal(y, expected) and y.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(x)


def test_no_grad_in_training_updates_the_statistics_alone():
    model, x = converted(network()), images()
    with torch.no_grad():
        model(x)
    assert model[1].num_batches_tracked == 1 and model[1].running_mean.abs().max() > 0
    with torch.inference_mode():
        model(x)
    assert model[1].num_batches_tracked == 2
    train(model, x)  # the buffers are still ordinary tensors


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    model = nn.Sequential(*list(network())[:4], nn.Dropout(0.5))
    model, x = converted(model), images().requires_grad_()
    results = []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in model.parameters())])
        x.grad = None
    assert_same(*results)


def test_save_on_cpu_and_other_saved_tensors_hooks():
    model, x = converted(network()), images()
    expected = [grad.clone() for grad in train(model, x)]
    with torch.autograd.graph.save_on_cpu():
        assert_same(train(model, x), expected)
    kept = []

    def pack(tensor):
        kept.append(tensor.numpy(force=True).copy(order="K"))  # with its strides: torch multiplies by them
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: torch.from_numpy(kept[i])):
        assert_same(train(model, x), expected)
    assert len(kept) > 10


def test_anomaly_detection_finds_the_function_that_made_a_nan():
    x, w = torch.ones(1, 1, 1, 2, requires_grad=True), torch.full((1, 1, 1, 1), torch.inf)
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="Error detected in Conv2dBackward"):
        y = fastconv.conv2d(x, w) * 0
        with pytest.raises(RuntimeError, match="Function 'Conv2dBackward' returned nan values"):
            y.sum().backward()


def test_anomaly_detection_leaves_a_sound_model_alone():
    model, x = converted(network(torch.float64)), images(torch.float64)
    expected = [grad.clone() for grad in train(model, x)]
    with torch.autograd.set_detect_anomaly(True):
        assert_same(train(model, x), expected)


@pytest.mark.parametrize("changed", ["input", "weight"])
@pytest.mark.parametrize("op", ["conv2d", "batch_norm"])
def test_a_saved_tensor_that_was_written_to_is_torchs_error(op, changed):
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    weight = torch.randn((4, 3, 3, 3) if op == "conv2d" else 3, requires_grad=True)
    saved = x.clone(), weight.clone()
    y = fastconv.conv2d(*saved) if op == "conv2d" else fastconv.batch_norm(saved[0], None, None, saved[1], None, True)
    with torch.no_grad():
        saved[("input", "weight").index(changed)].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_results_may_be_written_to_as_torchs():
    """Neither conv2d nor max_pool2d nor batch_norm needs its result for backward."""
    layers = (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4))
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(inplace=True)))).double()
    x = images(torch.float64)
    assert_close(train(converted(model), x), train(model, x))


def test_a_graph_that_is_retained_can_be_used_twice_and_otherwise_not():
    model, x = converted(network()), images()
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_same(torch.autograd.grad(loss, list(model.parameters())), first)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


def test_gradients_of_unused_and_of_some_inputs():
    x, w, b = images().requires_grad_(), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    unused = torch.randn(3, requires_grad=True)
    y = fastconv.max_pool2d(fastconv.conv2d(x, w, b), 2)
    expected = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
    for subset in ((x,), (w,), (b,), (x, b)):
        grads = torch.autograd.grad(y.sum(), (*subset, unused), retain_graph=True, allow_unused=True)
        assert grads[-1] is None
        for tensor, grad in zip(subset, grads[:-1], strict=True):
            assert torch.equal(grad, expected[[t is tensor for t in (x, w, b)].index(True)])
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(y.sum(), unused)


def test_hooks_on_tensors_layers_and_accumulated_gradients():
    model, x = converted(network()), images().requires_grad_()
    expected = [grad.clone() for grad in train(model, x)]
    x_grad, x.grad = x.grad, None
    seen = []
    x.register_hook(lambda grad: 2 * grad)
    model[0].weight.register_hook(lambda grad: 3 * grad)
    model[4].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model[4].register_full_backward_hook(lambda _, gx, gy: seen.append((gx[0].shape, gy[0].shape)))
    grads = train(model, x)
    assert torch.equal(x.grad, 2 * x_grad) and torch.equal(grads[0], 3 * expected[0])
    assert_same(grads[1:], expected[1:])
    index = [p is model[4].weight for p in model.parameters()].index(True)
    assert torch.equal(seen[0], expected[index]) and seen[1] == ((3, 8, 10, 9), (3, 6, 4, 4))


def test_a_graph_is_freed_without_the_garbage_collector():
    model = converted(network())
    gc.disable()
    try:
        x = images().requires_grad_()
        alive, y = weakref.ref(x), model(x)
        del x
        assert alive() is not None
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_deterministic_algorithms_and_poisoned_memory(native_backend):
    model, x = converted(network()).to(native_backend.device), native_backend.put(images())
    empty = native_backend.put(torch.empty(0, 3, 20, 18))
    expected = [grad.clone() for grad in train(model, x)]
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(train(model, x), expected)
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in train(model, empty))
    finally:
        torch.use_deterministic_algorithms(False)
