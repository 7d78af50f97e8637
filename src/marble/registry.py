"""Finds rewards, prompt sources and models by name: our own and other packages' alike, through entry points."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from marble.errors import MarbleError, nearest

GROUPS = {"reward": "marble.rewards", "prompt source": "marble.prompts", "model": "marble.models"}
"""What can be registered → the entry point group in which any package may register it."""


def is_file(source: str) -> bool:
    """Whether a prompt source is named by the path of a `.txt` or `.jsonl` file."""
    return source.endswith((".txt", ".jsonl"))


def is_data_set(source: str) -> bool:
    """Whether a prompt source is a data set of the Hugging Face hub: `hf:owner/name`."""
    return source.startswith("hf:")


def is_url(name: str) -> bool:
    """Whether a reward is a server's: `http://host:port/NAME`."""
    return name.startswith(("http://", "https://"))


def known(kind: str) -> dict[str, EntryPoint]:
    """Name → entry point of everything registered of one of `GROUPS`, by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUPS[kind]), key=lambda p: p.name)}


def check(kind: str, name: str) -> None:
    """Raise unless `name` can be looked up, without importing what it stands for.

    Raises:
        MarbleError: `name` is neither registered nor of the form `package.module:attribute`.
    """
    if name in known(kind) or (":" in name and all(name.split(":", 1))):
        return
    raise MarbleError(
        f'unknown {kind} "{name}".{nearest(name, known(kind))} Known: {", ".join(known(kind)) or "none"}; '
        'or give your own as "package.module:attribute".'
    )


def resolve(kind: str, name: str) -> Any:
    """The object that `name` stands for: a registered name, or `package.module:attribute`.

    A module is also looked for in the working folder, after all that is installed.

    Raises:
        MarbleError: unknown name, or the module or attribute is not there.
    """
    check(kind, name)
    registered = known(kind)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if name in registered:
            return registered[name].load()
        module_name, attribute = name.split(":", 1)
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise MarbleError(f'cannot load {kind} "{name}": {error}') from error
    except Exception as error:  # somebody else's code
        raise MarbleError(f'cannot load {kind} "{name}": {type(error).__name__}: {error}') from error
