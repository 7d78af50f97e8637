"""Nested state on disk as safetensors with a JSON header: no pickle, written aside and then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from marble.errors import MarbleError

_TENSOR = "__tensor__"
_ITEMS = "__items__"


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees either the old file or the whole new one."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def save_tree(path: Path, tree: Any) -> None:
    """Save dicts, lists, numbers, strings and tensors, nested at will, as one safetensors file.

    Args:
        path: where to; written aside and renamed, so a crash leaves the old file.
        tree: what to save. Dict keys may be strings or integers (as an optimizer's are).

    Raises:
        MarbleError: it cannot be written (a full disk, say).
    """
    tensors: dict[str, torch.Tensor] = {}

    def encode(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {_ITEMS: [[key, encode(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return [encode(value) for value in node]
        return node

    header = json.dumps(encode(tree))
    aside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, aside, metadata={"tree": header})
    except SafetensorError as error:
        raise MarbleError(f'cannot write "{path}": {error}') from error
    os.replace(aside, path)


def load_tree(path: Path, *keys: str | int) -> Any:
    """What `save_tree` saved; tuples come back as lists. With `keys`, what lies under them in nested dicts alone.

    Raises:
        KeyError: nothing lies under `keys`.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tree"])
        for key in keys:
            header = dict(header[_ITEMS])[key]

        def decode(node: Any) -> Any:
            if isinstance(node, dict) and _TENSOR in node:
                return file.get_tensor(node[_TENSOR])
            if isinstance(node, dict):
                return {key: decode(value) for key, value in node[_ITEMS]}
            if isinstance(node, list):
                return [decode(value) for value in node]
            return node

        return decode(header)
