"""Scores remembered by what was judged, for evaluation: the base model's images are the same in every run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from marble.prompts import Record
from marble.rewards.base import WHERE, Reward

log = logging.getLogger("marble")

VARIABLE = "MARBLE_CACHE"
"""Environment variable: the folder that scores are kept in, or `off`."""


class ScoreCache:
    """A SQLite file of scores, by a hash of image, prompt with targets, reward, revision and settings.

    Several processes may use it. One that cannot be read or written is done without.
    """

    def __init__(self, file: Path) -> None:
        """Open or make `file`."""
        self._connection: sqlite3.Connection | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(file, timeout=5, isolation_level=None)
            self._connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            self._give_up(f"{file}: {error}")

    @classmethod
    def default(cls) -> ScoreCache | None:
        """That of this user, or none if `MARBLE_CACHE` is `off`."""
        folder = os.environ.get(VARIABLE) or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "marble")
        return None if folder == "off" else cls(Path(folder).expanduser() / "scores.sqlite")

    @staticmethod
    def holds(reward: Reward) -> bool:
        """Whether this reward's scores may be remembered: it says so, and what it is."""
        return bool(getattr(reward, "cached", False) and getattr(reward, "revision", ""))

    @staticmethod
    def keys(reward: Reward, images: Tensor, records: Sequence[Record], frames: int | None) -> list[bytes]:
        """One for each image; of a groupwise reward also of all the others it was judged with."""
        kind = type(reward)
        what = [
            version("marble-diffusion"),  # preprocessing and rules are ours
            getattr(reward, "origin", ""),
            kind.__module__,
            kind.__qualname__,
            reward.name,
            reward.revision,
            {name: value for name, value in getattr(reward, "settings", {}).items() if name not in WHERE},
            frames,
        ]
        own = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
        each = []
        for image, record in zip(images, records, strict=True):
            one = own.copy()
            one.update(
                json.dumps([list(image.shape), str(image.dtype), asdict(record)], sort_keys=True, default=str).encode()
            )
            one.update(image.contiguous().numpy().tobytes())
            each.append(one.digest())
        if not getattr(reward, "groupwise", False):
            return each
        together = hashlib.sha256(b"".join(each)).digest()
        return [hashlib.sha256(key + together).digest() for key in each]

    def get(self, keys: Sequence[bytes]) -> list[float] | None:
        """The scores of all keys, or nothing if one is unknown."""
        if self._connection is None:
            return None
        try:
            found = [
                self._connection.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone() for key in keys
            ]
        except sqlite3.Error as error:
            self._give_up(str(error))
            return None
        return None if None in found else [row[0] for row in found]

    def put(self, keys: Sequence[bytes], scores: Sequence[float]) -> None:
        """Remember scores; those that are no numbers are left out."""
        if self._connection is None:
            return
        rows = [(key, score) for key, score in zip(keys, scores, strict=True) if score == score]
        try:
            self._connection.execute("BEGIN")
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        log.warning("scores are not remembered: %s (%s: another folder, or off)", reason, VARIABLE)
        self._connection = None
