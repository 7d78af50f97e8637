"""Nested arguments (dicts, lists, tuples of anything), their leaves named by paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[str | int, ...]
"""Keys and indices from the outermost container to a leaf."""


def name_of(path: Path) -> str:
    """`a.b[0]` for `("a", "b", 0)`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def children(tree: Any) -> Iterator[tuple[str | int, Any]]:
    """The items of a container; none of a leaf."""
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, (list, tuple)):
        yield from enumerate(tree)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything that is not a container, with its path."""
    if isinstance(tree, (Mapping, list, tuple)):
        for key, value in children(tree):
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def rebuild(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """`tree` with `change(path, node)` in place of every node for which that is not `KEEP`, outermost first."""
    changed = change(path, tree)
    if changed is not KEEP:
        return changed
    if isinstance(tree, Mapping):
        return {key: rebuild(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [rebuild(value, change, (*path, i)) for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree


KEEP = object()
"""What `rebuild`'s function answers for a node that is to stay, its own leaves asked in turn."""


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, tensors by their numbers."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):  # arrays answer with an array
        return False
