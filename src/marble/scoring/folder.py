"""The folder of an evaluation: what it is of, its finished portions, and its result. Each file is whole or absent.

Of several processes the main one alone reads and writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.evaluation import SHOWN_PROMPTS, save_sample
from marble.rewards import RewardTable
from marble.run import check_output
from marble.scoring.differences import differences
from marble.storage import write_atomic

SETUP, RESULT = "setup.json", "evaluation.json"


class Folder:
    """`setup.json`, `parts/SIDE_NNN.json`, `samples/SIDE/PPP_I.png` and `evaluation.json`."""

    def __init__(self, path: Path) -> None:
        """At `path`; nothing is read or written yet."""
        self.path = path

    def enter(self, setup: dict[str, Any]) -> dict[str, Any] | None:
        """Check that an evaluation of `setup` can be made or gone on with here; its result if it is finished.

        Raises:
            MarbleError: the folder holds another evaluation (says what differs) or something else, or cannot be
                written.
        """
        if not (self.path / SETUP).is_file():
            check_output(self.path)
            return None
        self._check(setup, [key for key in setup if key != "revisions"])
        result = self.path / RESULT
        return json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None

    def begin(self, setup: dict[str, Any]) -> None:
        """Say what the portions are of.

        Raises:
            MarbleError: those that are there were judged by rewards of other revisions.
        """
        if (self.path / SETUP).is_file():
            self._check(setup, ["revisions"])
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / SETUP, json.dumps(setup, indent=1))
        for part in ("parts", "samples"):
            (self.path / part).mkdir(exist_ok=True)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result; returns it."""
        write_atomic(self.path / RESULT, json.dumps(result))
        return result

    def read(self, side: str, number: int, rows: int, names: list[str]) -> RewardTable | None:
        """A finished portion's table of `rows` images, None if it is not finished."""
        try:
            content = json.loads(self._part(side, number).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if content["names"] != names or len(content["scores"]) != rows:
            return None
        scores = [[float("nan") if score is None else score for score in row] for row in content["scores"]]
        return RewardTable.of(
            names, torch.tensor(scores, dtype=torch.float64), torch.tensor(content["wanted"], dtype=torch.bool)
        )

    def write(self, side: str, number: int, table: RewardTable, first: int, samples: Tensor) -> None:
        """Finish a portion.

        Args:
            side: whose.
            number: of the portion.
            table: of its images.
            first: its first prompt among all.
            samples: `[prompts, images, 3, H, W]` uint8 to be looked at, maybe of no prompts.
        """
        folder = self.path / "samples" / side
        folder.mkdir(exist_ok=True)
        for p, images in enumerate(samples[: max(0, SHOWN_PROMPTS - first)], first):
            for i, pixels in enumerate(images):
                save_sample(pixels, folder, p, i)
        rows = [[None if score != score else score for score in row] for row in table.scores.tolist()]
        content = {"names": table.names, "scores": rows, "wanted": table.wanted.tolist()}
        write_atomic(self._part(side, number), json.dumps(content))

    def _part(self, side: str, number: int) -> Path:
        return self.path / "parts" / f"{side}_{number:03d}.json"

    def _check(self, setup: dict[str, Any], keys: list[str]) -> None:
        known = json.loads((self.path / SETUP).read_text(encoding="utf-8"))
        if unlike := differences(known, setup, keys):
            raise MarbleError(
                f'out: "{self.path}" holds another evaluation; choose another folder or delete it first:\n  '
                + "\n  ".join(unlike)
            )
