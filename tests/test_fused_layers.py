"""ConvAct2d and BatchNormAct2d: what they compute, and what autograd keeps of them."""

import pytest
import torch
from networks.residual import basic
from torch import nn

import fastconv

LAYERS = {
    "ConvAct2d": ((4, 6, 3), {"stride": 2, "padding": 1, "padding_mode": "circular"}),
    "BatchNormAct2d": ((4,), {"momentum": None}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_an_activation(backend, name, layout):
    arguments, keywords = LAYERS[name]
    layer = getattr(fastconv, name)(*arguments, **keywords).double().to(backend.device)
    peer = nn.Sequential(getattr(nn, name.replace("Act", ""))(*arguments, **keywords), nn.ReLU()).double()
    peer[0].load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64).contiguous(memory_format=layout)
    for training in (True, False):
        leaf, other = backend.put(x.clone(memory_format=torch.preserve_format)).requires_grad_(), x.clone()
        y, expected = layer.train(training)(leaf), peer.train(training)(other.requires_grad_())
        for a, b in ((y, expected), *zip(layer.state_dict().values(), peer.state_dict().values(), strict=True)):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)
        assert y.stride() == expected.stride()
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(leaf.grad.cpu(), other.grad, rtol=1e-10, atol=1e-10)


def test_batch_norm_act_layer_takes_a_residual(backend):
    layer = fastconv.BatchNormAct2d(4).double().to(backend.device)
    peer = nn.BatchNorm2d(4).double()
    x, residual = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    y = layer(backend.put(x), backend.put(residual))
    torch.testing.assert_close(y.cpu(), (peer(x) + residual).relu(), rtol=1e-12, atol=1e-12)


def saved_by(model, x):
    """The tensors that autograd keeps of a forward pass, each storage once, without parameters."""
    kept = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return y, list(kept.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_autograd_keeps_of_convolution_batch_norm_and_relu(backend, dtype, layout):
    """The convolution's input, BatchNorm's input, and some values a channel: no output, no mask."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()).to(backend.device, dtype)
    x = backend.put(torch.randn(2, 8, 9, 8).to(dtype).contiguous(memory_format=layout))
    y, kept = saved_by(fastconv.fuse(fastconv.convert(model)), x)
    sizes = sorted(t.numel() for t in kept if t.numel() > 2 * 16)
    assert sizes == sorted((x.numel(), y.numel()))
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in kept}


def test_what_autograd_keeps_of_convolution_and_relu(backend):
    """The input and the output, which the next layer keeps anyway."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()).to(backend.device)
    x = backend.put(torch.randn(2, 8, 9, 8))
    y, kept = saved_by(fastconv.fuse(fastconv.convert(model)), x)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, y)}


def test_what_autograd_keeps_of_a_residual_block(backend):
    """Each convolution's input, each BatchNorm's, and the block's output; the residual is the first input."""
    block = fastconv.fuse(fastconv.convert(basic(8, 8, 1))).to(backend.device)
    x = backend.put(torch.randn(2, 8, 9, 8)).requires_grad_()
    _, kept = saved_by(block, x)
    assert sum(t.numel() == x.numel() for t in kept) == 5
