"""conv1d: values and gradients against float64 by conv2d's reference, sizes and strides against torch's."""

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, conv2d_gradients, conv2d_reference, without_onednn

import fastconv

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# x, w, stride, padding, dilation, groups
CASES = {
    "plain": ((2, 3, 9), (4, 3, 3), 1, 0, 1, 1),
    "stride": ((2, 3, 11), (4, 3, 4), 3, 0, 1, 1),
    "padding": ((1, 2, 5), (3, 2, 3), 1, 3, 1, 1),
    "dilation": ((2, 3, 14), (5, 3, 3), 2, 2, 4, 1),
    "groups": ((2, 6, 9), (4, 3, 2), 1, 1, 1, 2),
    "depthwise": ((2, 19, 12), (19, 1, 3), 2, 1, 1, 19),
    "1": ((3, 20, 7), (6, 20, 1), 1, 0, 1, 1),
    "one element": ((2, 3, 1), (4, 3, 1), 1, 0, 1, 1),
    "one channel": ((2, 1, 9), (4, 1, 3), 1, 1, 1, 1),
    "many channels": ((2, 40, 23), (33, 40, 5), 1, 2, 1, 1),
}


def transposed(tensor):
    """The same values, whose memory is (N, L, C)."""
    return tensor.mT.contiguous().mT


def check(backend, x, w, bias, config, algo=None):
    with without_onednn():
        peer = F.conv1d(x, w, bias, *config)
    dy = torch.randn(peer.shape).to(x.dtype)
    tensors = [backend.put(t) for t in (x, w, bias, dy)]
    results = conv2d_gradients(lambda *t: fastconv.conv1d(*t, *config, algo=algo), *tensors)
    assert results[0].stride() == peer.stride()
    stride, padding, dilation, groups = config
    expected = conv2d_reference(
        x.unsqueeze(2), w.unsqueeze(2), bias, dy.unsqueeze(2), (1, stride), (0, padding), (1, dilation), groups
    )
    for name, result, reference in zip(("y", "dx", "dw", "dbias"), results, expected, strict=True):
        if reference is not None:
            assert result.dtype is x.dtype
            assert_close(name, result if name == "dbias" else result.unsqueeze(2), reference)


@pytest.mark.parametrize("memory", ["contiguous", "transposed input", "transposed weight"])
@pytest.mark.parametrize("name", CASES)
def test_values_strides_and_gradients(backend, name, memory):
    x_size, w_size, *config = CASES[name]
    x, w = torch.randn(x_size), torch.randn(w_size)
    if memory == "transposed input":
        x = transposed(x)
    if memory == "transposed weight":
        w = transposed(w)
    check(backend, x, w, torch.randn(w_size[0]), config)
    check(backend, x, w, None, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype):
    for x_size, w_size, *config in CASES.values():
        x, w, bias = (torch.randn(size).to(dtype) for size in (x_size, w_size, w_size[:1]))
        check(backend, x, w, bias, config)


def test_by_algorithm(backend):
    x_size, w_size, *config = CASES["depthwise"]
    x, w = torch.randn(x_size), torch.randn(w_size)
    for algo in backend.algorithms:
        if algo not in ("mma", "winograd"):  # of 16 bits; of 3×3 filters
            check(backend, x, w, None, config, algo)
    if "mma" in backend.algorithms:
        check(backend, x.bfloat16(), w.bfloat16(), None, config, "mma")


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("dilation", [1, (3,)])
def test_padding_by_name(backend, padding, taps, dilation):
    x, w, bias = torch.randn(2, 3, 13), torch.randn(4, 3, taps), torch.randn(4)
    expected = F.conv1d(x.double(), w.double(), bias.double(), 1, padding, dilation)
    y = fastconv.conv1d(*map(backend.put, (x, w, bias)), 1, padding, dilation)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_unbatched_and_empty_batch(backend):
    x, w = torch.randn(3, 9), torch.randn(4, 3, 2)
    y = fastconv.conv1d(backend.put(x), backend.put(w), stride=(2,))
    torch.testing.assert_close(y.cpu(), F.conv1d(x, w, stride=2), rtol=1e-5, atol=1e-5)
    leaf = backend.put(torch.empty(0, 3, 9)).requires_grad_()
    y = fastconv.conv1d(leaf, backend.put(w))
    assert y.shape == (0, 4, 8)
    y.sum().backward()
    assert leaf.grad.shape == (0, 3, 9)
