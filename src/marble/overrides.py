"""Settings laid over a config's mapping by their dotted names, as the command line and comparisons name them."""

from __future__ import annotations

from typing import Any

import yaml

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
        put(values, name.replace("-", "_"), read_value(text, f"--{name}"), f"--{name}")
    return values


def read_value(text: str, where: str) -> Any:
    """A value as YAML has it, numbers like `1e-4` included.

    Raises:
        MarbleError: it cannot be read; `where` is whose value it is.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MarbleError(f"{where}: cannot read the value {text!r}; put it in quotes: '\"{text}\"'") from error
    if isinstance(value, str):  # YAML 1.1 reads `1e-4` as a string; everybody means a number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def put(values: dict[str, Any], setting: str, value: Any, where: str) -> None:
    """Set `a.b` or `items.0.b` in a mapping, making sections that are not there yet.

    Raises:
        MarbleError: it points into something that holds no settings; `where` says who asked for it.
    """
    node: Any = values
    path = setting.split(".")
    for part in path[:-1]:
        if isinstance(node, list):
            if isinstance(_item(node, part, where), str):  # a reward by its name alone
                node[int(part)] = {"reward": node[int(part)]}
            node = _item(node, part, where)
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise MarbleError(f'{where}: "{part}" is not a section')
    if isinstance(node, list):
        _item(node, path[-1], where)
        node[int(path[-1])] = value
    elif isinstance(node, dict):
        node[path[-1]] = value
    else:
        raise MarbleError(f'{where}: "{path[-2]}" is not a section')


def _item(items: list[Any], number: str, where: str) -> Any:
    if not number.isdigit() or int(number) >= len(items):
        raise MarbleError(f"{where}: the list has items 0 to {len(items) - 1}, got {number}")
    return items[int(number)]
