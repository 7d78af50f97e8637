"""Toy networks and data for the engine's tests, the same every time."""

from __future__ import annotations

import torch
from torch import nn

from ..tiny import loss_of

COUNT, WIDTH = 4, 6


def data(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(*layers):
    """Random weights, norms included, so that no gradient is zero by accident."""
    module = nn.Sequential(*layers)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * data(*parameter.shape, seed=100 + index) + (parameter == 1))
    return module


def two_linears():
    return network(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))


def on(module, *shape):
    x = data(COUNT, *shape) if shape else data(COUNT, 3, WIDTH)
    return lambda: loss_of(module(x))


class Wrapped(nn.Module):
    """Layers under names, with the forward given as a function of the module and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.4 * data(*parameter.shape, seed=200 + index))

    def forward(self, x):
        return self.run(self, x)


def linear(width=WIDTH, out=WIDTH, **options):
    return nn.Linear(width, out, **options)
