"""conv2d and max_pool2d over arguments that hypothesis makes up; always the same ones."""

import pytest
import torch
import torch.nn.functional as F
from references import (
    assert_close,
    conv2d_gradients,
    conv2d_reference,
    max_pool2d_backward_reference,
    without_onednn,
)

import fastconv

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile("fastconv", derandomize=True, deadline=None, max_examples=300, database=None)
settings.load_profile("fastconv")
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    """Sizes of x and w, and stride, padding, dilation, groups, such that the kernel fits."""
    groups, per_group, filters = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, padding, dilation = draw(pairs(1, 4)), draw(pairs(1, 4)), draw(pairs(0, 4)), draw(pairs(1, 3))
    image = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), d * (k - 1) + 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    x = (draw(st.integers(1, 3)), groups * per_group, *image)
    return x, (groups * filters, per_group, *kernel), stride, padding, dilation, groups


@given(convolutions(), LAYOUTS, LAYOUTS, st.booleans(), st.sampled_from([None, "direct", "im2col"]))
def test_conv2d(problem, x_layout, w_layout, has_bias, algo):
    x_size, w_size, *config = problem
    x = torch.randn(x_size).contiguous(memory_format=x_layout)
    w = torch.randn(w_size).contiguous(memory_format=w_layout)
    b = torch.randn(w_size[0]) if has_bias else None
    with without_onednn():
        dy = torch.randn_like(F.conv2d(x, w, b, *config))
    expected = conv2d_reference(x, w, b, dy, *config)
    actual = conv2d_gradients(lambda *inputs: fastconv.conv2d(*inputs, *config, algo=algo), x, w, b, dy)
    for name, result, reference in zip(("y", "dx", "dw", "db"), actual, expected, strict=True):
        if reference is not None:
            assert_close(name, result, reference)


@st.composite
def poolings(draw):
    """The size of x, and a window of which every one has an input element: torch is not defined on others."""
    kernel, stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 4)), draw(pairs(1, 3))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, (k - 1) // 2)) for k in kernel)
    image = [draw(st.integers(r, r + 9)) for r in reach]
    return (draw(st.integers(1, 3)), draw(st.integers(1, 5)), *image), (kernel, stride, padding, dilation)


@given(poolings(), LAYOUTS, st.integers(1, 50))
def test_max_pool2d(problem, layout, distinct_values):
    x_size, window = problem
    x = (torch.randint(distinct_values, x_size) - distinct_values // 2).float().contiguous(memory_format=layout)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y, indices = fastconv.max_pool2d(leaf, *window, return_indices=True)
    expected, expected_indices = F.max_pool2d(x.contiguous(), *window, return_indices=True)
    assert torch.equal(y, expected) and torch.equal(indices, expected_indices)
    dy = torch.randn(y.shape)
    y.backward(dy)
    assert_close("dx", leaf.grad, max_pool2d_backward_reference(x, dy, *window, False))
