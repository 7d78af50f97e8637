"""`marble pareto`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from marble.errors import MarbleError, nearest

if TYPE_CHECKING:
    from marble.pareto.points import Point

SETTINGS = (
    *("model.device", "model.dtype", "model.offload", "model.vae_tiling", "model.vae_slicing", "rollout.batch"),
    *("evaluation.steps", "evaluation.guidance", "evaluation.scheduler", "threads"),
)
"""What may be changed: how pictures are made here, not what was learned."""


@dataclass
class Pareto:
    """Draw the front of two or three rewards through the models that runs have made.

    The points are the base model and every run, and on request their checkpoints, their LoRA at other strengths, and
    mixtures of specialists (rewarded soups), all on the same held-out prompts and seeds. What the runs have evaluated
    is taken from them; the same command goes on with a front that was broken off. Writes DIR/pareto.json and
    DIR/pareto.html. Settings such as --model.device may follow.

    example: marble pareto runs/aesthetic runs/alignment runs/both --scales 0.5 1.5 --soups 3 --out fronts/first
    """

    runs: tyro.conf.Positional[list[Path]]
    """run folders, or the folder of a comparison"""
    out: Path
    """folder of the front"""
    rewards: list[str] = field(default_factory=list)
    """two or three; aesthetic and alignment, or the first two evaluated"""
    scales: list[float] = field(default_factory=list)
    """strengths of each run's LoRA (0 is the base, 1 the run itself)"""
    checkpoints: bool = False
    """the checkpoints that were kept, too"""
    soups: int = 0
    """mixtures of each pair of specialists (runs trained on one reward each)"""
    soup: Annotated[tyro.conf.UseAppendAction[list[tuple[str, str]]], tyro.conf.arg(metavar="RUN RUN")] = field(
        default_factory=list
    )
    """two of the runs to mix, specialists or not; may be given again"""
    prompts: int | None = None
    """held-out prompts; as in the runs, if not given"""
    images: int | None = None
    """images a prompt; as in the runs, if not given"""
    anew: bool = False
    """make and judge all pictures, also those that the runs have evaluated or an earlier call has made; broken off, it
    starts over"""
    json: Annotated[bool, tyro.conf.arg(help="print pareto.json")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args, changes = tyro.cli(Pareto, args=argv, prog="marble pareto", return_unknown_args=True)
    _check(args, changes)
    for name in ("prompts", "images"):
        if getattr(args, name) is not None:
            changes += [f"--evaluation.{name}", str(getattr(args, name))]
    from marble.pareto import draw_front

    with _Display() as display:
        content = draw_front(
            args.runs,
            args.out,
            rewards=args.rewards,
            scales=args.scales,
            checkpoints=args.checkpoints,
            soups=args.soups,
            pairs=args.soup,
            changes=changes,
            anew=args.anew,
            started=display.started,
        )
    if args.json:
        print(json.dumps(content))
    else:
        _show(content)
        print(f"\npage: {args.out / 'pareto.html'}")
    return 0


def _check(args: Pareto, changes: Sequence[str]) -> None:
    if not args.runs:
        raise MarbleError("give at least one run folder, or the folder of a comparison")
    if wrong := [scale for scale in args.scales if not math.isfinite(scale) or scale < 0]:
        raise MarbleError(f"--scales: must be finite and at least 0, got {', '.join(f'{scale:g}' for scale in wrong)}")
    for name, least in (("soups", 0), ("prompts", 2), ("images", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise MarbleError(f"--{name}: must be at least {least}, got {value}")
    for argument in changes:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in SETTINGS:
            raise MarbleError(
                f"{argument}: cannot be changed here.{nearest(name, SETTINGS)} What can is {', '.join(SETTINGS)}"
            )


class _Display:
    """A bar of the points that have been measured."""

    def __enter__(self) -> _Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, points: Sequence[Point]) -> Callable[[Point], None]:
        """Begin; what is returned is called with each point."""
        task = self.progress.add_task("models", total=len(points))
        return lambda point: self.progress.advance(task)


def _show(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from marble.pareto.fronts import label_of
    from marble.pareto.page import verdict

    chosen = label_of(content["rewards"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", *content["rewards"], "standing"):
        table.add_column(escape(heading), justify="right" if heading in content["rewards"] else "left")
    for point in content["points"]:
        scores = ("–" if (v := point["means"][name]) is None else f"{v:.4f}" for name in content["rewards"])
        table.add_row(escape(point["name"]), *scores, escape(verdict(point["fronts"][chosen])))
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)
    volumes = content["sets"][chosen]["kinds"]
    told = ", ".join(f"{kind} {row['hypervolume']:.3f}" for kind, row in volumes.items())
    print(f"\nhypervolume over the base model, in spreads of its scores: {told}")
    for label, why in content["left_out"].items():
        print(f"left out: {label}: {why}")
