"""The runs whose models are compared: read from folders, the unfinished left out, the incomparable refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marble.compare.content import FILE, load_comparison
from marble.compare.sameness import budget_of, different, refuse
from marble.config import Config, make_config, read_config
from marble.errors import MarbleError
from marble.overrides import override
from marble.run import Run

_TERMS = re.compile(
    r"model\.(id|revision|variant|merge|call.*|dtype|quantize)|prompts\..*|rollout\.judged_frames"
    r'|evaluation\.(prompts|images|steps|guidance|scheduler)|reward ".*"'
)
"""Of a comparison's budget, what an evaluation's scores depend on besides the weights."""


@dataclass(frozen=True, eq=False)
class Source:
    """A finished run."""

    label: str  # unlike all others
    method: str  # whose points are one method's: the arm of a comparison, or the label
    run: Run
    config: Config  # as run, with what the command line changed

    @property
    def trained(self) -> list[str]:
        """Names of the rewards it was trained on."""
        return self.run.evaluation()["training_rewards"]

    @property
    def updates(self) -> int:
        """How many were made."""
        return max((row["update"] for row in self.run.metrics()), default=0)


@dataclass
class Sources:
    """What was given, in order."""

    finished: list[Source] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # label → why


def read_sources(paths: Sequence[Path], changes: Sequence[str] = ()) -> Sources:
    """The runs in `paths`, each a run folder or a comparison's, with the settings `changes` laid over their configs.

    Raises:
        MarbleError: one is neither, or is given twice; or runs cannot be compared: their differences are named.
    """
    sources = Sources()
    found = [cell for path in paths for cell in _cells(path, sources.left_out)]
    runs = [Run(path) for path, _, _ in found]  # a MarbleError for the first that is none
    own = _labels([run.path for run in runs])
    labels = [label or name for (_, label, _), name in zip(found, own, strict=True)]
    _refuse_twins(runs, labels)
    for run, label, (_, _, arm) in zip(runs, labels, found, strict=True):
        if "after" not in run.evaluation():
            sources.left_out[label] = f'"{run.path}" is not finished: it has no final evaluation'
            continue
        file = run.path / "config.yaml"
        config = make_config(override(read_config(file), list(changes)), str(file))
        sources.finished.append(Source(label, arm or label, run, config))
    for source in sources.finished[1:]:
        first, why = sources.finished[0], "these runs cannot be put on one front, being made or judged otherwise"
        refuse(different(terms_of(first.config), terms_of(source.config)), first.label, source.label, why)
    return sources


def _cells(path: Path, left_out: dict[str, str]) -> list[tuple[Path, str, str]]:
    """(run folder, label, arm) of a comparison's finished cells, the others added to `left_out`; or of a run alone."""
    if not (path / FILE).is_file():
        return [(path, "", "")]
    arms = load_comparison(path)["arms"]
    cells = [(arm, seed, cell) for arm, row in arms.items() for seed, cell in row["seeds"].items()]
    several = len({seed for _, seed, _ in cells}) > 1
    found = []
    for arm, seed, cell in cells:
        label = f"{arm} seed {seed}" if several else arm
        if cell["status"] == "done":
            found.append((path / cell["folder"], label, arm))
        else:
            left_out[label] = f"{cell['status']} in the comparison"
    return found


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts), default=1) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _refuse_twins(runs: Sequence[Run], labels: Sequence[str]) -> None:
    places = [str(run.path.resolve()) for run in runs]
    if twice := {x for x in places if places.count(x) > 1} or {x for x in labels if labels.count(x) > 1}:
        raise MarbleError(f"runs: {', '.join(sorted(twice))} given more than once")


def terms_of(config: Config) -> dict[str, Any]:
    """Setting → value of all that a score of a run's evaluation depends on, besides the weights.

    Rewards go by their labels, whether trained on or held out; where they judge does not matter.
    """
    terms = {name: value for name, value in budget_of(config).items() if _TERMS.fullmatch(name)}
    return terms | {"model.train": config.model.train}
