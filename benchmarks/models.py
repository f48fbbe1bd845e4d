"""Measures one network in inference or in training: checks every variant of it, then times them in turn.

The variants share their parameters: torch's own layers ("torch"), the same by torch.compile, fastconv's layers, and
these fused, where fastconv.fuse exists. A training step is forward, cross-entropy, backward and SGD with momentum, of
learning rate 0, so that every step computes the same. Dropout is off: its random numbers would differ.
"""

import contextlib
import copy
import math
import os
import sys
import zlib
from dataclasses import asdict

import torch
import torch.nn.functional as F
from measure import ROUNDING, time_in_turn
from networks import NETWORKS
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastconv

INFERENCE, TRAINING = MODES = ("inference", "training")
CONV, POOL, BATCH_NORM, REST = PARTS = ("conv", "pool", "BN", "rest")
OURS, FUSED, EAGER, COMPILED = VARIANTS = ("fastconv", "fused", "torch", "torch.compile")
QUICK = ("LeNet-5", "SqueezeNet 1.1", "ResNet-18")
TRAINED = ("LeNet-5", "AlexNet", "VGG-16", "GoogLeNet", "ResNet-18", "ResNet-50", "DenseNet-121", "MobileNet")
TRAINED_QUICK = ("LeNet-5", "ResNet-18")

# One ReLU or maximum that rounding decides otherwise changes the gradients of a network by about 10⁻³ of their norm.
DECISIONS = 1e-2

# Of a profiled function's name, the first that is in it. Local response normalization is a 3D pooling in torch.
NAMES = {
    "pool3d": REST, "batch_norm": BATCH_NORM, "BatchNorm": BATCH_NORM, "pool": POOL, "Pool": POOL,
    "conv": CONV, "Conv": CONV,
}  # fmt: skip


def batch(name, device, quick=False):
    """How many images. Small ones come in larger batches; VGG's steps take seconds on a CPU."""
    small = NETWORKS[name].size[1] <= 32
    if device != "cpu":
        return 1024 if small else 64
    if quick:
        return 16 if small else 2
    return 64 if small else 1 if name.startswith("VGG") else 4


class Case:
    """A network, its variants and a batch of images in one mode and layout; the same random numbers in every run."""

    def __init__(self, name, mode, device, layout, images):
        torch.manual_seed(zlib.crc32(name.encode()))
        self.name, self.mode, self.device = name, mode, device
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        model = NETWORKS[name].build().to(device, memory_format=memory)
        self.x = torch.randn(images, *NETWORKS[name].size).to(device, memory_format=memory)
        initialize(model, self.x)
        model.train(mode == TRAINING)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()
        self.parameters = list(model.parameters())
        self.models = {OURS: fastconv.convert(shared(model)), EAGER: model}
        if hasattr(fastconv, "fuse"):
            self.models[FUSED] = fastconv.fuse(fastconv.convert(shared(model)), fold=mode == INFERENCE)
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9)
        with torch.no_grad():
            classes = shared(model).eval()(self.x[:1]).shape[1]
        self.targets = torch.arange(images, device=device) % classes

    def compile(self):
        """Adds torch.compile's variant. [] or, where it does not compile (it needs a compiler), [why there is none]."""
        compiled = torch.compile(shared(self.models[EAGER]))
        try:
            self.results(compiled, self.x)
        except Exception as error:  # of many kinds
            return [f"{self.name}: no torch.compile: {type(error).__name__}"]
        self.models[COMPILED] = compiled
        return []

    def loss(self, model):
        return F.cross_entropy(model(self.x), self.targets)

    def call(self, variant):
        """A function that runs a variant once: an inference, or a training step."""
        model = self.models[variant]

        def infer():
            with torch.no_grad():
                return model(self.x)

        def step():
            self.optimizer.zero_grad()
            self.loss(model).backward()
            self.optimizer.step()

        return infer if self.mode == INFERENCE else step

    def results(self, model, x):
        """What is checked: the outputs, and in training the gradients of all parameters."""
        if self.mode == INFERENCE:
            with torch.no_grad():
                return [model(x)]
        y = model(x)
        return [y.detach(), *torch.autograd.grad(F.cross_entropy(y, self.targets), list(model.parameters()))]


def initialize(model, x):
    """Weights that keep the size of what goes through (He et al., 2015), and running statistics that are those of x:
    so the outputs depend on the images in evaluation, too."""
    layers = list(model.modules())
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    batch_norms = [(layer, layer.momentum) for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for layer, _ in batch_norms:
        layer.momentum = 1.0
    if batch_norms:
        with torch.no_grad():
            model.train()(x)
    for layer, momentum in batch_norms:
        layer.momentum = momentum


def shared(model):
    """A copy of a model with the same parameters and its own buffers."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def relative_error(results, references):
    """‖results − references‖ / ‖references‖, over all tensors together; infinite where a shape is another."""
    if [r.shape for r in results] != [e.shape for e in references]:
        return math.inf
    difference = sum((r.double() - e).square().sum().item() for r, e in zip(results, references, strict=True))
    return math.sqrt(difference / sum(e.square().sum().item() for e in references))


def check(case):
    """{variant: [error of the outputs, in training that of the gradients]} against torch's layers in float64, and how
    large either may be: four times torch's own error, and roundoff. Gradients may be off by DECISIONS at least."""
    exact = copy.deepcopy(case.models[EAGER]).double()
    expected = case.results(exact, case.x.double())
    del exact
    errors = {}
    for variant, model in case.models.items():
        y, *gradients = case.results(model, case.x)
        errors[variant] = [relative_error([y], expected[:1])]
        if gradients:
            errors[variant].append(relative_error(gradients, expected[1:]))
    bounds = [4 * (error + ROUNDING[torch.float32]) for error in errors[EAGER]]
    return errors, [*bounds[:1], *(max(bound, DECISIONS) for bound in bounds[1:])]


def part(name):
    """Which part of a step a profiled function is, or None if its name does not tell."""
    return next((kind for text, kind in NAMES.items() if text in name), None)


def split(call, device):
    """{part: ms} of one call: the outermost functions that belong to a part, with all that they call. What remains of
    the call is the rest."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    field = "device_time_total" if device == "cuda" else "cpu_time_total"
    call()
    with without_stderr(), profile(activities=activities) as profiler:
        with torch.profiler.record_function("the call"):
            call()
    found, whole = dict.fromkeys(PARTS, 0.0), 0.0
    for event in profiler.events():
        ms = getattr(event, field) / 1e3
        if event.cpu_parent is None:  # the call, and on a GPU what the thread of backward does
            whole += ms
        above, kind = event.cpu_parent, part(event.name)
        while above is not None and part(above.name) is None:
            above = above.cpu_parent
        if kind is not None and above is None:
            found[kind] += ms
    found[REST] += max(0.0, whole - sum(found.values()))
    return found


@contextlib.contextmanager
def without_stderr():
    """The profiler writes two lines to it, whatever it is told."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nothing)


def measure(name, mode, device, layout, images, milliseconds, seconds, rounds, compiled):
    """A row of results, as a dictionary. A variant that is wrong is not timed, and the row is not ok."""
    row = {
        "layer": name, "layout": layout, "direction": mode, "batch": images, "multiply_adds": 0, "parameters": 0,
        "check": {}, "bounds": [], "ok": False, "failure": "", "notes": [], "split": {}, "ratio": None,
    } | dict.fromkeys(VARIANTS)  # fmt: skip
    try:
        case = Case(name, mode, device, layout, images)
        total = fastconv.cost(case.models[EAGER], tuple(case.x.shape))
        row |= {"multiply_adds": total.multiply_adds // images, "parameters": total.parameters}
        row["notes"] = case.compile() if compiled else []
        row["check"], row["bounds"] = check(case)
        right = [v for v, errors in row["check"].items()
                 if all(e <= bound for e, bound in zip(errors, row["bounds"], strict=True))]  # fmt: skip
        row["ok"] = len(right) == len(row["check"])
        times = time_in_turn({v: case.call(v) for v in right}, milliseconds, seconds, rounds)
        row |= {variant: asdict(timing) for variant, timing in times.items()}
        if OURS in times and EAGER in times:
            row["ratio"] = times[EAGER].median / times[OURS].median
        if mode == TRAINING:
            row["split"] = {v: split(case.call(v), device) for v in right if v != COMPILED}
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
        row["failure"], row["ok"] = f"{type(error).__name__}: {str(error).splitlines()[0]}", False
    finally:
        torch._dynamo.reset()
    return row
