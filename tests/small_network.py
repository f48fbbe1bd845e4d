"""A small network of torch's layers, of each of the kinds that fastconv has, and a step of its training."""

import copy

import torch
from torch import nn

import fastconv


def network(dtype=torch.float32):
    """torch's layers, each of the kinds that fastconv has, and others between them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4),
    ).to(dtype)  # fmt: skip


def converted(model):
    return fastconv.convert(copy.deepcopy(model))


def images(dtype=torch.float32):
    return torch.randn(3, 3, 20, 18, dtype=dtype)


def train(model, x):
    """The gradients of one step, after those of an earlier one are gone."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
