"""`marble evaluate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

_ONE_LINE = 135
"""Columns that a table with every interval beside its number needs."""


@dataclass
class Evaluate:
    """Score a model, with or without a LoRA, on held-out prompts with fixed seeds, and against another.

    Of every reward: the mean over prompts with its 95% interval, and against a reference the paired
    difference, the win rate, and accuracy where the reward has one. Images of both sides have the same
    prompts and seeds. Prompts, rewards and evaluation settings are those of a config; settings may
    follow that change it, as for marble train: --evaluation.prompts 20.

    Broken off, the same command goes on; a finished folder is printed again. Several processes share
    the work: torchrun --nproc_per_node 8 -m marble evaluate …

    example: marble evaluate mini --lora runs/demo --out evaluations/demo
    """

    model: tyro.conf.Positional[str]
    """hub id, folder, registered model, or a run folder (its model with what it learned)"""
    out: Path
    """folder for evaluation.json and samples: new, empty, or of this very evaluation"""
    lora: str | None = None
    """a run folder, or any LoRA that Diffusers reads (folder, file, hub id)"""
    scale: float = 1.0
    """of the LoRA's strength"""
    config: Path | None = None
    """any training config; that of the run, or the demo's for its model, if not given"""
    against: str | None = None
    """base (if there is a LoRA, unless told otherwise), none, a run folder, a LoRA, or the evaluation.json of an
    earlier evaluation"""
    portion: int = 8
    """prompts made, judged and stored at a time"""
    json: Annotated[bool, tyro.conf.arg(help="print evaluation.json")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args, changes = tyro.cli(Evaluate, args=argv, prog="marble evaluate", return_unknown_args=True)
    from marble.distributed import leave, together

    with together() as several:
        code = _run(args, changes)
    return leave(code) if several else code


def _run(args: Evaluate, changes: list[str]) -> int:
    from marble.cli.progress import Silence
    from marble.distributed import decide, is_main
    from marble.scoring import make_plan, score

    plan = make_plan(
        args.model,
        lora=args.lora,
        scale=args.scale,
        config=args.config,
        against=args.against,
        portion=args.portion,
        changes=changes,
    )
    if not is_main():
        with Silence():
            score(plan, args.out)
            return decide(int)
    try:
        with _Progress() as progress:
            result = score(plan, args.out, progress)
    except KeyboardInterrupt:
        print("broken off; the same command goes on from the last finished portion", file=sys.stderr)
        raise
    return decide(lambda: _tell(result, args))


class _Progress:
    """A bar over portions, on stderr."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:  # a finished evaluation has nothing to show
            self._task = self._bar.add_task("portions of prompts", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)


def _tell(result: dict[str, Any], args: Evaluate) -> int:
    if args.json:
        print(json.dumps(result))
        return 0
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=10_000)  # a file has no edge
    setup, rewards = result["setup"], result["rewards"]
    console.print(_headline(setup), markup=False, highlight=False)
    console.print(_table(rewards, console.width, against=result["reference"] is not None))
    for line in _notes(rewards, setup["revisions"]):
        console.print(line, markup=False, highlight=False)
    console.print(f"\n{args.out / 'evaluation.json'}", markup=False, highlight=False)
    return 0


def _headline(setup: dict[str, Any]) -> str:
    lora, against = setup["lora"], setup["against"]
    what = setup["model"]["id"] + ("" if lora is None else f" with {_source(lora)}")
    other = "" if against == "none" else f" against {_source(against)}"
    images = len(setup["seeds"])
    return (
        f"{what}{other}\n{len(setup['prompts'])} held-out prompts, {images} image{'s' * (images > 1)} each, the same "
        "seeds for all; in brackets 95% intervals over prompts\n"
    )


def _source(overlay: str | dict[str, Any]) -> str:
    if isinstance(overlay, str):
        return overlay
    return overlay["source"] + ("" if overlay["scale"] == 1 else f" at {overlay['scale']:g} times its strength")


def _table(rewards: dict[str, dict[str, Any]], width: int, *, against: bool) -> Any:
    """Intervals stand below the numbers where `width` is too small for both in a line."""
    from rich.markup import escape
    from rich.table import Table

    gap = " " if width >= _ONE_LINE else "\n"
    table = Table(box=None, padding=(0, 2 if gap == " " else 1, 0, 0))
    table.add_column("reward")
    for heading in ("mean", *(("reference", "difference", "win rate") if against else ()), "prompts"):
        table.add_column(heading, justify="right")

    def add(label: str, prompts: str, digits: int, mean: Any, *pair: Any) -> None:
        cells = [_estimate(mean, gap, digits)]
        if against:
            other, difference, wins = pair
            cells += ["–" if other is None else f"{other['value']:.{digits}f}"]
            cells += [_estimate(difference, gap, digits, sign="+"), "" if wins is None else _estimate(wins, gap, 3)]
        table.add_row(escape(label), *map(escape, cells), prompts, style=_style(pair[1]))

    for name, row in rewards.items():
        label = name + f"{gap}(held out)" * (row["kind"] == "held-out")
        add(label, str(row["prompts"]), 4, row["mean"], row["reference"], row["difference"], row["win_rate"])
        if row["accuracy_above"] is not None:
            pair = row["reference_accuracy"], row["accuracy_difference"], None
            add(f"  right (≥ {row['accuracy_above']:g})", "", 3, row["accuracy"], *pair)
    return table


def _estimate(estimate: dict[str, float | None] | None, gap: str, digits: int, sign: str = "") -> str:
    if estimate is None:
        return "–"
    value, *ends = (f"{number:{sign}.{digits}f}" for number in estimate.values() if number is not None)
    return f"{value}{gap}[{', '.join(ends) or 'too few prompts'}]"


def _style(difference: dict[str, float | None] | None) -> str | None:
    """Green for what is surely better, red for what is surely worse."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return None
    return "green" if difference["low"] > 0 else "red" if difference["high"] < 0 else None


def _notes(rewards: dict[str, dict[str, Any]], revisions: dict[str, str]) -> list[str]:
    from marble.statistics import FEW_PROMPTS, FEWEST_PROMPTS

    few = [name for name, row in rewards.items() if row["mean"] is not None and row["mean"]["low"] is None]
    enough = f"at least {FEWEST_PROMPTS}, better {FEW_PROMPTS}"
    lines = [f"too few prompts for an interval of {', '.join(few)}: {enough}"] if few else []
    judges = [f"{name} {revision}" for name, revision in revisions.items() if revision]
    lines += [f"judged by {', '.join(judges)}"] if judges else []
    return lines + [
        f"{name}: no score of {row['missing']} images that it should have judged"
        for name, row in rewards.items()
        if row["missing"]
    ]
