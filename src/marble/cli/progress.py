"""The progress display of a run, and a gentle Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from marble.config import Config

_PLAIN_EVERY = 10
"""Updates between two lines where there is no terminal to redraw."""


class Silence:
    """What every process but the main one shows. Its first Ctrl-C is left to the main process, the second ends it."""

    def __enter__(self) -> Silence:
        self._previous, self._asked = signal.signal(signal.SIGINT, self._on_interrupt), False
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        return self

    def __exit__(self, *_: object) -> None:
        self._caught.__exit__(None, None, None)
        signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class ProgressDisplay:
    """Shows every reward's current and first value, its weight, and the time left. Call it with an update's metrics.

    The first Ctrl-C asks the run to stop after the current epoch, the second breaks it off.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        """Set up for one run; use as a context manager."""
        self.config = config
        self.console = console or Console(stderr=True)
        self.first: dict[str, float] = {}
        self.held_out: dict[str, list[float]] = {}
        self.started = time.perf_counter()
        self.interrupted = False
        self._first_update = 0
        self._live: Live | None = None

    def __enter__(self) -> ProgressDisplay:
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        if self.console.is_terminal:
            self._live = Live(
                Text("loading, and evaluating the base model …"), console=self.console, refresh_per_second=4
            )
            self._live.start()
        else:
            print("loading, and evaluating the base model …", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("stopping after this epoch; once more to break it off at once")

    def __call__(self, metrics: dict[str, Any]) -> bool:
        """Show an update; whether the run is to stop."""
        if not self.first:
            self.first = {k: v for k, v in metrics["reward"].items() if v is not None}
            self._first_update = metrics["update"]
            self.started = time.perf_counter() - metrics["update_seconds"] - metrics["time"]["rollout"]
        for name, value in metrics.get("held_out", {}).items():
            if value is not None:
                self.held_out.setdefault(name, []).append(value)
        if self._live is not None:
            self._live.update(self._render(metrics))
        elif metrics["update"] % _PLAIN_EVERY == 0:
            self._print(metrics)
        return self.interrupted

    def _share(self, metrics: dict[str, Any]) -> float:
        budget = self.config.budget
        shares = [metrics["update"] / budget.updates] if budget.updates else []
        if budget.minutes:
            shares.append(metrics["time"]["elapsed"] / 60 / budget.minutes)
        return min(1.0, max(shares))

    def _time_left(self, metrics: dict[str, Any]) -> str:
        if self._share(metrics) >= 1:
            return "evaluating what was learned …"
        elapsed, done = time.perf_counter() - self.started, metrics["update"] - self._first_update + 1
        left = []
        if self.config.budget.updates:
            left.append(elapsed / done * (self.config.budget.updates - metrics["update"]))
        if self.config.budget.minutes:
            left.append(self.config.budget.minutes * 60 - metrics["time"]["elapsed"])
        seconds = int(max(0, min(left)))
        return f"{seconds // 60}:{seconds % 60:02d} left"

    def _print(self, metrics: dict[str, Any]) -> None:
        rewards = "  ".join(f"{n} {v:.4f}" for n, v in metrics["reward"].items() if v is not None)
        print(f"update {metrics['update']:4d}  {rewards}  {self._time_left(metrics)}", file=sys.stderr, flush=True)

    def _render(self, metrics: dict[str, Any]) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("reward", "now", "first", "change", "weight"):
            table.add_column(heading, justify="left" if heading == "reward" else "right")
        alpha = metrics.get("alpha") or [None] * len(metrics["reward"])
        for (name, value), weight in zip(metrics["reward"].items(), alpha, strict=True):
            if value is None:
                table.add_row(name, Text("missing", style="red"), "", "", "")
                continue
            self.first.setdefault(name, value)
            change = value - self.first.get(name, value)
            table.add_row(
                name,
                f"{value:.4f}",
                f"{self.first.get(name, value):.4f}",
                Text(f"{change:+.4f}", style="green" if change > 0 else "red" if change < 0 else ""),
                "" if weight is None else f"{weight:.2f}",
            )
        for name, values in self.held_out.items():
            if name not in metrics["reward"]:
                table.add_row(
                    f"{name} (held out)", f"{values[-1]:.4f}", f"{values[0]:.4f}", f"{values[-1] - values[0]:+.4f}", ""
                )
        share = self._share(metrics)
        line = Text(f"update {metrics['update']}  epoch {metrics['epoch'] + 1}  {self._time_left(metrics)}")
        return Group(table, ProgressBar(total=1.0, completed=share, width=56), line)
