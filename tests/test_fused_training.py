"""A fused ResNet-18 learns as torch's does."""

import copy
import os
import sys

import networks
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import fastconv


def training_losses(model, batches, learning_rate):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    losses = []
    for x, labels in batches:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_fused_resnet18_trains_to_the_losses_of_torch(native_backend):
    """In float64 over 20 steps. Images of 16² would leave four values a channel in the last stage, whose statistics
    amplify rounding a hundredfold a step."""
    torch.set_num_threads(2)
    model = networks.ResNet(18, classes=4, channels=16).double().to(native_backend.device)
    batches = [(torch.randn(6, 3, 32, 32).double(), torch.randint(4, (6,))) for _ in range(2)] * 10
    batches = [tuple(map(native_backend.put, batch)) for batch in batches]
    fused = fastconv.fuse(fastconv.convert(copy.deepcopy(model)))
    assert sum(type(m) is fastconv.BatchNormAct2d for m in fused.modules()) == 17
    assert all(row.fused for row in fastconv.fusions(fused))
    expected, actual = training_losses(model, batches, 1e-3), training_losses(fused, batches, 1e-3)
    assert expected[-1] < 0.1 * expected[0]
    assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) <= 1e-9


def mean_loss(seed, images, labels, fused):
    """Of the last 20 of 200 steps in bfloat16 autocast, batch 64."""
    torch.manual_seed(seed)
    model = networks.ResNet(18, classes=10)
    model[0] = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    if fused:
        fastconv.fuse(fastconv.convert(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for batch in torch.randperm(len(images))[: 200 * 64].split(64):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_a_fused_resnet18_learns_fashion_mnist_in_bfloat16_as_torchs_does(full):
    """Its loss is within the range of torch's over five seeds, of which it shares one."""
    if not full:
        pytest.skip("takes minutes: --full")
    sys.path.append(str(ROOT / "examples"))
    import fashion_mnist

    try:
        images, labels, *_ = fashion_mnist.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torch.set_num_threads(os.cpu_count())
    expected = [mean_loss(seed, images, labels, fused=False) for seed in range(5)]
    assert min(expected) <= mean_loss(0, images, labels, fused=True) <= max(expected), expected
