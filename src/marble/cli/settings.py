"""Settings on the command line: `--section.name value` laid over a config, and a table of all there are."""

from __future__ import annotations

import types
import typing
from typing import Any

import yaml
from pydantic import BaseModel

from marble.config import Config
from marble.overrides import override as override


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
