"""The layers against torch.nn's; convert(), revert() and coverage()."""

import copy
import io
import pickle

import networks
import pytest
import torch
from torch import nn

import fastconv

# ours, arguments, keywords, size of the input
LAYERS = {
    "conv": ("Conv2d", (4, 6, 3), {}, (2, 4, 7, 8)),
    "conv, all arguments": (
        "Conv2d", (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}, (2, 4, 7, 8)
    ),
    "conv, no bias": ("Conv2d", (4, 6, 3), {"bias": False}, (2, 4, 7, 8)),
    "conv, same": ("Conv2d", (4, 6, (4, 3)), {"padding": "same"}, (2, 4, 7, 8)),
    "conv, valid": ("Conv2d", (4, 6, (4, 3)), {"padding": "valid"}, (2, 4, 7, 8)),
    "conv, reflect": ("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 7, 8)),
    "conv, circular same": ("Conv2d", (4, 6, (4, 3)), {"padding": "same", "padding_mode": "circular"}, (2, 4, 7, 8)),
    "conv, replicate": ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}, (2, 4, 7, 8)),
    "conv, unbatched": ("Conv2d", (4, 6, 3), {}, (4, 7, 8)),
    "pool": ("MaxPool2d", (2,), {}, (2, 4, 7, 8)),
    "pool, all arguments": (
        "MaxPool2d", ((3, 2), (2, 1), (1, 0), (1, 2), False, True), {}, (2, 4, 7, 8)
    ),
    "batch norm": ("BatchNorm2d", (4,), {}, (3, 4, 5, 6)),
    "batch norm, all arguments": ("BatchNorm2d", (4,), {"eps": 1e-3, "momentum": 0.4}, (3, 4, 5, 6)),
    "batch norm, cumulative average": ("BatchNorm2d", (4,), {"momentum": None}, (3, 4, 5, 6)),
    "batch norm, not affine": ("BatchNorm2d", (4,), {"affine": False}, (3, 4, 5, 6)),
    "batch norm, no statistics": ("BatchNorm2d", (4,), {"track_running_stats": False}, (3, 4, 5, 6)),
    "average pool": ("AvgPool2d", (2,), {}, (2, 4, 7, 8)),
    "average pool, all arguments": (
        "AvgPool2d", ((3, 2), (2, 1), (1, 0), True, False), {"divisor_override": 4}, (2, 4, 7, 8)
    ),
    "average pool, unbatched": ("AvgPool2d", (3, 2), {"padding": 1, "count_include_pad": False}, (4, 7, 8)),
    "adaptive average pool": ("AdaptiveAvgPool2d", ((3, None),), {}, (2, 4, 7, 8)),
    "global average pool": ("AdaptiveAvgPool2d", (1,), {}, (2, 4, 7, 8)),
    "conv1d": ("Conv1d", (4, 6, 3), {}, (2, 4, 9)),
    "conv1d, all arguments": (
        "Conv1d", (4, 6, 3), {"stride": 2, "padding": 3, "dilation": 2, "groups": 2, "bias": False}, (2, 4, 9)
    ),
    "conv1d, same": ("Conv1d", (4, 6, 4), {"padding": "same"}, (2, 4, 9)),
    "conv1d, circular": ("Conv1d", (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (2, 4, 9)),
    "conv1d, reflect same": ("Conv1d", (4, 6, 4), {"padding": "same", "padding_mode": "reflect"}, (2, 4, 9)),
    "conv1d, unbatched": ("Conv1d", (4, 6, 3), {}, (4, 9)),
    "batch norm 1d": ("BatchNorm1d", (4,), {}, (5, 4)),
    "batch norm 1d of sequences": ("BatchNorm1d", (4,), {"eps": 1e-3, "momentum": None}, (5, 4, 3)),
    "batch norm 1d, no statistics": ("BatchNorm1d", (4,), {"track_running_stats": False, "affine": False}, (5, 4)),
}  # fmt: skip


def pair(name, dtype=torch.float64):
    """Ours and torch's, with the same parameters, and an input."""
    kind, arguments, keywords, size = LAYERS[name]
    keywords = keywords if "Pool" in kind else {**keywords, "dtype": dtype}
    theirs, ours = (getattr(library, kind)(*arguments, **keywords) for library in (nn, fastconv))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(size, dtype=dtype)


def saved(thing, **keywords):
    """What torch.load gives of it after torch.save."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, **keywords)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def assert_close(a, b, scale=None):
    """Within 1e-10 of the largest magnitude, in float64."""
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = b.abs().max() if scale is None else scale
    assert (a - b).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_and_evaluation(native_backend, name, layout):
    ours, theirs, x = pair(name)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    ours, theirs, x = (native_backend.put(x) if x is t else t.to(native_backend.device) for t in (ours, theirs, x))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs) if list(m.parameters())]
    for _ in range(2):
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        results = [as_tuple(module(leaf)) for module, leaf in zip((ours, theirs), leaves, strict=True)]
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
        dy = torch.randn_like(results[0][0])
        for result in results:
            result[0].backward(dy)
        assert_close(*(leaf.grad for leaf in leaves))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value)
    ours.eval(), theirs.eval()
    assert_close(as_tuple(ours(x))[0], as_tuple(theirs(x))[0])


@pytest.mark.parametrize("name", LAYERS)
def test_repr_state_dict_and_pickle(name):
    ours, theirs, x = pair(name)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is type(ours) and repr(again) == repr(ours)
    a, b = again(x), copy.deepcopy(ours)(x)
    for p, q in zip(as_tuple(a), as_tuple(b), strict=True):
        assert torch.equal(p, q)
    theirs.load_state_dict(saved(ours.state_dict()))
    ours.load_state_dict(saved(theirs.state_dict()))
    again = saved(ours, weights_only=False)
    assert type(again) is type(ours) and repr(again) == repr(ours)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_convert_of_a_single_layer_keeps_hooks_mode_and_dtype():
    layer = nn.BatchNorm2d(3).double().eval()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    converted = fastconv.convert(layer)
    assert type(converted) is fastconv.BatchNorm2d and not converted.training
    assert converted(torch.randn(2, 3, 4, 5, dtype=torch.float64)).dtype is torch.float64 and calls == [1]
    assert type(fastconv.revert(converted)) is nn.BatchNorm2d


def test_shared_layers_stay_shared():
    layer = nn.Conv2d(3, 3, 1)
    model = fastconv.convert(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] and type(model[0]) is fastconv.Conv2d


def test_subclasses_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = fastconv.convert(nn.Sequential(Scaled(3, 4, 1), nn.Conv2d(4, 5, 1)))
    assert type(model[0]) is Scaled and type(model[1]) is fastconv.Conv2d
    assert type(fastconv.revert(model)[0]) is Scaled


PARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm by a hook": nn.utils.weight_norm,
    "spectral_norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv1d(3, 4, 3)], ids=["2D", "1D"])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers_are_converted(name, layer):
    theirs = PARAMETRIZED[name](layer().double())
    kind, text = nn.Conv2d if isinstance(theirs, nn.Conv2d) else nn.Conv1d, repr(theirs)
    ours = copy.deepcopy(theirs) if "hook" not in name else PARAMETRIZED[name](layer().double())
    ours.load_state_dict(theirs.state_dict())
    assert fastconv.convert(ours) is ours and repr(ours) == text
    assert isinstance(ours, getattr(fastconv, kind.__name__)) and fastconv.coverage(ours)[0].swapped
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    x = x if kind is nn.Conv2d else x[:, :, 0]
    a, b = ours(x), theirs(x)
    assert_close(a, b)
    a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    fastconv.revert(ours)
    assert isinstance(ours, kind) and not isinstance(ours, getattr(fastconv, kind.__name__)) and repr(ours) == text
    if "hook" not in name:
        nn.utils.parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is kind


LAZY = {
    "LazyConv1d": ((6, 3), (2, 4, 9), "Conv1d"),
    "LazyConv2d": ((6, 3), (2, 4, 7, 8), "Conv2d"),
    "LazyBatchNorm1d": ((), (5, 4), "BatchNorm1d"),
    "LazyBatchNorm2d": ((), (2, 4, 7, 8), "BatchNorm2d"),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_become_fastconvs(name, monkeypatch):
    arguments, size, becomes = LAZY[name]
    called = record_ops(monkeypatch)
    x, theirs = torch.randn(size), getattr(nn, name)(*arguments)
    lazy = (
        getattr(fastconv, name)(*arguments),
        fastconv.convert(getattr(nn, name)(*arguments)),
        saved(getattr(fastconv, name)(*arguments), weights_only=False),
    )
    before, after = repr(theirs), theirs(x)
    for layer in lazy:
        assert type(layer) is getattr(fastconv, name) and repr(layer) == before
        called.clear()
        layer(x)  # the dry run
        assert called and type(layer) is getattr(fastconv, becomes) and repr(layer) == repr(theirs)
        layer.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(layer.state_dict())
        theirs.train(), layer.train()
        torch.testing.assert_close(layer(x), after)
        assert type(fastconv.revert(layer)) is getattr(nn, becomes)


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_take_their_size_from_a_state_dict_and_are_reverted(name):
    arguments, size, becomes = LAZY[name]
    x, full = torch.randn(size), getattr(nn, name)(*arguments)
    full(x)
    layer = fastconv.convert(getattr(nn, name)(*arguments))
    layer.load_state_dict(full.state_dict())
    layer.eval(), full.eval()
    torch.testing.assert_close(layer(x), full(x))
    assert type(layer) is getattr(fastconv, becomes)
    untouched = fastconv.revert(fastconv.convert(getattr(nn, name)(*arguments)))
    assert type(untouched) is getattr(nn, name)
    untouched(x)
    assert type(untouched) is getattr(nn, becomes)


def record_ops(monkeypatch):
    """A list of the ops that are called from now on."""
    called = []

    def recording(name, op):
        return lambda *args: called.append(name) or op(*args)

    for name in fastconv._ops.OPS:
        monkeypatch.setattr(fastconv._ops, name, recording(name, getattr(fastconv._ops, name)))
    return called


def test_converted_layers_run_fastconvs_kernels(monkeypatch):
    called = record_ops(monkeypatch)
    model = fastconv.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))
    )
    model(torch.randn(2, 3, 10, 11)).sum().backward()
    assert called == [
        "conv2d_fprop", "batch_norm_train", "max_pool2d_forward", "avg_pool2d_forward", "avg_pool2d_forward",
        "avg_pool2d_backward", "avg_pool2d_backward", "max_pool2d_backward", "batch_norm_backward", "conv2d_wgrad",
    ]  # fmt: skip
    called.clear()
    sequences = fastconv.convert(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
    sequences(torch.randn(2, 3, 10)).sum().backward()
    assert called == ["conv2d_fprop", "batch_norm_train", "batch_norm_backward", "conv2d_wgrad"]


def test_every_layer_is_converted_and_reverted():
    layers = {
        "Conv1d": (3, 4, 2), "Conv2d": (3, 4, 2), "MaxPool2d": (2,), "AvgPool2d": (2,), "AdaptiveAvgPool2d": (2,),
        "BatchNorm1d": (3,), "BatchNorm2d": (3,), "LazyConv1d": (4, 2), "LazyConv2d": (4, 2), "LazyBatchNorm1d": (),
        "LazyBatchNorm2d": (), "SyncBatchNorm": (3,),
    }  # fmt: skip
    assert set(layers) == {n for n in fastconv.__all__ if isinstance(getattr(fastconv, n), type) and hasattr(nn, n)}
    model = nn.Sequential(*(getattr(nn, name)(*arguments) for name, arguments in layers.items()))
    text = repr(model)
    assert not any(row.swapped for row in fastconv.coverage(model))
    fastconv.convert(model)
    assert [type(m) for m in model] == [getattr(fastconv, name) for name in layers] and repr(model) == text
    assert all(row.swapped for row in fastconv.coverage(model))
    fastconv.revert(model)
    assert [type(m) for m in model] == [getattr(nn, name) for name in layers]


def test_coverage_says_what_was_swapped_and_why_not():
    class Scaled(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), Scaled(4, 4, 1)), nn.MaxPool2d(2))
    fastconv.convert(model[0])
    rows = {row.name: row for row in fastconv.coverage(model)}
    assert list(rows) == ["0", "1.0", "1.1", "2"]
    assert rows["0"].swapped and rows["0"].reason == ""
    assert not rows["1.0"].swapped and rows["1.0"].reason == "fastconv has no such layer"
    assert not rows["1.1"].swapped and "subclass" in rows["1.1"].reason
    assert not rows["2"].swapped and "not converted" in rows["2"].reason
    table = str(fastconv.coverage(model)).splitlines()
    assert len(table) == 4 and "fastconv" in table[0] and "torch" in table[3]


def test_layers_work_on_the_meta_device():
    with torch.device("meta"):
        model = fastconv.convert(networks.ResNet(18))
        x = torch.empty(2, 3, 64, 64)
    y = model(x)
    assert y.shape == (2, 1000) and y.device.type == "meta"
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
