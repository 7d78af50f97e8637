"""From run folders to a front: read, measure, describe, draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marble.errors import MarbleError, nearest
from marble.pareto.fronts import choose_rewards, describe
from marble.pareto.measure import SHOWN, Measurer
from marble.pareto.page import write_page
from marble.pareto.points import Point, plan_points
from marble.pareto.runs import Source, read_sources
from marble.run import check_output
from marble.setup import check_config
from marble.storage import write_atomic

RESULT = "pareto.json"
Started = Callable[[Sequence[Point]], Callable[[Point], None]]
"""Is told what will be measured; what it returns is told of each point that has been."""


def draw_front(
    paths: Sequence[Path],
    out: Path,
    *,
    rewards: Sequence[str] = (),
    scales: Sequence[float] = (),
    checkpoints: bool = False,
    soups: int = 0,
    pairs: Sequence[tuple[str, str]] = (),
    changes: Sequence[str] = (),
    anew: bool = False,
    started: Started = lambda points: lambda point: None,
) -> dict[str, Any]:
    """Measure the models of runs and write `pareto.json` and `pareto.html`; what was measured before is kept.

    Args:
        paths: run folders, or those of comparisons.
        out: folder of the front; new, or that of an earlier one, which is gone on with.
        rewards: two or three whose front is wanted; aesthetic and alignment, or the first two, if none is named.
        scales: strengths of each run's change of the model, besides 0 and 1.
        checkpoints: whether those that were kept are points.
        soups: mixtures of each pair of specialists.
        pairs: runs to mix, by label or folder.
        changes: settings laid over the runs' configs, as `--evaluation.prompts`, `24`.
        anew: measure again what the runs and an earlier call have measured; broken off, it starts over.
        started: for a display of progress.

    Returns:
        The content of `pareto.json`.

    Raises:
        MarbleError: runs, rewards or weights will not do.
    """
    _check_folder(out)
    sources = read_sources(paths, changes)
    if not sources.finished:
        reasons = "".join(f"\n  {label}: {why}" for label, why in sources.left_out.items())
        raise MarbleError(f"a front needs two points, the base model and a finished run; there is none:{reasons}")
    labelled = [(_label(one, sources.finished), _label(other, sources.finished)) for one, other in pairs]
    points = plan_points(sources.finished, scales=scales, checkpoints=checkpoints, soups=soups, pairs=labelled)
    check_config(sources.finished[0].config)
    measurer = Measurer(sources.finished, out, anew=anew)
    chosen = choose_rewards(measurer.names, rewards)
    measured = measurer.measure(points, started(points))
    content = describe(measured, chosen) | {"left_out": sources.left_out}
    write_atomic(out / RESULT, json.dumps(content))
    write_page(out, content, [record.text for record in measurer.prompts[:SHOWN]])
    return content


def _check_folder(out: Path) -> None:
    if not (out / "points").is_dir():
        check_output(out)


def _label(given: str, sources: Sequence[Source]) -> str:
    """The label of the run that is called so, or lies there."""
    for source in sources:
        if given == source.label or Path(given).resolve() == source.run.path.resolve():
            return source.label
    labels = [source.label for source in sources]
    raise MarbleError(
        f'--soup: "{given}" is none of the finished runs.{nearest(given, labels)} They are {", ".join(labels)}'
    )
