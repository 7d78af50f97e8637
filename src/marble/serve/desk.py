"""One served reward: those who wait for it, and the threads in which it judges."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from marble.prompts import Record
from marble.rewards import Reward
from marble.rewards.judging import judge

log = logging.getLogger("marble")

WAITING = 16
"""Requests that wait for one reward; further ones are told to come again."""
_NOT_OF_THE_MODEL = ("name", "batch", "workers", "timeout", "device")


class FullError(Exception):
    """Too many wait already."""


class Job:
    """One request; `done` gets its scores `[N]` float64, or what the reward raised."""

    def __init__(self, images: Tensor, records: list[Record]) -> None:
        """Made in the event loop that is to be told."""
        self.images, self.records = images, records
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Tensor] = self.loop.create_future()
        self.abandoned = False  # nobody waits any more

    def tell(self, scores: Tensor | None, error: JudgingError | None) -> None:
        """Called from the thread that judged."""
        try:
            self.loop.call_soon_threadsafe(self._settle, scores, error)
        except RuntimeError:  # the server has stopped
            log.debug("an answer came after the end")

    def _settle(self, scores: Tensor | None, error: JudgingError | None) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        elif scores is not None:
            self.done.set_result(scores)


class JudgingError(Exception):
    """What a reward raised, in one line; not the exception itself, which would hold on to the images."""

    def __init__(self, error: BaseException) -> None:
        """Of any exception."""
        lines = str(error).strip().splitlines()
        super().__init__(f"{type(error).__name__}: {lines[0][:300] if lines else ''}")


class Desk:
    """A reward and its queue. `score` runs in one thread, or in as many as the reward has workers.

    A request is judged in one call and never together with another: what else is in a batch shows in the last bits.
    """

    def __init__(self, reward: Reward, served_as: str) -> None:
        """Start the threads; the reward is prepared already."""
        self.reward, self.served_as = reward, served_as
        self.revision = revision_of(reward)
        self.images, self.seconds = 0, 0.0
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"reward {reward.name}", daemon=True)
            for _ in range(max(1, getattr(reward, "workers", 0)))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def length(self) -> int:
        """Requests waiting."""
        return self._waiting.qsize()

    def check_room(self) -> None:
        """See whether another request may wait.

        Raises:
            FullError: no.
        """
        if self.length >= WAITING:
            raise FullError

    def submit(self, images: Tensor, records: list[Record]) -> Job:
        """Have pictures judged, after those of earlier requests.

        Raises:
            FullError: too many wait already.
        """
        self.check_room()
        job = Job(images, records)
        self._waiting.put(job)
        return job

    def facts(self) -> dict[str, Any]:
        """What a client must know, as JSON."""
        reward = self.reward
        return {
            "name": reward.name,
            "served_as": self.served_as,
            "groupwise": bool(getattr(reward, "groupwise", False)),
            "judges_videos": bool(getattr(reward, "judges_videos", False)),
            "cached": bool(getattr(reward, "cached", False)),
            "batch": int(getattr(reward, "batch", Reward.batch)),
            "revision": self.revision,
            "about": getattr(reward, "about", ""),
        }

    def close(self, seconds: float) -> None:
        """Let the threads end; what hangs is left behind."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if not job.abandoned:
                self._judge(job)
            del job  # or its images would be kept until the next one comes

    def _judge(self, job: Job) -> None:
        began, scores, problem = time.perf_counter(), None, None
        try:
            scores = judge(self.reward, job.images, job.records, None)
        except BaseException as error:  # a reward's mistake, whatever it is, must not end its thread
            problem = JudgingError(error)
            log.warning("reward %s: %s", self.reward.name, problem)
        with self._lock:
            self.images += len(job.records)
            self.seconds += time.perf_counter() - began
        job.tell(scores, problem)


def revision_of(reward: Reward) -> str:
    """The reward's own with its settings: scores under other settings are other scores."""
    settings = {name: value for name, value in getattr(reward, "settings", {}).items() if name not in _NOT_OF_THE_MODEL}
    own = getattr(reward, "revision", "")
    return own + (f" {json.dumps(settings, sort_keys=True, default=str)}" if settings else "")


def by_name(desks: Sequence[Desk]) -> dict[str, Desk]:
    """Each under its own name and under the one it was asked for by."""
    return {name: desk for desk in reversed(desks) for name in (desk.served_as, desk.reward.name)}
