"""What `marble compare` shows: cells at work, and the tables."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from marble.compare import Cell, Work
from marble.compare.words import COST_NOTE, NOTE, costs, scores, standings


class Display:
    """Shows every cell at work with its updates and the time left. Call it as `Crew.make` does."""

    def __init__(self, total: int, jobs: int, console: Console | None = None) -> None:
        """For `total` cells, `jobs` of them side by side; use as a context manager."""
        self.total, self.jobs, self.console = total, jobs, console or Console(stderr=True)
        self.took: list[float] = []  # seconds of finished cells
        self._begun: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, working: list[Work], waiting: list[Cell], ended: list[Cell]) -> None:
        """Show how far things are; `ended` since the last time."""
        for work in working:
            if work.cell.folder.name not in self._begun:
                self._begun[work.cell.folder.name] = work.began
                if self._live is None:
                    print(f"{work.cell.folder.name}: started", file=sys.stderr, flush=True)
        for cell in ended:
            self._end(cell, waiting, working)
        if self._live is not None:
            self._live.update(self._render(working, waiting))

    def _end(self, cell: Cell, waiting: list[Cell], working: list[Work]) -> None:
        took = time.monotonic() - self._begun[cell.folder.name]
        error = cell.record.get("error")
        if cell.done:
            self.took.append(took)
        word = "done" if cell.done else f"failed: {error}" if error else "stopped"
        left = self._left(working, waiting)
        text = f"{cell.folder.name}: {word}, {_clock(took)}" + (f"; {_clock(left)} left in all" if left else "")
        self.console.print(Text(text, style="red" if error else ""))

    def _left(self, working: list[Work], waiting: list[Cell]) -> float | None:
        """Seconds to the end of all, by what finished cells took, or those at work seem to take."""
        now = time.monotonic()
        spent = [(now - work.began, work.share()[1]) for work in working]
        known = self.took or [seconds / share for seconds, share in spent if share > 0]
        if not known:
            return None
        each = sum(known) / len(known)
        return (sum(max(0.0, each - seconds) for seconds, _ in spent) + each * len(waiting)) / self.jobs

    def _render(self, working: list[Work], waiting: list[Cell]) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        shares = 0.0
        for work in working:
            made, share = work.share()
            shares += share
            spent = time.monotonic() - work.began
            clock = _clock(spent / share - spent) + " left" if share > 0 else _clock(spent)
            of = f"/{work.cell.config.budget.updates}" if work.cell.config.budget.updates else ""
            stage = "loading" if not made else "evaluating" if share >= 1 else f"update {made}{of}"
            table.add_row(work.cell.folder.name, ProgressBar(1.0, share, width=30), stage, clock)
        done = self.total - len(working) - len(waiting)
        left = self._left(working, waiting)
        line = f"{done} of {self.total} cells" + (f", {_clock(left)} left" if left is not None else "")
        return Group(table, ProgressBar(self.total, done + shares, width=56), Text(line))


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


def show(content: dict[str, Any]) -> None:
    """Print a comparison's tables and verdict."""
    console = Console()
    tables = {"scores on held-out prompts": scores, "gains": standings, "costs": costs}
    for title, rows in tables.items():
        console.print(_fitting(title, rows(content), console))
        console.print()
    console.print(Text(f"{NOTE} {COST_NOTE}", style="dim"))
    for name, arm in content["arms"].items():
        for seed, cell in arm["seeds"].items():
            if cell["status"] != "done":
                console.print(Text(f"{name} seed {seed}: {cell['status']}. {cell['error'] or ''}", style="red"))
    for note in content["notes"]:
        console.print(Text(f"note: {note}"))
    console.print()
    console.print(Text(content["verdict"]))


def _fitting(title: str, rows: list[list[str]], console: Console) -> Table:
    """The table as it is, or with its rows and columns exchanged if only that fits, or is narrower at least."""
    turned = [[row[i] for row in rows] for i in range(len(rows[0]))]
    tables = [_table(title, way) for way in (rows, turned)]
    widths = [console.measure(table, options=console.options.update(width=10_000)).maximum for table in tables]
    if widths[0] <= console.width or widths[0] <= widths[1]:
        return tables[0]
    return tables[1]


def _table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table
