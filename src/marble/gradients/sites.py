"""Which layers of a module can be asked for every sample's own gradient, and which modules cannot be asked at all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Site:
    """A linear layer with at least one trained parameter."""

    name: str
    layer: nn.Linear
    weight: int | None  # which parameter; None if it is not trained
    bias: int | None
    checked: set[int] = field(default_factory=set)  # rows a sample that a check found to be sample after sample
    tied: bool = False  # its parameters also act elsewhere, or its rows are not sample after sample
    slow: bool = False  # tied, or did not have all samples in every input since the last compute
    seen: set[int] = field(default_factory=set)  # first dimensions of the inputs since the last compute


def find_sites(module: nn.Module, numbers: dict[int, int]) -> list[Site]:
    """Linear layers that compute nothing but their product, and train their weight or bias (parameters by `id`)."""
    sites = []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            continue
        if "forward" in vars(layer) or layer._parameters.get("weight") is None:  # wrapped or parametrised by others
            continue
        bias = None if layer.bias is None else numbers.get(id(layer.bias))
        weight = numbers.get(id(layer.weight))
        if weight is not None or bias is not None:
            sites.append(Site(name, layer, weight, bias))
    return sites


def refuse(module: nn.Module) -> None:
    """Raise a ValueError for a module whose samples mix by design, or which autograd sees only from outside."""
    for name, part in module.named_modules():
        if isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None:
            raise ValueError(f"module is compiled at {name or 'its root'}: give the engine the module as it was before")
        batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (part.training or part.running_mean is None):
            raise ValueError(
                f"batch normalisation in training mode at {name or 'its root'} mixes samples, so that they have no "
                "gradients of their own: call eval() on it or use another normalisation"
            )
