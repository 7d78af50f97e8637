"""Threads for work that must not hold up a server: they are daemons, so that none keeps the process from ending."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

log = logging.getLogger("marble")

Made = TypeVar("Made")


class Call(Generic[Made]):
    """Work that waits for a thread; `done` gets what it makes, or what it raises."""

    def __init__(self, work: Callable[[], Made]) -> None:
        """Made in the event loop that is to be told."""
        self.work: Callable[[], Made] | None = work
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Made] = self.loop.create_future()
        self.abandoned = False  # nobody waits any more

    def run(self) -> None:
        """Do it, in any thread."""
        work, self.work = self.work, None
        if self.abandoned or work is None:
            return
        try:
            self._tell(self.done.set_result, work())
        except BaseException as error:  # whatever it is, it must not end the thread
            error.__traceback__ = error.__context__ = error.__cause__ = None  # their frames would hold on to images
            self._tell(self.done.set_exception, error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _tell(self, settle: Callable[[Any], None], outcome: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(lambda: None if self.done.done() else settle(outcome))
        except RuntimeError:  # the server has stopped
            log.debug("an answer came after the end")


class Lane:
    """A queue and the threads that work on it, in order."""

    def __init__(self, name: str, threads: int = 1) -> None:
        """Started."""
        self._waiting: queue.Queue[Call[Any] | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def length(self) -> int:
        """Calls waiting."""
        return self._waiting.qsize()

    def submit(self, work: Callable[[], Made]) -> Call[Made]:
        """Have it done, after what was submitted before."""
        call = Call(work)
        self._waiting.put(call)
        return call

    async def do(self, work: Callable[[], Made]) -> Made:
        """Have it done and wait for it."""
        call = self.submit(work)
        try:
            return await call.done
        finally:
            call.abandoned = True

    def close(self, seconds: float) -> None:
        """Let the threads end; after `seconds` those that hang are left behind."""
        until = time.monotonic() + seconds
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            call.run()
            del call  # or what it made would be kept until the next one comes
