"""One prompt with what its rewards need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """A prompt.

    `targets` is plain JSON. Keys in use: `text` (the word or words to render) and `objects`
    (a list of `{"name", "colour", "count", "size"}`, all but the name optional) with `relation`
    (`["left of", i, j]`: object i stands left of object j), `task` (one of GenEval's six) and `exclude` (a list of
    `{"name", "count"}`: there must be fewer).
    """

    text: str
    source: str = ""
    targets: dict[str, Any] = field(default_factory=dict, hash=False)
