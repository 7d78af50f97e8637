"""Settings on the command line: `--section.name value` laid over a config, and a table of all there are."""

from __future__ import annotations

import types
import typing
from typing import Any

import yaml
from pydantic import BaseModel

from marble.config import Config
from marble.errors import MarbleError


def override(values: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Lay `--a.b value` (or `--a.b=value`) pairs over a config's mapping; list items are named by number.

    Values are read as YAML, so `3`, `null` and `[a, b]` are what they look like. Whether the settings exist
    and fit is for the config to check.

    Raises:
        MarbleError: an argument is not of this form, or points into something that holds no settings.
    """
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) < 3:
            raise MarbleError(f'"{name}": expected a setting like --optimizer.lr 1e-4')
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not rest:
                raise MarbleError(f"--{name}: expected a value after it")
            text = rest.pop(0)
        try:
            value = _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise MarbleError(f"--{name}: cannot read the value {text!r}; put it in quotes: '\"{text}\"'") from error
        _put(values, name.replace("-", "_").split("."), value, name)
    return values


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; everybody means a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(node: Any, path: list[str], value: Any, name: str) -> None:
    for part in path[:-1]:
        if isinstance(node, list):
            if isinstance(_item(node, part, name), str):  # a reward by its name alone
                node[int(part)] = {"reward": node[int(part)]}
            node = _item(node, part, name)
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise MarbleError(f'--{name}: "{part}" is not a section')
    if isinstance(node, list):
        _item(node, path[-1], name)
        node[int(path[-1])] = value
    elif isinstance(node, dict):
        node[path[-1]] = value
    else:
        raise MarbleError(f'--{name}: "{path[-2]}" is not a section')


def _item(items: list[Any], number: str, name: str) -> Any:
    if not number.isdigit() or int(number) >= len(items):
        raise MarbleError(f"--{name}: the list has items 0 to {len(items) - 1}, got {number}")
    return items[int(number)]


def describe_settings() -> str:
    """Every setting with its default and meaning, one a line."""
    lines: list[str] = []
    _describe(Config, "", lines)
    return "\n".join(lines)


def _describe(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    for name, field in section.model_fields.items():
        annotation = field.annotation
        inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            _describe(inner, f"{prefix}{name}.{'N.' if inner is not annotation else ''}", lines)
            continue
        default = (
            "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True).split("\n")[0]
        )
        meaning = f"  {field.description}" if field.description else ""
        lines.append(f"  --{prefix}{name} {_type(annotation)} = {default}{meaning}")


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is types.UnionType:
        return "|".join(_type(part) for part in typing.get_args(annotation) if part is not type(None))
    return getattr(annotation, "__name__", str(annotation))
