"""Gradients that are hard on whoever solves on their Gram."""

import torch


def gradients(kind, count, width, seed):
    """`[count, width]` float64 of a kind that a solver may stumble over."""
    g = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if kind == "duplicate":
        g[0] = g[-1]
    elif kind == "opposite":
        g[0] = -g[-1]
    elif kind == "nearly opposite":
        g[0] = 1e-5 * g[0] - g[-1]
    elif kind == "zero":
        g[0] = 0
    elif kind == "all equal":
        g[:] = g[0].clone()
    elif kind == "summing to zero":
        g[-1] = -g[:-1].sum(dim=0)
    elif kind == "aligned":
        g += 5
    elif kind == "uneven":
        g *= torch.logspace(-5, 5, count, dtype=torch.float64)[:, None]
    return g
