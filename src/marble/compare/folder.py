"""The folder of a comparison: what it compares, under one budget, and where each cell lies."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marble.compare.arms import Arm, configure, remarks
from marble.compare.sameness import budget_of, different, incidental_of, refuse, settings_of, tell
from marble.config import Config, make_config, read_config
from marble.errors import MarbleError
from marble.overrides import put
from marble.rewards import load_rewards
from marble.run import Run, check_output
from marble.setup import check_config
from marble.storage import write_atomic

FILE = "comparison.yaml"
_SLUG_BYTES = 80
"""Longest part of a cell's folder name that is its arm's."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: a run folder `cells/ARM-SEED`, and beside it its config, its log and its record."""

    arm: Arm
    seed: int
    folder: Path
    config: Config

    def beside(self, ending: str) -> Path:
        """The file of the cell with this ending."""
        return self.folder.with_name(self.folder.name + ending)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of its processes, empty before the first has ended.

        `seconds`, `memory` in bytes, `error`, and all numbers of `jobs` and `threads` that it was made with.
        """
        path = self.beside(".json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def done(self) -> bool:
        """Whether the run has its final evaluation."""
        path = self.folder / "evaluation.json"
        return path.exists() and "after" in json.loads(path.read_text(encoding="utf-8"))

    def strayed(self) -> str:
        """How the run in the folder differs from what the cell stands for, incidental settings aside; empty if not."""
        if not (self.folder / "config.yaml").is_file():
            return ""
        try:
            found = different(settings_of(Run(self.folder).config), settings_of(self.config))
        except MarbleError as error:
            return f"its run cannot be told from another: {' '.join(str(error).split())}"
        lines = "; ".join(line.strip() for line in tell(found, "its run", "the comparison"))
        return f"its run has another configuration, by hand or by defaults that have changed: {lines}" if found else ""


@dataclass
class Comparison:
    """Arms and their seeds under one configuration.

    Attributes:
        path: the folder.
        values: mapping of the configuration as it was given, defaults left out: arms are laid over it.
        training, held_out: names of its rewards as their scores have them.
        arms, seeds: by the arm's name.
    """

    path: Path
    values: dict[str, Any]
    training: list[str]
    held_out: list[str]
    arms: dict[str, Arm] = field(default_factory=dict)
    seeds: dict[str, list[int]] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The whole configuration."""
        return make_config(self.values)

    @classmethod
    def open(cls, path: Path, values: dict[str, Any] | None) -> Comparison:
        """Go on with the comparison in `path`, or start one there; nothing is written.

        Args:
            path: the folder.
            values: mapping of a configuration; None for the one that is there. Its settings of where and how fast to
                run are taken over, where they are given.

        Raises:
            MarbleError: the folder holds something else, or a comparison under another configuration (named).
        """
        if (path / FILE).is_file():
            known = cls._read(path)
            if values is not None:
                found = different(settings_of(make_config(values)), settings_of(known.config))
                refuse(found, "this call", str(path), "out: the folder compares under another configuration")
                for setting, value in incidental_of(make_config(values), given=True).items():
                    put(known.values, setting, copy.deepcopy(value), str(path))
            return known
        if path.is_dir() and any(path.iterdir()):
            raise MarbleError(f'out: "{path}" holds something else than a comparison: it has no {FILE}')
        check_output(path)
        if values is None:
            raise MarbleError(f'out: there is no comparison in "{path}"')
        config = make_config(values)
        check_config(config)
        names = [reward.name for reward in load_rewards([*config.rewards, *config.held_out_rewards])]
        count = len(config.rewards)
        return cls(path, values, names[:count], names[count:])

    @classmethod
    def _read(cls, path: Path) -> Comparison:
        content = read_config(path / FILE)
        try:
            rows = content["arms"]
            arms = {name: Arm(name, row["overrides"], row["specialist"]) for name, row in rows.items()}
            seeds = {name: list(row["seeds"]) for name, row in rows.items()}
            return cls(path, content["config"], content["training"], content["held_out"], arms, seeds)
        except (KeyError, TypeError, AttributeError) as error:
            raise MarbleError(f"{path / FILE} is not what marble compare writes: {error!r}") from error

    def add(self, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Cell]:
        """Take in arms with seeds, new or known, and give their cells; nothing is written.

        Raises:
            MarbleError: an arm is known by this name with other settings, or is not under the comparison's budget.
        """
        own, cells = budget_of(self.config), []
        for arm in arms:
            known = self.arms.get(arm.name, arm)
            if known != arm:
                raise MarbleError(
                    f'methods: "{arm.name}" is {asdict(known)} in {self.path}, got {asdict(arm)}; give it another '
                    "name: NAME=BASE:setting=value,…"
                )
            budget = budget_of(configure(self.values, arm, seeds[0]))
            refuse(
                different(budget, own),
                f'arm "{arm.name}"',
                "the comparison",
                "methods: all arms have the same model, prompts, images, updates, evaluation and judged rewards",
            )
            self.arms[arm.name] = arm
            self.seeds[arm.name] = sorted({*self.seeds.get(arm.name, []), *seeds})
            cells += [self.cell(arm.name, seed) for seed in seeds]
        self._check_folders()
        return cells

    def _check_folders(self) -> None:
        found: dict[str, str] = {}
        for name in self.arms:
            other = found.setdefault(_slug(name), name)
            if other != name:
                raise MarbleError(
                    f'methods: "{name}" and "{other}" would have the same folder; give one of them another name'
                )

    def cell(self, name: str, seed: int) -> Cell:
        """One cell."""
        folder = self.path / "cells" / f"{_slug(name)}-{seed}"
        return Cell(self.arms[name], seed, folder, configure(self.values, self.arms[name], seed))

    def cells(self) -> list[Cell]:
        """All cells, arm after arm."""
        return [self.cell(name, seed) for name in self.arms for seed in self.seeds[name]]

    def remarks(self) -> list[str]:
        """What the user should know of the arms before waiting for them."""
        cells = [self.cell(name, self.seeds[name][0]) for name in self.arms]
        return [text for cell in cells for text in remarks(self.config, cell.arm, cell.config)]

    def save(self) -> None:
        """Write `comparison.yaml`."""
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        rows = {
            name: {"overrides": arm.overrides, "specialist": arm.specialist, "seeds": self.seeds[name]}
            for name, arm in self.arms.items()
        }
        content = {"config": self.values, "training": self.training, "held_out": self.held_out, "arms": rows}
        write_atomic(self.path / FILE, yaml.safe_dump(content, sort_keys=False))


def _slug(name: str) -> str:
    """An arm's name as part of a file's; of a long one the beginning and a hash."""
    slug = re.sub(r"[^\w.+-]+", ".", name)
    if len(slug.encode()) <= _SLUG_BYTES:
        return slug
    begin = slug.encode()[:_SLUG_BYTES].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
