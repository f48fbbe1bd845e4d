"""Tensors out of the ordinary: two devices, subclasses, shared memory, arguments that alias, changes in place, sizes
of many pages."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from references import assert_close, conv2d_gradients, conv2d_reference, without_onednn
from torch import nn

import fastconv


def calls_with(x, w, parameter):
    """torch on a CPU reads a meta tensor's memory here, which it has none of."""
    return {
        "conv2d": lambda: fastconv.conv2d(x, w),
        "bias": lambda: fastconv.conv2d(x, torch.zeros(4, 3, 2, 2), parameter),
        "batch_norm": lambda: fastconv.batch_norm(x, None, None, parameter, None, training=True),
        "running": lambda: fastconv.batch_norm(x, parameter, parameter),
    }


@pytest.mark.parametrize("name", ["conv2d", "bias", "batch_norm", "running"])
def test_tensors_on_two_devices_are_an_error(name):
    x, w, parameter = torch.randn(2, 3, 5, 6), torch.randn(4, 3, 2, 2, device="meta"), torch.randn(4, device="meta")
    if name in ("batch_norm", "running"):
        parameter = parameter[:3]
    with pytest.raises(RuntimeError, match="all tensors to be on the same device.*cpu and meta"):
        calls_with(x, w, parameter)[name]()


class Tagged(torch.Tensor):
    """A subclass with torch's default __torch_function__."""


class Recording(torch.Tensor):
    calls = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Tagged, Recording])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["no gradient", "gradient"])
def test_subclasses_of_tensor_come_out_as_they_went_in(kind, needs_grad):
    plain, w = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 2, 2)
    x = plain.clone().as_subclass(kind).requires_grad_(needs_grad)
    for ours, theirs in (
        (fastconv.conv2d(x, w), F.conv2d(x, w)),
        (fastconv.max_pool2d(x, 2), F.max_pool2d(x, 2)),
        (fastconv.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True)),
    ):
        assert type(ours) is type(theirs) is kind and ours.requires_grad == needs_grad
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def test_a_subclass_of_parameter_is_trained():
    class Scaled(nn.Parameter):
        pass

    layer = fastconv.Conv2d(3, 4, 2)
    layer.weight = Scaled(layer.weight.detach())
    layer(torch.randn(2, 3, 5, 6)).sum().backward()
    assert isinstance(layer.weight, Scaled) and layer.weight.grad.shape == layer.weight.shape


def test_nested_tensors_go_to_torch():
    nested = torch.nested.nested_tensor([torch.randn(3, 5, 6), torch.randn(3, 4, 6)], layout=torch.jagged)
    errors = []
    for library in (F, fastconv):
        with pytest.raises((RuntimeError, NotImplementedError, ValueError)) as raised:
            library.conv2d(nested, torch.randn(4, 3, 2, 2))
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("view", ["neg", "conj of imag"])
def test_lazy_negation_is_seen(view):
    values = torch.randn(2, 3, 6, 7)
    lazy = torch._neg_view(-values) if view == "neg" else torch.complex(values, -values).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, values)
    w = torch.randn(4, 3, 2, 2)
    assert torch.equal(fastconv.conv2d(lazy, torch._neg_view(-w)), fastconv.conv2d(values, w))
    assert torch.equal(fastconv.max_pool2d(lazy, 2), fastconv.max_pool2d(values, 2))
    expected = fastconv.batch_norm(values, None, None, training=True)
    assert torch.equal(fastconv.batch_norm(lazy, None, None, training=True), expected)


def test_one_tensor_as_input_weight_and_bias():
    """Its gradient is the sum of what each argument gets."""
    memory = torch.randn(3 * 3 * 4 * 4, dtype=torch.float64)
    leaf = memory.clone().requires_grad_()
    y = fastconv.conv2d(leaf.view(3, 3, 4, 4), leaf.view(3, 3, 4, 4), leaf[:3], padding=1)
    (ours,) = torch.autograd.grad(y.square().sum(), leaf)
    with without_onednn():
        theirs = F.conv2d(leaf.view(3, 3, 4, 4), leaf.view(3, 3, 4, 4), leaf[:3], padding=1)
        (expected,) = torch.autograd.grad(theirs.square().sum(), leaf)
    torch.testing.assert_close(y, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-10)


def test_weight_as_its_own_running_statistics():
    """The same tensor as weight and as a running variance: read before it is written."""
    x, shared = torch.randn(4, 3, 5, 2), torch.rand(3) + 0.5
    other, mean, var = shared.clone(), torch.zeros(3), shared.clone()
    y = fastconv.batch_norm(x, torch.zeros(3), shared, shared, None, training=True)
    assert torch.equal(y, fastconv.batch_norm(x, mean, var, other, None, training=True)) and torch.equal(shared, var)


@pytest.mark.parametrize("layout", ["expanded batch", "expanded image", "windows that overlap"])
def test_inputs_whose_elements_share_memory(layout):
    """Gradients reach the memory behind an expanded or overlapping input once for each element that shares it."""
    memory = torch.randn(2 * 3 * 6 * 7, dtype=torch.float64)

    def view(leaf):
        return {
            "expanded batch": lambda: leaf[: 3 * 6 * 7].view(1, 3, 6, 7).expand(4, 3, 6, 7),
            "expanded image": lambda: leaf[:6].view(2, 3, 1, 1).expand(2, 3, 6, 7),
            "windows that overlap": lambda: leaf.as_strided((2, 3, 6, 7), (5, 3, 2, 1)),
        }[layout]()

    w, results = torch.randn(4, 3, 2, 3, dtype=torch.float64), []
    for library in (fastconv, F):
        leaf = memory.clone().requires_grad_()
        with without_onednn():
            y = library.conv2d(view(leaf), w, padding=1).square().sum()
            y = y + library.batch_norm(view(leaf), None, None, training=True).pow(3).sum()
            y = y + library.max_pool2d(view(leaf), 2).square().sum()
            results.append((y.detach(), *torch.autograd.grad(y, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_expanded_upstream_gradients():
    x, w, b = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 2, 2), torch.randn(4)
    dy = torch.randn(1, 4, 1, 1).expand(2, 4, 5, 6)
    expected = conv2d_reference(x, w, b, dy, 1, 0, 1, 1)
    for result, reference in zip(conv2d_gradients(fastconv.conv2d, x, w, b, dy), expected, strict=True):
        assert_close("expanded dy", result, reference)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_backward_needs_may_not_change_in_place(changed):
    x, w = torch.randn(2, 3, 6, 7, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)
    gamma = torch.randn(3, requires_grad=True)
    inner, inner_w, inner_gamma = x * 1, w * 1, gamma * 1
    for y in (
        fastconv.conv2d(inner, inner_w),
        fastconv.batch_norm(inner, None, None, inner_gamma, None, training=True),
        fastconv.batch_norm(inner, torch.zeros(3), torch.ones(3), inner_gamma),
    ):
        with torch.no_grad():
            for tensor in (inner,) if changed == "input" else (inner_w, inner_gamma):
                tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_results_may_change_in_place():
    """None of the backward passes needs its own result."""
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    w = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    results = []
    for library in (fastconv, F):
        leaf = x.clone().requires_grad_()
        y = library.conv2d(leaf, w).relu_()
        y = library.batch_norm(y, None, None, training=True).mul_(2).relu_()
        library.max_pool2d(y, 2).mul_(3).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


HUGE_PAGE = 2**21


def flags_of_memory(begin, end):
    """Of each mapping of this process that overlaps [begin, end): what /proc/self/smaps calls VmFlags."""
    found, overlaps = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            overlaps = first < end and begin < last
        elif name == "VmFlags:" and overlaps:
            found.append(line.split()[1:])
    return found


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_large_results_ask_for_huge_pages():
    x = torch.zeros(1, 1, 2560, 2560)
    y = fastconv.avg_pool2d(x, 1)
    begin, end = y.data_ptr(), y.data_ptr() + y.nbytes
    flags = flags_of_memory(-(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE)
    assert flags and all("hg" in of_mapping for of_mapping in flags)
