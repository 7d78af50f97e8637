"""`marble list`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import tyro

from marble.catalogue import ARM_FORMS, ARMS, METHODS, OBJECTIVES, SCHEDULERS


@dataclass
class List:
    """Show what can be named in a config.

    example: marble list rewards
    """

    what: tyro.conf.Positional[Literal["models", "rewards", "methods", "arms", "objectives", "schedulers", "prompts"]]
    json: bool = False
    """print as JSON"""
    markdown: bool = False
    """print rewards as docs/rewards.md has them"""


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(List, args=argv, prog="marble list")
    if args.what == "rewards":
        _show_rewards("json" if args.json else "markdown" if args.markdown else "text")
        return 0
    rows = _rows(args.what)
    if args.json:
        print(json.dumps(rows))
    else:
        width = max(map(len, rows), default=0)
        print("\n".join(f"{name:<{width}}  {about}" for name, about in rows.items()))
    return 0


def _show_rewards(form: Literal["json", "markdown", "text"]) -> None:
    """Every reward with what to know of it before trusting a model to it."""
    from marble.registry import known
    from marble.rewards import facts_of

    rows = {}
    for name, point in known("reward").items():
        try:
            rows[name] = facts_of(point.load())
        except Exception as error:  # another package's code: the others are shown
            rows[name] = {"about": f"cannot be loaded: {type(error).__name__}: {error}"}
    if form == "json":
        print(json.dumps(rows))
        return
    if form == "markdown":
        print("\n".join(_markdown(name, row) for name, row in rows.items() if "model" in row))
        return
    width = max((len(key) for row in rows.values() for key in row), default=0)
    for name, row in rows.items():
        print(f"{name}  {row['about']}")
        for key, value in row.items():
            if key != "about" and value:
                print(f"  {key:<{width}}  {value}")
        print()
    print('settings of every reward: name, batch, workers, timeout. Your own: "package.module:attribute", or a URL')


def _markdown(name: str, row: dict[str, str]) -> str:
    lines = [f"### {name}", row["about"][:1].upper() + row["about"][1:], ""]
    lines += [f"- {key}: {f'`{value}`' if key == 'settings' else value}" for key, value in row.items() if value]
    lines.remove(f"- about: {row['about']}")
    return "\n".join([*lines, ""])


def _rows(what: str) -> dict[str, str]:
    from marble.registry import known

    if what == "methods":
        return METHODS
    if what == "arms":
        return METHODS | {name: about for name, (about, _) in ARMS.items()} | ARM_FORMS
    if what == "objectives":
        return OBJECTIVES
    if what == "schedulers":
        return SCHEDULERS
    kind = {"models": "model", "prompts": "prompt source"}[what]
    rows = {}
    for name, point in known(kind).items():
        try:
            target = point.load()
        except Exception as error:  # another package's code: the others are shown
            rows[name] = f"cannot be loaded: {type(error).__name__}: {error}"
            continue
        text = getattr(target, "about", "") or (target.__doc__ or "").strip()
        rows[name] = text.splitlines()[0] if text else ""
    return rows
