"""cost() and summary(): counted from layers of every kind, and checked against what torch computes."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastconv

# layer, input without the batch, output, weights, biases, multiply-adds, receptive field
LAYERS = {
    "conv": (nn.Conv2d(3, 10, 5, padding=2), (3, 32, 30), (10, 32, 30), 750, 10, 750 * 32 * 30, (5, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 8), (6, 7, 6), 108, 6, 108 * 7 * 6, (3, 3)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 9, 8), (4, 7, 6), 36, 0, 36 * 7 * 6, (3, 3)),
    "dilation": (nn.Conv2d(2, 3, (3, 2), 2, 1, (2, 3)), (2, 9, 8), (3, 4, 4), 36, 3, 36 * 4 * 4, (5, 4)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 9, 8), (3, 9, 8), 54, 3, 54 * 72, (3, 3)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 9, 8), (3, 9, 8), 54, 3, 54 * 72, (3, 3)),
    "conv1d": (nn.Conv1d(4, 6, 3, 2, dilation=2, groups=2), (4, 11), (6, 4), 36, 6, 36 * 4, (5,)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3)), (2, 4, 5, 6), (3, 4, 4, 4), 36, 3, 36 * 64, (1, 2, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, 2), (2, 4, 5), (3, 8, 10), 24, 3, 24 * 20, (4, 5)),
    "max pool": (nn.MaxPool2d(3, 2, 1, dilation=(1, 2)), (4, 9, 8), (4, 5, 3), 0, 0, 0, (3, 5)),
    "max pool of maximal windows": (nn.MaxPool1d(2, ceil_mode=True), (4, 9), (4, 5), 0, 0, 0, (2,)),
    "average pool": (nn.AvgPool2d((3, 2)), (4, 9, 8), (4, 3, 4), 0, 0, 0, (3, 2)),
    "adaptive pool": (nn.AdaptiveAvgPool2d((4, None)), (4, 9, 8), (4, 4, 8), 0, 0, 0, (3, 1)),
    "global pool": (nn.AdaptiveMaxPool2d(1), (4, 9, 8), (4, 1, 1), 0, 0, 0, (9, 8)),
    "batch norm": (nn.BatchNorm2d(4), (4, 9, 8), (4, 9, 8), 4, 4, 0, (1, 1)),
    "LRN": (nn.LocalResponseNorm(5), (8, 9, 8), (8, 9, 8), 0, 0, 0, (1, 1)),
    "activation": (nn.PReLU(), (4, 9, 8), (4, 9, 8), 1, 0, 0, (1, 1)),
    "linear": (nn.Linear(5, 7), (5,), (7,), 35, 7, 35, ()),
}  # fmt: skip


@pytest.mark.parametrize("converted", [False, True], ids=["torch", "fastconv"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, converted):
    layer, size, output, weights, biases, multiply_adds, sees = LAYERS[name]
    layer = copy.deepcopy(layer)
    if converted:
        fastconv.convert(layer)
    of_any_dimension = isinstance(layer, (nn.PReLU, nn.LocalResponseNorm))
    for batch in (1, 3) if of_any_dimension else (None, 1, 3):
        n = batch or 1
        front = (batch,) if batch else ()
        found = fastconv.cost(layer, (*front, *size))
        assert fastconv.summary(layer, (*front, *size)) == [found]  # whose multiply-adds are counted otherwise
        assert (found.input_size, found.output_size) == ((*front, *size), (*front, *output))
        assert (found.weights, found.biases, found.parameters) == (weights, biases, weights + biases)
        assert found.multiply_adds == n * multiply_adds
        statistics = 2 * weights if "norm" in name else 0
        elements = n * (torch.Size(size).numel() + torch.Size(output).numel()) + weights + biases + statistics
        assert found.least_bytes == 4 * elements
        assert found.receptive_field == sees
        assert found.intensity == pytest.approx(2 * found.multiply_adds / found.least_bytes)


def test_bytes_follow_the_dtype_and_views_move_none():
    half, single = (fastconv.cost(nn.Conv2d(3, 4, 3).to(dtype), (3, 8, 8)) for dtype in (torch.bfloat16, torch.float32))
    assert 2 * half.least_bytes == single.least_bytes == 4 * (3 * 64 + 4 * 36 + 4 * 28)
    for layer in (nn.Flatten(), nn.Dropout2d(), nn.Identity()):
        assert fastconv.cost(nn.Sequential(nn.MaxPool2d(2), layer), (3, 8, 8)).least_bytes == 4 * 3 * (64 + 16)


def seen_by_gradient(model, size):
    """How many rows and columns of the input the middle element of the output has gradients of."""
    x = torch.rand(1, *size, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y[(0, slice(None), *(n // 2 for n in y.shape[2:]))].sum().backward()
    where = x.grad[0].ne(0).any(0).nonzero()
    return tuple((where.amax(0) - where.amin(0) + 1).tolist())


class Functional(nn.Module):
    """Pools, joins and pads outside of its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, (3, 5), 2, (1, 2)), nn.Conv2d(4, 4, 1, 2)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.a(x)), 2)
        x = F.pad(x, (2, 2, 1, 1))
        return torch.stack([self.b(x), self.c(x)], 2).flatten(1, 2) * 0.5 + 1


def positive(model):
    """The model with weights above zero, so that no gradient cancels, evaluated in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.abs() + 0.1)
    return model.double().eval()


FIELDS = {
    "three 3×3": (nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3))), (3, 21, 21), (7, 7)),
    "strides and dilations": (
        nn.Sequential(
            nn.Conv2d(2, 2, 3, (2, 1)), nn.AvgPool2d((1, 3), (1, 2)), nn.Conv2d(2, 2, (2, 3), dilation=(3, 2))
        ),
        (2, 41, 41), (9, 13),
    ),
    "residual": (networks.residual.basic(4, 8, 2), (4, 32, 32), (7, 7)),
    "Inception": (networks.NaiveInception(3, 2, 2, 2), (3, 16, 16), (5, 5)),
    "dense": (nn.Sequential(*(networks.dense.Dense(8 + 2 * i, 2) for i in range(3))), (8, 16, 16), (7, 7)),
    "fractal": (networks.fractal.Fractal(2, 3, 3), (2, 32, 32), (9, 9)),
    "shuffle": (networks.mobile.Shuffle(8, 8, 1), (8, 16, 16), (3, 3)),
    "functions": (Functional(), (3, 40, 40), (8, 12)),
    "adaptive": (nn.Sequential(nn.Conv2d(2, 2, 3, 2), nn.AdaptiveAvgPool2d((4, 3))), (2, 19, 13), (7, 5)),
    "global": (nn.Sequential(nn.Conv2d(2, 2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1)), (2, 9, 13), (9, 13)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_field_is_that_of_the_gradient(name):
    model, size, expected = FIELDS[name]
    assert fastconv.cost(model, size).receptive_field == expected
    assert seen_by_gradient(positive(copy.deepcopy(model)), size) == expected


def test_a_flattened_map_is_seen_as_a_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 5 * 6, 2))
    found = fastconv.summary(model, (3, 11, 13))
    assert [row.receptive_field for row in found] == [(3, 3), (11, 13), (11, 13)] and found.total.output_size == (2,)


@pytest.mark.parametrize("name", ["LeNet-5", "GoogLeNet", "ResNet-18", "ResNeXt-50", "MobileNet", "ShuffleNet v2"])
def test_multiply_adds_are_those_of_torchs_counter(name):
    network = networks.NETWORKS[name]
    with torch.device("meta"):
        model, x = network.build(), torch.empty(3, *network.size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = fastconv.summary(model, (3, *network.size))
    assert 2 * sum(row.multiply_adds for row in found) == 2 * found.total.multiply_adds == counter.get_total_flops()


def test_a_summary_changes_nothing_and_computes_nothing():
    model = networks.ResNet(18)
    model[1].eval(), model[4].body[0].register_forward_hook(lambda *_: None)
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    before = fastconv.summary(model, (3, 224, 224))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    after = fastconv.summary(fastconv.convert(model), (3, 224, 224))
    assert list(after) == list(before) and after.total == before.total
    with pytest.raises(RuntimeError):
        fastconv.summary(model, (4, 224, 224))
    assert [m.training for m in model.modules()] == modes
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


def test_shared_layers_have_a_row_a_call_and_are_counted_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    found = fastconv.summary(nn.Sequential(layer, nn.ReLU(), layer), (3, 8, 8))
    assert [row.multiply_adds for row in found] == [81 * 64, 0, 81 * 64]
    assert found.total.multiply_adds == 2 * 81 * 64 and found.total.parameters == 84


def test_what_is_outside_of_layers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.scale = nn.Linear(8, 8, bias=False), nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = self.project(x)
            return self.scale * (x @ x.mT @ x)

    found = fastconv.summary(Attention(), (2, 5, 8))
    assert found.total.multiply_adds == 2 * (5 * 64 + 2 * 5 * 5 * 8) and found.total.weights == 65
    assert "(outside of layers)" in str(found) and f"{2 * 2 * 5 * 5 * 8:,}" in str(found)


def test_parametrized_and_lazy_layers():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    (row,) = fastconv.summary(layer, (3, 8, 8))
    assert (row.weights, row.biases, row.multiply_adds) == (4 * 27 + 4, 4, 4 * 27 * 36)
    with pytest.raises(ValueError, match="lazy"):
        fastconv.summary(nn.Sequential(nn.LazyConv2d(4, 3)), (3, 8, 8))


def test_the_table():
    lines = str(fastconv.summary(networks.LeNet5(), (1, 28, 28))).splitlines()
    assert len(lines) == 1 + 10 + 1 and max(map(len, lines)) <= 120
    assert lines[0].split()[:3] == ["layer", "output", "weights"]
    assert lines[4].split() == ["3", "Conv2d", "50×14×14", "25,000", "50", "4,900,000", "155,080", "14×14", "63.2"]
    assert lines[-1].split()[:6] == ["total", "LeNet5", "10", "1,255,500", "580", "6,522,000"]
