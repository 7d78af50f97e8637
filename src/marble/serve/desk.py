"""One served reward: those who wait for it, and the threads in which it judges."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marble.prompts import Record
from marble.rewards import Reward
from marble.rewards.base import WHERE
from marble.rewards.judging import applies_to, judge
from marble.serve.lane import Call, Lane

log = logging.getLogger("marble")

WAITING = 16
"""Requests that wait for one reward; further ones are told to come again."""
APPLYING = 60.0
"""Seconds that a reward may take to say to which prompts of a request it applies."""
_NOT_OF_THE_MODEL = ("name", "batch", *WHERE)


class FullError(Exception):
    """Too many wait already."""


class JudgingError(Exception):
    """What a reward raised, in one line; not the exception itself, which would hold on to the images."""

    def __init__(self, error: BaseException) -> None:
        """Of any exception."""
        lines = str(error).strip().splitlines()
        super().__init__(f"{type(error).__name__}: {lines[0][:300] if lines else ''}")


class Desk:
    """A reward and its queues: `score` runs in one thread, or in as many as the reward has workers, `applies` in
    another.

    A request is judged in one call and never together with another: what else is in a batch shows in the last bits.
    """

    def __init__(self, reward: Reward, served_as: str) -> None:
        """Start the threads; the reward is prepared already."""
        self.reward, self.served_as = reward, served_as
        self.revision = revision_of(reward)
        self.images, self.seconds = 0, 0.0
        self._lock = threading.Lock()
        self.workers = max(1, getattr(reward, "workers", 0))
        self._judging = Lane(f"reward {reward.name}", self.workers)
        self._applying = Lane(f"reward {reward.name}: applies")

    @property
    def length(self) -> int:
        """Requests waiting."""
        return self._judging.length

    def check_room(self) -> None:
        """See whether another request may wait.

        Raises:
            FullError: no.
        """
        if self.length >= WAITING:
            raise FullError

    def submit(self, images: Tensor, records: list[Record]) -> Call[Tensor]:
        """Have pictures judged, after those of earlier requests.

        Raises:
            FullError: too many wait already.
        """
        self.check_room()
        return self._judging.submit(functools.partial(self._judge, images, records))

    def ask(self, records: list[Record]) -> Call[list[bool]]:
        """Have the reward say which of `records` it can judge.

        Raises:
            FullError: too many wait already.
        """
        if self._applying.length >= WAITING:
            raise FullError
        return self._applying.submit(functools.partial(self._apply, records))

    def facts(self) -> dict[str, Any]:
        """What a client must know, as JSON."""
        reward = self.reward
        return {
            "name": reward.name,
            "served_as": self.served_as,
            "groupwise": bool(getattr(reward, "groupwise", False)),
            "judges_videos": bool(getattr(reward, "judges_videos", False)),
            "cached": bool(getattr(reward, "cached", False) and getattr(reward, "revision", "")),
            "batch": int(getattr(reward, "batch", Reward.batch)),
            "revision": self.revision,
            "about": getattr(reward, "about", ""),
            "needs_prompt": bool(getattr(reward, "needs_prompt", True)),
            "accuracy_above": getattr(reward, "accuracy_above", None),
        }

    def close(self, seconds: float) -> None:
        """Let the threads end; what hangs is left behind."""
        self._applying.close(0.0)
        self._judging.close(seconds)

    def _apply(self, records: list[Record]) -> list[bool]:
        try:
            return applies_to(self.reward, records)
        except BaseException as error:
            raise self._told(error) from None

    def _judge(self, images: Tensor, records: list[Record]) -> Tensor:
        """`[N]` float64; NaN for prompts to which the reward does not apply, whatever the client thinks."""
        began, scores = time.perf_counter(), torch.full((len(records),), torch.nan, dtype=torch.float64)
        fit: list[int] = []
        try:
            fit = [at for at, applies in enumerate(applies_to(self.reward, records)) if applies]
            if len(fit) == len(records):
                return judge(self.reward, images, records, None)
            if fit:
                scores[fit] = judge(self.reward, images[fit], [records[at] for at in fit], None)
            return scores
        except BaseException as error:  # a reward's mistake, whatever it is, must not end its thread
            raise self._told(error) from None
        finally:
            with self._lock:
                self.images += len(fit)
                self.seconds += time.perf_counter() - began

    def _told(self, error: BaseException) -> JudgingError:
        """For the client; the log gets no message, which may quote a prompt."""
        log.warning("reward %s: %s", self.reward.name, type(error).__name__)
        return JudgingError(error)


def revision_of(reward: Reward) -> str:
    """The reward's own with its settings, as scores under other settings are other scores.

    Of the settings only a hash: they may hold a key or an address, and revisions are written down.
    """
    settings = {name: value for name, value in getattr(reward, "settings", {}).items() if name not in _NOT_OF_THE_MODEL}
    own = getattr(reward, "revision", "")
    if not settings:
        return own
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{own} with settings {digest}".strip()


def by_name(desks: Sequence[Desk]) -> dict[str, Desk]:
    """Each under its own name and under the one it was asked for by."""
    return {name: desk for desk in reversed(desks) for name in (desk.served_as, desk.reward.name)}
