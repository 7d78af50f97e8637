"""The one exception for users' mistakes, and how near names are suggested."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MarbleError(Exception):
    """A mistake that the user can mend. The command line prints its text alone and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
