"""Arms' settings as they may be handed around: without servers, keys and folders of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marble.export import public_rewards
from marble.overrides import put

_SECTIONS = ("rewards", "held_out_rewards")


def public_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted setting → value through the same filter as a whole configuration; what it takes away is left out."""
    told: dict[str, Any] = {}
    for name, value in overrides.items():
        section, _, rest = name.partition(".")
        _, _, inner = rest.partition(".")
        if section not in _SECTIONS:
            told[name] = value
        elif inner:
            found = _inner(inner, value)
            told |= {name: found} if found is not None else {}
        else:
            uses = [value] if rest else value
            plain = [{"reward": use} if isinstance(use, str) else use for use in uses]
            public = public_rewards({section: plain})[section]
            told[name] = public[0] if rest else public
    return told


def _inner(path: str, value: Any) -> Any:
    """What the filter leaves of one setting of a reward; None for nothing."""
    use: dict[str, Any] = {"reward": "", "settings": {}}
    put(use, path, value, path)
    node: Any = public_rewards({"rewards": [use]})["rewards"][0]
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
