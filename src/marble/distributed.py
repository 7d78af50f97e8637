"""Sums over the processes of a distributed run; with one process they are what they were.

Per-reward gradients are summed over micro-batches first and over processes once, before the Gram is formed: the
Gram of a sum is not the mean of the Grams. Every process then solves the same problem and gets the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place; the same bits on each."""
    if active():
        dist.all_reduce(values)
    return values


def total(number: float) -> float:
    """The sum of a number over all processes."""
    if not active():
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return sum_over_processes(torch.tensor(number, dtype=torch.float64, device=device)).item()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the parameters' `.grad` over all processes in one message; a missing one counts as 0."""
    if not active():
        return
    chosen = list(parameters)
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in chosen]
    flat = sum_over_processes(torch.cat([part.flatten() for part in parts]))
    for parameter, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = part.view_as(parameter)
