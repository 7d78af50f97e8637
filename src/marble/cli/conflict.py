"""`marble conflict`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from marble.errors import MarbleError

if TYPE_CHECKING:
    from marble.config import Config


@dataclass
class Conflict:
    """See how rewards disagree on a model before training it: in their scores, and in their gradients.

    Samples some epochs, trains nothing, and writes conflict.html and conflict.json: correlations, who judges what, the
    gradients' norms and cosines with noise taken out, how often a weighted sum would work against one of them, and a
    suggested set-up. Minutes on the embedded model. Settings may follow as for marble train: --rollout.prompts 24.

    example: marble conflict mini --out runs/conflict
    """

    model: tyro.conf.Positional[str]
    """hub id, folder or registered model; takes the place of the config's"""
    config: Path | None = None
    """a YAML file, as for marble train, with the rewards and prompts; the demo's, for mini alone"""
    out: Path | None = None
    """folder, new or empty; runs/conflict (or runs/conflict-2 …), if not given"""
    batches: int = 24
    """epochs to sample, at least 3; more make surer"""
    json: Annotated[bool, tyro.conf.arg(help="print what conflict.json holds")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args, changes = tyro.cli(Conflict, args=argv, prog="marble conflict", return_unknown_args=True)
    config = _config(args, changes)
    from marble.conflict import check_conflict, measure_conflict
    from marble.run import check_output, free_folder

    out = free_folder(Path("runs/conflict")) if args.out is None else args.out
    check_output(out)
    check_conflict(config, args.batches)
    with _progress() as watch:
        content = measure_conflict(config, args.batches, out, watch)
    if args.json:
        print(json.dumps(content))
    else:
        _tell(content, out)
    return 0


def _config(args: Conflict, changes: list[str]) -> Config:
    from marble.cli.settings import override
    from marble.config import demo_config_path, make_config, read_config

    if args.config is None and args.model != "mini":
        raise MarbleError(
            f'--config: needed for "{args.model}", to say which rewards and prompts; only mini has some of its own'
        )
    if any(change.partition("=")[0] == "--model.id" for change in changes):
        raise MarbleError(f'--model.id: the model is the first argument, got "{args.model}"; leave the setting out')
    values = override(read_config(args.config or demo_config_path()), changes)
    model = values.setdefault("model", {})
    if isinstance(model, dict):
        model["id"] = args.model
    return make_config(values, str(args.config or "config"))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over the updates, or a line a tenth where there is no terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print("loading the model …", file=sys.stderr, flush=True)

        def line(done: int, whole: int) -> None:
            if done * 10 // whole > (done - 1) * 10 // whole:
                print(f"{done} of {whole} updates looked at", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("loading the model", total=None)
        yield lambda done, whole: bar.update(task, description="updates looked at", completed=done, total=whole)


def _tell(content: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from marble.conflict.advice import headline

    console = Console()
    console.print(escape(headline(content)), "\n")
    table = Table(box=None, padding=(0, 2, 0, 0), title="directions", title_justify="left")
    for heading in ("", "updates with conflict", "worst cosine", "in truth"):
        table.add_column(heading, justify="left" if not heading else "right")
    from marble.conflict.directions import DIRECTIONS

    for name, label in DIRECTIONS.items():
        row = content["gradients"]["directions"][name]
        if row["advantage"] is not None:
            share, kept = row["advantage"]["conflict_rate"], row["kept"]
            truth = "–" if kept is None else f"{kept:+.2f}"
            table.add_row(label, f"{100 * share:.0f}%", f"{row['advantage']['worst']:+.2f}", truth)
    console.print(table)
    for row in content["advice"]["findings"]:
        console.print(f"\n[bold]{escape(row['finding'])}[/bold]\n{escape(row['advice'])}")
    console.print(f"\n{escape(content['advice']['suggested']['config'])}")
    print(f"page: {out / 'conflict.html'}\nJSON: {out / 'conflict.json'}")
