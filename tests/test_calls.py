"""Whole calls, made up by hypothesis, against torch: results, strides, dtypes, gradients, warnings, errors.

calls.py draws them and DOMAIN there lists what is drawn (`pytest -s` prints it). They are the same calls in every run:
2 000 in all, with --full 20 000 of each function.

torch is asked with its own kernels, not oneDNN's, which crash on some valid calls. It is not asked at all where it
crashes nevertheless: numbers of 2^31 and more, and pooling windows without any input element. There a rule decides.
"""

import itertools
import math
import resource
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from batch_norm_reference import batch_norm_reference
from references import (
    LOW_PRECISION,
    Expected,
    assert_close,
    conv2d_reference,
    largest_error,
    max_pool2d_backward_reference,
    without_onednn,
)

import fastconv

hypothesis = pytest.importorskip("hypothesis")
from calls import CALLS, DOMAIN, FLOATING, Drawn  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

# torch's own two paths (with and without oneDNN) word these differently, or fail an internal assertion; of a 5D image
# in channels_last_3d it refuses the layout before the rank.
UNSTABLE_TEXTS = (
    "should be the same",
    "expected scalar type",
    "mixed dtype",
    "dilation",
    "INTERNAL ASSERT",
    "1-dimensional",
    "-dimensional input for",  # or what else is wrong with such a call
    "TensorAccessor",
    "Unsupported memory format",
)


class Outcome:
    """What a call gives: results and the gradients of its leaves, or an error; the warnings; its tensors afterwards."""

    def __init__(self, library, call):
        positional, keywords, self.tensors = call.arguments()
        if call.algo and library is fastconv:
            keywords["algo"] = call.algo
        self.error, self.results, self.grads = None, (), {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = getattr(library, call.function)(*positional, **keywords)
                self.results = result if isinstance(result, tuple) else (result,)
                self._differentiate(call)
            except Exception as error:
                self.error = error
        self.warnings = [str(w.message) for w in caught]

    def _differentiate(self, call):
        y = self.results[0]
        self.dy = Drawn(tuple(y.shape), y.dtype, call.dy, seed=1).make() if y.dtype.is_floating_point else None
        if y.requires_grad:
            y.backward(self.dy)
            self.grads = {k: t.grad for k, t in self.tensors.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def compare(call):
    fastconv._arguments.warned.clear()
    with without_onednn():  # what goes on to torch as well
        ours = Outcome(fastconv, call)
    if any(abs(number) >= 2**31 for number in call.numbers()):
        check_huge(call, ours)
        return
    if check_where_torch_differs(call, ours):
        return
    with without_onednn():
        theirs = Outcome(F, call)
    if "grad_weight must be contiguous" in str(theirs.error):  # torch's kernel fails on its own temporary
        return
    if theirs.error is not None:
        check_error(ours.error, theirs.error)
        return
    if ours.error is not None:
        unlooked_at = {"conv2d": "and bias type", "batch_norm": "mixed dtype"}.get(call.function)
        if call.fault == "dtype" and unlooked_at and unlooked_at in str(ours.error):
            return  # some of torch's paths do not look at the dtypes of all arguments
        raise ours.error
    compare_outcomes(ours, theirs)
    if not ours.results[0].is_floating_point():
        assert [f"fastconv has no {call.function} kernel" in w for w in ours.warnings if "fastconv" in w] == [True]
        for a, b in zip(ours.results, theirs.results, strict=True):
            assert torch.equal(a, b)
        return
    assert not [w for w in ours.warnings if "fastconv" in w]
    VALUES[call.function](call, ours, theirs)


def check_error(ours, theirs):
    assert ours is not None, f"torch raises {theirs!r}"
    assert type(ours) is type(theirs), f"{ours!r}, torch raises {theirs!r}"
    if isinstance(theirs, TypeError) or any(text in str(theirs) for text in UNSTABLE_TEXTS):
        return  # a TypeError lists torch's signatures
    assert str(ours) == str(theirs), f"{ours}, torch says {theirs}"


def strides(tensor):
    """Where they mean something."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def compare_outcomes(ours, theirs):
    for a, b in zip(ours.results, theirs.results, strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype and a.requires_grad == b.requires_grad
        assert strides(a) == strides(b), f"strides {a.stride()}, torch's {b.stride()}"
    assert list(ours.grads) == list(theirs.grads)
    for name, grad in ours.grads.items():
        other = theirs.grads[name]
        assert grad.shape == other.shape and grad.dtype is other.dtype
        assert strides(grad) == strides(other), f"strides of {name}.grad {grad.stride()}, torch's {other.stride()}"


def batched(tensor):
    return tensor.unsqueeze(0) if tensor is not None and tensor.dim() == 3 else tensor


def check_low_precision(name, actual, reference, peer):
    """Within the bound for rounding and, in low precision, twice torch's own error."""
    assert_close(name, actual, reference, peer if actual.dtype in LOW_PRECISION else None)


def conv2d_values(call, ours, theirs):
    x, w, bias = (t.detach() if t is not None else None for t in ours.tensors.values())
    expected = conv2d_reference(batched(x), w.contiguous(), bias, batched(ours.dy), *call.exact.values())
    for name, reference in zip(("y", "input", "weight", "bias"), expected, strict=True):
        results = (
            (ours.results[0], theirs.results[0]) if name == "y" else (ours.grads.get(name), theirs.grads.get(name))
        )
        if results[0] is not None:
            actual, peer = results if name in ("weight", "bias") else map(batched, results)
            check_low_precision(name, actual, reference, peer)


def max_pool2d_values(call, ours, theirs):
    x = ours.tensors["input"].detach()
    expected, indices = F.max_pool2d(x.double().contiguous(), *window_of(call), return_indices=True)
    assert torch.equal(ours.results[0].double().nan_to_num(0.5), expected.nan_to_num(0.5))
    if len(ours.results) == 2:
        assert torch.equal(ours.results[1], indices)
    if ours.grads and x.numel():
        reference = max_pool2d_backward_reference(batched(x), batched(ours.dy), *window_of(call))
        check_low_precision("dx", batched(ours.grads["input"]), reference, batched(theirs.grads["input"]))


def window_of(call):
    window = {k: v for k, v in call.exact.items() if k != "return_indices"}
    return tuple({**window, "stride": window["stride"] or window["kernel_size"]}.values())


def batch_norm_values(call, ours, theirs):
    x = ours.tensors["input"].detach()
    before = call.arguments()[2]
    statistics = [before["running_mean"], before["running_var"]]
    if statistics[0] is None:
        statistics = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    weight, bias = before["weight"], before["bias"]
    expected = batch_norm_reference(x, weight, bias, *statistics, ours.dy, *call.exact.values())
    gradients = {"dx": "input", "dweight": "weight", "dbias": "bias"}
    for name, reference in expected.items():
        results = [
            outcome.results[0] if name == "y" else outcome.grads.get(gradients[name]) if name in gradients
            else outcome.tensors[name]
            for outcome in (ours, theirs)
        ]  # fmt: skip
        if results[0] is not None:
            error, bound = largest_error(results[0], reference.value), reference.bound(results[0].dtype)
            assert error <= bound, f"{name}: the largest error is {error:.3g}, the bound for rounding {bound:.3g}"
            if results[0].dtype in LOW_PRECISION:
                peer = largest_error(results[1], reference.value)
                assert error <= 2 * peer, f"{name}: the largest error is {error:.3g}, torch's own is {peer:.3g}"


VALUES = {"conv2d": conv2d_values, "max_pool2d": max_pool2d_values, "batch_norm": batch_norm_values}


def check_huge(call, ours):
    """A stride beyond the image leaves one window, as a window of that size does where it is cut off (ceil_mode), and a
    dilation means nothing to a kernel of one element, or leads it out of the image ('same'): such a call gives what the
    same call with a number that is just beyond the image gives. All others are refused."""
    if ours.error is not None:
        assert isinstance(ours.error, (RuntimeError, TypeError, ValueError)), repr(ours.error)
        return
    small = {}
    for name, option in call.options.items():
        small[name] = [_small(n) for n in option] if isinstance(option, (tuple, list)) else _small(option)
    theirs = Outcome(fastconv, replace(call, options=small))
    if theirs.error is not None:
        raise theirs.error
    compare_outcomes(ours, theirs)
    for a, b in zip((*ours.results, *ours.grads.values()), (*theirs.results, *theirs.grads.values()), strict=True):
        if a.dtype in FLOATING:
            assert torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
        else:  # computed by torch, whose bits vary
            torch.testing.assert_close(a, b, equal_nan=True)


def _numbers(option):
    return option if isinstance(option, (tuple, list)) else (option,)


def _small(number):
    if not isinstance(number, int) or number < 2**31:
        return number
    return 64


def check_where_torch_differs(call, ours):
    """Whether this is a call that torch gets wrong, does not check or crashes on; a rule decides on those."""
    tensors = call.tensors
    if not all(isinstance(t, (Drawn, type(None))) for t in tensors.values()) or tensors["input"] is None:
        return False
    x = tensors["input"]
    if call.function == "conv2d" and tensors["weight"] is not None:
        w = tensors["weight"]
        if x.dtype in FLOATING and len(w.size) == 4 and len(x.size) in (3, 4) and x.size[-3] == w.size[1] == 0:
            check_no_channels(call, ours)
            return True
        # Nothing is computed, so torch does not mind what with.
        if 0 in x.size and (call.fault == "dtype" or 0 in _numbers(call.options.get("dilation"))):
            assert ours.error is None or isinstance(ours.error, (RuntimeError, TypeError))
            return True
    if call.function == "batch_norm" and 0 in x.size and x.dtype in FLOATING:
        check_empty_batch_norm(call, ours)
        return True
    if call.function == "max_pool2d" and x.dtype in FLOATING and call.exact is not None and ours.error is None:
        if has_empty_window(call, ours):
            check_windows(call, ours)
            return True
    return False


def check_no_channels(call, ours):
    """A sum over nothing is the bias, where torch makes no output channels."""
    if ours.error is not None:
        assert isinstance(ours.error, (RuntimeError, TypeError)) and (
            call.exact is None or call.fault or is_refused(call)
        )
        return
    y, bias = ours.results[0], ours.tensors["bias"]
    expected = torch.zeros_like(y) if bias is None else bias[:, None, None].expand_as(y)
    if y.dtype.is_floating_point:
        assert y.shape[-3] == call.tensors["weight"].size[0] and torch.equal(y, expected)
    for name, grad in ours.grads.items():
        assert grad.shape == ours.tensors[name].shape


def is_refused(call):
    """Whether torch refuses the same call with one channel."""
    sizes = {
        k: t if k == "bias" or t is None else replace(t, size=one_channel(k, t.size)) for k, t in call.tensors.items()
    }
    groups = call.options.get("groups", 1)
    sizes["input"] = replace(sizes["input"], size=(*sizes["input"].size[:-3], groups, *sizes["input"].size[-2:]))
    with without_onednn():
        return Outcome(F, replace(call, tensors=sizes)).error is not None


def one_channel(name, size):
    return (size[0], 1, *size[2:]) if name == "weight" else size


def check_empty_batch_norm(call, ours):
    """torch returns an empty tensor before it looks at the other arguments, or reads weight[0] where there is none."""
    if ours.error is not None:
        without_statistics = None in (call.tensors["running_mean"], call.tensors["running_var"])
        assert isinstance(ours.error, (RuntimeError, ValueError, TypeError, IndexError)), repr(ours.error)
        one_value = "Expected more than 1 value per channel" in str(ours.error)  # torch's first look, too
        assert call.exact is None or call.fault or without_statistics or one_value, repr(ours.error)
        return
    assert ours.results[0].shape == ours.tensors["input"].shape
    for name, grad in ours.grads.items():
        assert grad.shape == ours.tensors[name].shape and not grad.any()
    before = call.arguments()[2]
    for name in ("running_mean", "running_var"):
        assert before[name] is None or torch.equal(before[name], ours.tensors[name])


def window_rows(size, out, kernel, stride, padding, dilation):
    """The rows (or columns) of the image that each window covers."""
    starts = [p * stride - padding for p in range(out)]
    return [[h for h in range(start, start + dilation * kernel, dilation) if 0 <= h < size] for start in starts]


def windows(call, ours):
    size, out = ours.tensors["input"].shape[-2:], ours.results[0].shape[-2:]
    kernel, stride, padding, dilation, _ = window_of(call)
    return [window_rows(size[i], out[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]


def has_empty_window(call, ours):
    """With ceil_mode, or padding and dilation, windows may miss the image."""
    return not all(map(all, windows(call, ours)))


def check_windows(call, ours):
    """Window by window: those without any element give −inf, an index inside the plane and no gradient."""
    x, y = ours.tensors["input"].detach(), ours.results[0].detach()
    rows, columns = windows(call, ours)
    planes, outs = (t.flatten(0, -3).double() for t in (x, y))
    indices = fastconv.max_pool2d(x, *window_of(call), return_indices=True)[1].flatten(0, -3)
    chosen = planes.flatten(1).gather(1, indices.flatten(1)).view_as(outs)  # raises where an index is outside
    covers = torch.tensor([[bool(r and s) for s in columns] for r in rows]).expand_as(outs)
    for (p, r), (q, s) in itertools.product(enumerate(rows), enumerate(columns)):
        if r and s:
            expected = planes[:, r][:, :, s].flatten(1).amax(1)
            assert torch.equal(outs[:, p, q].nan_to_num(0.5), expected.nan_to_num(0.5))
    assert (
        torch.equal(outs[covers].nan_to_num(0.5), chosen[covers].nan_to_num(0.5))
        and (outs[~covers] == -torch.inf).all()
    )
    if ours.grads:
        dy = ours.dy.flatten(0, -3).double() * covers
        sums = [
            torch.zeros_like(planes).flatten(1).scatter_add(1, indices.flatten(1), t.flatten(1)) for t in (dy, dy.abs())
        ]
        expected = Expected(*(t.view_as(x) for t in sums), terms=math.prod(call.exact["kernel_size"]))
        assert_close("dx", ours.grads["input"], expected)


SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def run(function, examples):
    @settings(SETTINGS, max_examples=examples)
    @given(CALLS[function])
    def check(call):
        compare(call)

    check()


@pytest.fixture
def little_memory():
    """A padding of 2^31 is valid, and its result may just fit into the machine: leave 4 GiB, so that it is refused."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("function", "examples"), [("conv2d", 800), ("max_pool2d", 600), ("batch_norm", 600)])
def test_calls_agree_with_torch(function, examples, full):
    run(function, 20_000 if full else examples)


def test_the_domain_is_printed():
    print("\n" + "\n".join(f"{what}: {drawn}" for what, drawn in DOMAIN.items()))
    assert set(CALLS) == set(VALUES)
