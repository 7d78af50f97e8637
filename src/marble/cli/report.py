"""`marble report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Report:
    """Make the report of one or more runs again, from what lies in their folders.

    example: marble report runs/demo
    """

    runs: tyro.conf.Positional[list[Path]]
    """run folders"""


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Report, args=argv, prog="marble report")
    from marble.errors import MarbleError
    from marble.report import write_report
    from marble.run import Run

    if not args.runs:
        raise MarbleError("give at least one run folder")
    for folder in [Run(path) for path in args.runs]:
        print(write_report(folder))
    return 0
