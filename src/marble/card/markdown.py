"""Pieces of Markdown out of text that nobody vouches for: names, prompts, revisions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

_MARKUP = re.compile(r"[\\`*_\[\]|~$#]|:(?=//)|(?<=www)\.")
_JOINERS = "\u200c\u200d"  # invisible, but part of how some scripts and emoji are written


def plain(text: object) -> str:
    """`text` on one line, read as itself: no markup, HTML, table cell, front matter or invisible character in it."""
    line = " ".join(str(text).split())
    visible = "".join(char for char in line if char.isprintable() or char in _JOINERS)
    return _MARKUP.sub(r"\\\g<0>", escape(visible, quote=False))


def code(text: object) -> str:
    """`text` as inline code, in a table too."""
    return f"<code>{plain(text)}</code>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: str = "") -> str:
    """A table of cells that are Markdown already.

    Args:
        head: of each column.
        rows: as long as `head`.
        numbers: `l` or `r` for each column, to the left or right.
    """
    rule = ["---:" if side == "r" else "---" for side in numbers.ljust(len(head), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])
