"""fuse(), unfuse() and fusions(): which layers change, and that a model computes what it did."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks.residual import basic
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastconv


class Block(nn.Module):
    """As torchvision's BasicBlock: one ReLU layer called twice, and a sum in place."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = None
        if stride != 1 or channels != filters:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Vision(nn.Module):
    """A small ResNet in torchvision's manner."""

    def __init__(self, filters=(8, 12)):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(6, 6, 1), Block(6, filters[0], 2))
        self.layer2 = nn.Sequential(Block(filters[0], filters[1], 2))
        self.fc = nn.Linear(filters[1], 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def small_resnet():
    """networks.ResNet(18) with fewer channels: its blocks, stem and head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        basic(6, 6, 1), basic(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def small_vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(),
    )  # fmt: skip


class Functional(nn.Module):
    """Every way to write a ReLU and a sum, with numbers beside the modules."""

    def __init__(self):
        super().__init__()
        self.scale = 0.5
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(6))
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(5))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.convs[0](x))
        x = torch.relu(self.bns[0](self.convs[1](x))) * self.scale
        x = (self.bns[1](self.convs[2](x)) + x).relu()
        x = F.relu(torch.add(x, self.bns[2](self.convs[3](x))), inplace=True)
        y = self.bns[3](self.convs[4](x)).add_(x).relu_()
        z = self.bns[4](self.convs[5](y)).relu()
        return self.fc(z.mean((2, 3)))


MODELS = {"torchvision": Vision, "ResNet": small_resnet, "VGG": small_vgg, "functional": Functional}
COUNTS = {  # of ConvAct2d, of BatchNormAct2d
    "torchvision": (0, 7),
    "ResNet": (0, 5),
    "VGG": (2, 1),
    "functional": (1, 5),
}


def kinds(model):
    return [type(m) for m in model.modules()]


def count(model, kind):
    return sum(type(m) is kind for m in model.modules())


def images(layout=torch.contiguous_format, dtype=torch.float64):
    return torch.randn(4, 3, 13, 12, dtype=dtype).contiguous(memory_format=layout)


def step(model, x, state):
    """Output, gradients by name and buffers after one step from `state`."""
    model.load_state_dict(state)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(leaf)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(y.square().sum(), [leaf, *parameters.values()])
    return {"y": y.detach()} | dict(zip(["x", *parameters], grads, strict=True)) | {
        name: b.clone() for name, b in model.named_buffers()
    }  # fmt: skip


def assert_same(actual, expected, bound=1e-10):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= bound * max(1, value.abs().max()), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_the_same(backend, name, training, converted, layout):
    model = MODELS[name]().double().to(backend.device).train(training)
    if training is False:
        for buffer in model.buffers():
            buffer.data += torch.rand_like(buffer.double()).to(buffer.dtype)
    x, state = backend.put(images(layout)), copy.deepcopy(model.state_dict())
    expected = step(model, x, state)
    fused = fastconv.fuse(fastconv.convert(copy.deepcopy(model)) if converted else copy.deepcopy(model))
    assert (count(fused, fastconv.ConvAct2d), count(fused, fastconv.BatchNormAct2d)) == COUNTS[name]
    assert_same(step(fused, x, state), expected)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_the_very_same_modules(name):
    model = MODELS[name]()
    before, classes = list(model.named_modules()), kinds(model)
    attributes = [dict(vars(m)) for m in model.modules()]
    assert fastconv.fuse(model) is model and kinds(model) != classes
    assert fastconv.fuse(model) is model  # again: nothing left to do
    assert fastconv.unfuse(model) is model
    assert kinds(model) == classes
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), before, strict=True))
    assert [dict(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_are_exchanged_both_ways(name):
    plain, fused = MODELS[name](), fastconv.fuse(MODELS[name]())
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_copy_and_pickle_of_a_fused_model(name):
    model = fastconv.fuse(MODELS[name]().double().eval())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
        fastconv.unfuse(other)
        assert fastconv.BatchNormAct2d not in kinds(other)
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_compile_of_a_fused_model(name):
    torch._dynamo.reset()
    model, x = fastconv.fuse(MODELS[name]().double()), images()
    state, counter = copy.deepcopy(model.state_dict()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    model.load_state_dict(state)
    y = compiled(x)
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    expected = step(model, x, state)
    assert counter.frame_count == 1
    torch.testing.assert_close(y, expected["y"])
    for (parameter, _), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, expected[parameter])


def test_autocast_gives_the_dtypes_of_the_unfused_model():
    model = Vision()
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        y = fastconv.fuse(copy.deepcopy(model))(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.1, atol=0.1)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else -x


class Optional(Untraceable):
    def forward(self, x, y=None):
        return self.body(x) if y is None else y


class OtherInTraining(Untraceable):
    def forward(self, x):
        return F.dropout(self.body(x), 0.5, self.training)


class Counts(Untraceable):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x)


class Taps(Untraceable):
    """Takes the result of its BatchNorm as well."""

    def forward(self, x):
        before = self.body[1](self.body[0](x))
        return before, self.body[2](before)


class Twice(Untraceable):
    def forward(self, x):
        return self.body(x) + self.body(x)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.add(self.bn(x), x, alpha=2).relu()


class WritesOverItsInput(Sum):
    def forward(self, x):
        x += self.bn(x)
        return x.relu()


class ChangesInBetween(Sum):
    def forward(self, x):
        y = self.bn(x)
        x = x.exp_()
        return (y + x).relu()


class SecondName(nn.Module):
    """x += y changes what else is called x."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.bn1(x)
        also_y = y
        y *= 2
        return (self.bn2(x) + also_y).relu()


class Subclass(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model[2].register_forward_hook(lambda module, args, result: None)
    return model


LEFT_ALONE = {
    "untraceable": (Untraceable, "its forward cannot be traced: symbolically traced variables cannot be used"),
    "optional": (Optional, "its forward has optional arguments"),
    "other in training": (OtherInTraining, "its forward is another in training than in evaluation"),
    "counts": (Counts, "its forward changes calls"),
    "taps": (Taps, "a result in between is used elsewhere"),
    "twice": (Twice, "the layer is called more than once"),
    "writes over its input": (WritesOverItsInput, "the sum is written over what is added"),
    "changes in between": (ChangesInBetween, "something is changed in place in between"),
    "hook": (hooked, "a layer has hooks"),
    "subclass": (lambda: nn.Sequential(Subclass(3), nn.ReLU()), "a subclass, which may compute something else"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone_and_why(name):
    make, reason = LEFT_ALONE[name]
    model = make()
    x = torch.rand(2, 3, 5, 5)
    classes, state = kinds(model), copy.deepcopy(model.state_dict())
    expected = model.eval()(x.clone())
    fastconv.fuse(model)
    assert kinds(model) == classes
    assert all(not row.fused for row in fastconv.fusions(model))
    assert any(row.reason.startswith(reason) for row in fastconv.fusions(model)), fastconv.fusions(model)
    assert reason in str(fastconv.fusions(model))
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model(x.clone()), expected)


def test_a_scaled_sum_is_no_residual():
    model = Sum()
    assert fastconv.fusions(fastconv.fuse(model)) == [] and type(model) is Sum


def test_changes_in_place_stay_in_place():
    model, x = SecondName().double(), images()
    state = copy.deepcopy(model.state_dict())
    expected = step(model, x, state)
    fastconv.fuse(model)
    assert count(model, fastconv.BatchNormAct2d) == 1
    assert_same(step(model, x, state), expected)


def test_a_layer_in_two_places_is_left_alone():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.ReLU())
    assert fastconv.BatchNormAct2d not in kinds(fastconv.fuse(model))


def test_a_shared_relu_is_fused_all_the_same():
    relu = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3), relu, nn.Conv2d(3, 4, 1), relu).double()
    x = images()
    state = copy.deepcopy(model.state_dict())
    expected = step(model, x, state)
    fastconv.fuse(model)
    assert count(model, fastconv.BatchNormAct2d) == 2 and count(model, fastconv.ConvAct2d) == 1
    assert type(model[1]) is nn.ReLU
    assert_same(step(model, x, state), expected)


def test_fusions_lists_what_is_fused():
    model = small_resnet()
    before = fastconv.fusions(model)
    assert [row.pattern for row in before] == ["BatchNorm2d → ReLU"] * 2 + ["BatchNorm2d → add → ReLU"] + [
        "BatchNorm2d → ReLU",
        "BatchNorm2d → add → ReLU",
    ]
    assert {row.reason for row in before} == {"call fastconv.fuse"}
    after = fastconv.fusions(fastconv.fuse(model))
    assert sorted(row.name for row in after) == sorted(row.name for row in before)
    assert all(row.fused for row in after)
    assert all(row.swapped for row in fastconv.coverage(model) if "Act" in row.layer or "Absorbed" in row.layer)


def test_revert_undoes_fusing_too():
    model = fastconv.fuse(fastconv.convert(Vision()))
    fastconv.revert(model)
    assert kinds(model) == kinds(Vision())


@pytest.mark.parametrize("converted", [False, True], ids=["torch's layers", "converted"])
@pytest.mark.parametrize("name", MODELS)
def test_folding_for_evaluation(backend, name, converted):
    model = MODELS[name]().double().to(backend.device).eval()
    for tensor in (*model.buffers(), *model.parameters()):
        tensor.data += torch.rand_like(tensor.double()).to(tensor.dtype)
    x, state = backend.put(images()), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        classes = kinds(fastconv.convert(model) if converted else model)
        fastconv.fuse(fastconv.fuse(model), fold=True)
        folded = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {type(m).__name__ for m in folded} == {"FoldedBatchNorm2d"}
        y = model(x)
        assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
        assert torch.equal(copy.deepcopy(model)(x), y) and torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with pytest.raises(RuntimeError, match="is folded: call fastconv.unfuse before loading"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="call fastconv.unfuse before training"):
        model.train()(x)
    fastconv.unfuse(model)
    assert kinds(model) == classes and list(dict(model.named_buffers())) == [
        k for k in state if k in dict(model.named_buffers())
    ]
    model.load_state_dict(state)


def test_folding_refuses_a_module_in_training():
    with pytest.raises(ValueError, match="call module.eval"):
        fastconv.fuse(Vision(), fold=True)
