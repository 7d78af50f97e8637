"""`marble list`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import tyro

from marble.catalogue import METHODS, OBJECTIVES, SCHEDULERS


@dataclass
class List:
    """Show what can be named in a config.

    example: marble list rewards
    """

    what: tyro.conf.Positional[Literal["models", "rewards", "methods", "objectives", "schedulers", "prompts"]]
    json: bool = False
    """print as JSON"""


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(List, args=argv, prog="marble list")
    rows = _rows(args.what)
    if args.json:
        print(json.dumps(rows))
    else:
        width = max(map(len, rows), default=0)
        print("\n".join(f"{name:<{width}}  {about}" for name, about in rows.items()))
    return 0


def _rows(what: str) -> dict[str, str]:
    from marble.registry import known

    if what == "methods":
        return METHODS
    if what == "objectives":
        return OBJECTIVES
    if what == "schedulers":
        return SCHEDULERS
    kind = {"models": "model", "rewards": "reward", "prompts": "prompt source"}[what]
    rows = {}
    for name, point in known(kind).items():
        target = point.load()
        text = getattr(target, "about", "") or (target.__doc__ or "").strip()
        rows[name] = text.splitlines()[0] if text else ""
    return rows
