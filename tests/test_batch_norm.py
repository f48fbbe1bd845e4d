"""batch_norm forward, backward and running statistics against float64."""

import pytest
import torch
import torch.nn.functional as F
from batch_norm_reference import Bounded, batch_norm_reference
from references import LOW_PRECISION, accumulator, largest_error, unit_roundoff

import fastconv

IMAGES = [(4, 3, 5, 7), (1, 5, 3, 4), (3, 1, 6, 2), (9, 4, 1, 1), (2, 70, 3, 1), (3, 5, 2, 4), (2, 16, 3, 5)]
OTHERS = [(7, 17), (2, 1), (5, 6, 9), (2, 3, 2, 3, 4)]  # after a fully connected layer, sequences, volumes
MEDIUM_SIZES = [(4, 3, 50, 51), (300, 70), (2, 130, 9, 8), (1, 2, 90, 91), (65, 33, 3, 2), (3, 5, 700), (3, 2, 91, 127)]
LARGE_SIZES = [(4, 40, 37, 41), (33, 300), (2, 130, 14, 15), (3, 5, 130, 121), (300, 70, 2, 3), (1, 2, 300, 301)]
BEYOND_CACHES = [(2, 32, 240, 224), (2, 17, 305, 320), (2, 48, 183, 191), (27, 2, 262, 240)]
LAYOUTS = ("contiguous", "channels_last", "slices")
RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")


def lay_out(tensor, layout):
    if layout == "channels_last" and tensor.dim() in (4, 5):
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=memory_format)
    if layout == "slices":
        base = torch.full([2 * n for n in tensor.shape], float("nan"), dtype=tensor.dtype)
        return base[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
    return tensor.contiguous()


def run(batch_norm, x, weight, bias, running_mean, running_var, dy, training, momentum, eps):
    """All six results, by name."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    statistics = [t.clone() for t in (running_mean, running_var)]
    y = batch_norm(leaves[0], *statistics, *leaves[1:], training, momentum, eps)
    return dict(zip(RESULTS, (y.detach(), *torch.autograd.grad(y, leaves, dy), *statistics), strict=True))


def check(backend, x, layout="contiguous", training=True, parameters=None, momentum=0.3, eps=1e-3, with_peer=False):
    channels = x.shape[1]
    dtype = parameters or x.dtype
    weight, bias, running_mean, mean_offset = (torch.randn(channels, dtype=dtype) for _ in range(4))
    running_var = torch.rand(channels, dtype=dtype) + 0.1
    running_mean += mean_offset
    x, dy = lay_out(x, layout), lay_out(torch.randn_like(x), layout)
    inputs = (x, weight, bias, running_mean, running_var, dy)
    expected = batch_norm_reference(*inputs, training, momentum, eps)
    actual = run(fastconv.batch_norm, *map(backend.put, inputs), training, momentum, eps)
    peers = run(F.batch_norm, *inputs, training, momentum, eps) if with_peer else {}
    assert actual["y"].stride() == F.batch_norm(x, running_mean, running_var, training=False).stride()
    for name, result in actual.items():
        reference = expected[name]
        error, bound = largest_error(result, reference.value), reference.bound(result.dtype)
        assert error <= bound, f"{name}: the largest error is {error:.3g}, the bound for rounding {bound:.3g}"
        if peers and result.dtype in LOW_PRECISION:
            peer_error = largest_error(peers[name], reference.value)
            assert error <= 2 * peer_error, f"{name}: the largest error is {error:.3g}, torch's own is {peer_error:.3g}"


def check_act(backend, x, layout="contiguous", training=True, with_residual=False, parameters=None):
    """ReLU of batch_norm, or of batch_norm plus a residual: its gradients are batch_norm's at dz, dy where y > 0."""
    weight, bias, running_mean = (torch.randn(x.shape[1], dtype=parameters or x.dtype) for _ in range(3))
    running_var = torch.rand_like(running_mean) + 0.1
    x, dy, residual = lay_out(x, layout), lay_out(torch.randn_like(x), layout), lay_out(torch.randn_like(x), layout)
    leaves = [backend.put(t.clone(memory_format=torch.preserve_format)).requires_grad_() for t in (x, weight, bias)]
    leaves += [backend.put(residual).requires_grad_()] if with_residual else []
    statistics = [backend.put(t.clone()) for t in (running_mean, running_var)]
    keywords = {"residual": leaves[3]} if with_residual else {}
    y = fastconv.batch_norm(leaves[0], *statistics, *leaves[1:3], training, 0.3, 1e-3, activation="relu", **keywords)
    gradients = torch.autograd.grad(y, leaves, backend.put(dy))
    assert y.dtype is x.dtype and (y >= 0).all() and (y > 0).any()
    assert y.stride() == F.batch_norm(x, running_mean, running_var, training=False).stride()

    dz = torch.where(y.cpu() > 0, dy, 0)
    expected = batch_norm_reference(x, weight, bias, running_mean, running_var, dz, training, 0.3, 1e-3)
    z, error = expected["y"].value, expected["y"].error
    if with_residual:
        z = z + residual.double()
        error = error + unit_roundoff(accumulator(x.dtype)) * (z.abs() + error)
        assert torch.equal(gradients[3].cpu(), dz)
    expected["y"] = Bounded(z.relu(), error)
    for name, result in zip(RESULTS, (y, *gradients[:3], *statistics), strict=True):
        error, bound = largest_error(result, expected[name].value), expected[name].bound(result.dtype)
        assert error <= bound, f"{name}: the largest error is {error:.3g}, the bound for rounding {bound:.3g}"


ACTS = pytest.mark.parametrize("with_residual", [False, True], ids=["relu", "add relu"])


@ACTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", IMAGES + OTHERS[:1] + OTHERS[2:], ids=str)
def test_activation(backend, size, layout, training, with_residual):
    check_act(backend, torch.randn(size) * 2 + 3, layout, training, with_residual)


@ACTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_activation_dtypes(backend, dtype, parameters, training, with_residual):
    if parameters == "float32" and dtype is torch.float64:
        pytest.skip("float64 input takes float64 parameters only")
    for size in ((4, 3, 5, 7), (9, 12), *IMAGES[5:]):
        for layout in ("contiguous", "channels_last"):
            kind = torch.float32 if parameters == "float32" else dtype
            check_act(backend, (torch.randn(size) + 1).to(dtype), layout, training, with_residual, kind)


@ACTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", MEDIUM_SIZES, ids=str)
def test_activation_medium(backend, size, layout, with_residual):
    for dtype in (torch.float32, torch.float16, torch.float64):
        check_act(backend, (torch.randn(size) * 3 - 1).to(dtype), layout, True, with_residual)


@ACTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_activation_large(native_backend, size, layout, with_residual):
    for training in (True, False):
        check_act(native_backend, torch.randn(size) * 3 - 1, layout, training, with_residual)


@ACTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_opens_where_forward_did(backend, layout, training, with_residual):
    """To the last bit: of dy = 1, dbias is the number of outputs above zero, though half of the sums are next to it."""
    for size in ((4, 3, 8, 9), (2, 16, 3, 8), (300, 6)):
        quarter = torch.randint(-2, 3, size) / 4
        x = torch.where(torch.rand(size) < 0.5, quarter, torch.randn(size) * 1e-7)
        residual = backend.put(lay_out(-x.relu(), layout)) if with_residual else None
        x, weight = backend.put(lay_out(x, layout)), backend.put(torch.randn(size[1]))
        mean, var = backend.put(torch.zeros(size[1])), backend.put(torch.full((size[1],), 0.125))
        bias = backend.put(torch.zeros(size[1])).requires_grad_()
        y = fastconv.batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=residual)
        y.sum().backward()
        dims = [d for d in range(x.dim()) if d != 1]
        assert 0 < (y > 0).sum() < y.numel()
        assert torch.equal(bias.grad, (y > 0).sum(dims).float())


@ACTS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_output_of_zero_lets_no_gradient_pass(backend, layout, training, with_residual):
    x = torch.randn(2, 9, 3, 5)
    residual = backend.put(lay_out(torch.zeros_like(x), layout)) if with_residual else None
    x, mean, var = backend.put(lay_out(x, layout)), backend.put(torch.zeros(9)), backend.put(torch.ones(9))
    weight, bias = (backend.put(torch.zeros(9)).requires_grad_() for _ in range(2))
    y = fastconv.batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=residual)
    y.sum().backward()
    assert not y.any() and not weight.grad.any() and not bias.grad.any()


@ACTS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_of_nan(backend, layout, with_residual):
    """In evaluation a NaN stays, and lets the gradient pass, as with torch.relu."""
    x = torch.randn(2, 9, 3, 5)
    x[1, 4, 1, 2] = torch.nan
    mean, var = torch.zeros(9), torch.ones(9)
    residual = backend.put(lay_out(torch.zeros_like(x), layout)).requires_grad_() if with_residual else None
    leaf = backend.put(lay_out(x.clone(), layout)).requires_grad_()
    peer = x.clone().requires_grad_()
    y = fastconv.batch_norm(leaf, *map(backend.put, (mean, var)), activation="relu", residual=residual)
    F.batch_norm(peer, mean, var).relu().sum().backward()
    y.sum().backward()
    assert torch.equal(y.cpu().isnan(), x.isnan())
    assert torch.equal(leaf.grad.cpu() > 0, peer.grad > 0)
    if with_residual:
        assert torch.equal(residual.grad.cpu(), (peer.grad > 0).float())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nan_stays_one_when_it_is_rounded(backend, layout):
    """Where its bits are all ones, rounding them as those of a number would make them a zero's."""
    x, mean, var = lay_out(torch.randn(2, 9, 7, 5).bfloat16(), layout), torch.zeros(9), torch.ones(9)
    weight = torch.full((9,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = fastconv.batch_norm(*map(backend.put, (x, mean, var, weight)))
    assert y.dtype is torch.bfloat16 and y.isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_of_negative_zero(backend, layout):
    """It stays one, as with torch.relu."""
    x, mean, var = lay_out(torch.zeros(2, 9, 3, 5), layout), torch.zeros(9), torch.ones(9)
    inputs = [backend.put(t) for t in (x, mean, var, -torch.ones(9), torch.full([9], -0.0))]
    for activation in (None, "relu"):
        y = fastconv.batch_norm(*inputs, activation=activation)
        assert torch.equal(y.cpu(), x) and y.cpu().signbit().all()


def test_a_residual_of_another_dtype_or_shape_is_added_as_by_torch(backend):
    x, mean, var = torch.randn(2, 3, 4, 5), torch.zeros(3), torch.ones(3)
    for dtype, residual in (
        (torch.bfloat16, torch.randn(2, 3, 4, 5)),
        (torch.float32, torch.randn(3, 1, 1)),
        (torch.float32, torch.tensor(0.25)),
    ):
        inputs = x.to(dtype), mean.to(dtype), var.to(dtype)
        y = fastconv.batch_norm(*map(backend.put, inputs), activation="relu", residual=backend.put(residual))
        expected = (F.batch_norm(*inputs) + residual).relu()
        assert y.dtype is expected.dtype
        torch.testing.assert_close(y.cpu(), expected)


def test_a_residual_needs_an_activation():
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="pass activation='relu' too"):
        fastconv.batch_norm(x, None, None, training=True, residual=x)
    with pytest.raises(ValueError, match="activation='tanh'"):
        fastconv.batch_norm(x, None, None, training=True, activation="tanh")


@pytest.mark.launches_nothing
def test_activation_of_an_empty_batch(backend):
    x = backend.put(torch.empty(0, 3, 4, 5)).requires_grad_()
    weight = backend.put(torch.randn(3)).requires_grad_()
    for residual in (None, backend.put(torch.empty(0, 3, 4, 5)).requires_grad_()):
        y = fastconv.batch_norm(x, None, None, weight, None, True, activation="relu", residual=residual)
        assert y.shape == x.shape
        y.sum().backward()
        assert not weight.grad.any() and (residual is None or residual.grad.shape == x.shape)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", IMAGES + OTHERS, ids=str)
def test_forward_backward_and_statistics(backend, size, layout, training):
    check(backend, torch.randn(size) * 2 + 3, layout, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend, dtype, parameters, training):
    if parameters == "float32" and dtype is torch.float64:
        pytest.skip("float64 input takes float64 parameters only")
    for size in ((4, 3, 5, 7), (9, 12), *IMAGES[5:]):
        for layout in ("contiguous", "channels_last"):
            kind = torch.float32 if parameters == "float32" else dtype
            x = (torch.randn(size) + 1).to(dtype)
            check(backend, x, layout, training, kind, with_peer=dtype in LOW_PRECISION)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", MEDIUM_SIZES, ids=str)
def test_medium(backend, size, layout, training):
    for dtype in (torch.float32, torch.float16, torch.float64):
        check(backend, (torch.randn(size) * 3 - 1).to(dtype), layout, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_large(native_backend, size, layout, training):
    for dtype in (torch.float32, torch.bfloat16):
        check(native_backend, (torch.randn(size) * 3 - 1).to(dtype), layout, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", BEYOND_CACHES, ids=str)
def test_beyond_caches(native_backend, size, layout, training):
    """What is too large for the caches is written past them, where its rows are whole lines."""
    x = torch.randn(size) + 1
    check(native_backend, x, layout, training)
    check_act(native_backend, x, layout, training, with_residual=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_much_larger_than_deviation(backend, layout):
    for size in ((2, 3, 2, 2), (4, 3, 6, 5), (9, 6)):
        check(backend, torch.randn(size) + 3000, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_that_overflow_float32(backend, layout, dtype):
    """Their sums do too, but not the variance."""
    for size in (*IMAGES[5:], (4, 3, 5, 7), (9, 6)):
        check(backend, ((torch.rand(size) - 0.5) * 2.0**65).to(dtype), layout, parameters=torch.float32)


def test_the_op_itself_takes_one_value_a_channel(backend):
    """Which fastconv.batch_norm refuses, as torch does. The variance is then 0, by either formula."""
    x, weight, bias, mean, var = (backend.put(t) for t in (torch.randn(1, 4), *torch.randn(3, 4), torch.rand(4)))
    expected = 0.75 * mean + 0.25 * x[0], 0.75 * var
    y = fastconv._ops.batch_norm_train(x, weight, bias, mean, var, 0.25, 1e-5, False)[0]
    assert torch.equal(y[0], bias)
    for statistic, value in zip((mean, var), expected, strict=True):
        assert (statistic - value).abs().max() <= 2**-22 * value.abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_weight_bias_or_statistics(backend, training):
    x = torch.randn(3, 4, 5, 2)
    weight, mean, var = torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    for w, b in ((None, None), (weight, None), (None, weight)):
        statistics = (None, None) if training else (mean, var)
        y = fastconv.batch_norm(backend.put(x), *map(backend.put, statistics), *map(backend.put, (w, b)), training)
        expected = batch_norm_reference(x, w, b, mean, var, torch.zeros_like(x), training, 0.1, 1e-5)["y"]
        assert largest_error(y, expected.value) <= expected.bound(torch.float32)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_gradients_of_some_inputs_only(backend, frozen):
    names = ("input", "weight", "bias")
    x, weight, bias, dy = torch.randn(3, 4, 5, 2), torch.randn(4), torch.randn(4), torch.randn(3, 4, 5, 2)
    reference = batch_norm_reference(x, weight, bias, torch.zeros(4), torch.ones(4), dy, True, 0.1, 1e-5)
    expected = dict(zip(names, (reference[k] for k in ("dx", "dweight", "dbias")), strict=True))
    leaves = dict(zip(names, (backend.put(t.clone()).requires_grad_() for t in (x, weight, bias)), strict=True))
    leaves[frozen].requires_grad_(False)
    fastconv.batch_norm(leaves["input"], None, None, leaves["weight"], leaves["bias"], True).backward(backend.put(dy))
    assert leaves[frozen].grad is None
    for name in names:
        if name != frozen:
            assert largest_error(leaves[name].grad, expected[name].value) <= expected[name].bound(torch.float32)


def test_evaluation_backward_ignores_later_changes_of_the_statistics(backend):
    x, mean, var = torch.randn(3, 4, 5, 2), torch.randn(4), torch.rand(4) + 0.5
    leaf, mean, var = backend.put(x).requires_grad_(), backend.put(mean), backend.put(var)
    y = fastconv.batch_norm(leaf, mean, var)
    expected = (var.double() + 1e-5).rsqrt()
    mean.fill_(7), var.fill_(7)
    y.sum().backward()
    assert (leaf.grad - expected[:, None, None]).abs().max() <= 4 * 2**-24 * expected.max()


@pytest.mark.launches_nothing
def test_empty_batch_leaves_the_statistics_alone(backend):
    mean, var = backend.put(torch.randn(3)), backend.put(torch.rand(3))
    kept = mean.clone(), var.clone()
    x = backend.put(torch.empty(0, 3, 4, 5)).requires_grad_()
    weight = backend.put(torch.randn(3)).requires_grad_()
    y = fastconv.batch_norm(x, mean, var, weight, None, training=True)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


def test_running_statistics_that_are_not_contiguous_are_updated(backend):
    x = torch.randn(4, 3, 5, 2)
    mean, var = backend.put(torch.zeros(6))[::2], backend.put(torch.ones(6))[::2]
    fastconv.batch_norm(backend.put(x), mean, var, training=True, momentum=0.5)
    expected_mean, expected_var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    F.batch_norm(x.double(), expected_mean, expected_var, training=True, momentum=0.5)
    assert (mean.cpu() - expected_mean).abs().max() < 48 * 2**-24 * x.abs().max()
    assert (var.cpu() - expected_var).abs().max() < 192 * 2**-24 * x.square().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_has_the_same_bits_for_any_number_of_threads(native_backend, layout, threads):
    for size in LARGE_SIZES:
        x, dy, residual = (native_backend.put(lay_out(torch.randn(size), layout)) for _ in range(3))
        for added in (None, residual):
            results = []
            for count in (1, 2, 3):
                threads(count)
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                y = fastconv.batch_norm(leaf, None, None, training=True, activation="relu", residual=added)
                y.backward(dy)
                results.append((y, leaf.grad))
            assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True)), str(size)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads_and_every_run(native_backend, layout, threads):
    for size in LARGE_SIZES:
        x, dy = (native_backend.put(lay_out(torch.randn(size), layout)) for _ in range(2))
        parameters = [native_backend.put(torch.randn(size[1]).abs()) for _ in range(4)]
        threads(1)
        first = run(fastconv.batch_norm, x, *parameters, dy, True, 0.1, 1e-5)
        for count in (1, 2, 3):
            threads(count)
            again = run(fastconv.batch_norm, x, *parameters, dy, True, 0.1, 1e-5)
            for name in RESULTS:
                assert torch.equal(first[name], again[name]), f"{size}: {name} differs with {count} threads"
