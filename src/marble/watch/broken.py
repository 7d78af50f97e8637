"""Finds where a forward pass stops being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marble.watch.tree import leaves


def first_broken(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the innermost, first layer whose answer is not finite while its inputs are.

    Args:
        module: the network.
        run: calls it.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple, kwargs: dict, answer: Any) -> None:
            if not found and not _finite(answer) and _finite([args, kwargs]):
                found.append(name)

        return look

    hooks = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in module.named_modules() if n]
    try:
        with torch.no_grad():
            run()
    finally:
        for each in hooks:
            each.remove()
    return found[0] if found else None


def _finite(tree: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for _, leaf in leaves(tree) if isinstance(leaf, Tensor))
