"""Threads in which a reward judges: beside other work, and given up on when it hangs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError


class Job:
    """One call of a reward: `work()` is done at some time, or given up on."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        """Not yet begun."""
        self._work: Callable[[], Tensor] | None = work
        self.began: float | None = None  # seconds of time.perf_counter
        self.ended: float | None = None
        self.scores: Tensor | None = None
        self.error: str = ""
        self.given_up = False
        self.done = threading.Event()

    def run(self) -> None:
        """Do the work; whatever it raises is kept as a message."""
        self.began, work, self._work = time.perf_counter(), self._work, None  # it holds the pictures
        if work is None:
            return
        try:
            self.scores = work()
        except MarbleError as error:
            self.error = str(error)
        except BaseException as error:  # a reward's mistake, whatever it is, must not end the run
            self.error = f"{type(error).__name__}: {error}"
        self.ended = time.perf_counter()
        self.done.set()

    def fail(self, reason: str) -> None:
        """End it without a score."""
        self.error, self.given_up, self._work = reason, True, None
        self.done.set()


class Crew:
    """The threads of one reward. They end when there is nothing to do; one that hangs is left behind.

    Threads are daemons, so that one that hangs does not keep the process from ending.
    """

    def __init__(self, workers: int) -> None:
        """At most `workers` at once."""
        self.workers = workers
        self._lock = threading.Lock()
        self._pending: deque[Job] = deque()
        self._busy = 0
        self._hanging = 0

    @classmethod
    def of(cls, reward: Any, workers: int) -> Crew:
        """The crew of `reward`: it remembers from batch to batch which calls have not come back."""
        try:
            crew = vars(reward).setdefault("_crew", cls(workers))
        except TypeError:  # an object without a place for it
            return cls(workers)
        crew.workers = workers
        return crew

    def submit(self, job: Job) -> None:
        """Have `job` done; it fails at once if every thread hangs."""
        with self._lock:
            if self._hanging >= self.workers:
                job.fail("an earlier call has not come back")
                return
            self._pending.append(job)
            if self._busy < self.workers:
                self._busy += 1
                device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
                threading.Thread(target=self._work, args=(device,), daemon=True).start()

    def wait(self, job: Job, timeout: float) -> None:
        """Wait for `job`, which may take `timeout` seconds from when it begins; then it is given up on."""
        while not job.done.wait(0.02 if job.began is None else max(0.0, job.began + timeout - time.perf_counter())):
            if job.began is None or time.perf_counter() < job.began + timeout:
                continue
            with self._lock:
                if job.done.is_set():
                    return
                job.fail(f"did not answer within {timeout:g} s")
                self._hanging += 1
                if self._hanging >= self.workers:
                    while self._pending:
                        self._pending.popleft().fail("an earlier call has not come back")

    def _work(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # is a thread's own
        while True:
            with self._lock:
                if not self._pending:
                    self._busy -= 1
                    return
                job = self._pending.popleft()
            job.run()
            with self._lock:
                if job.given_up:
                    self._hanging -= 1
