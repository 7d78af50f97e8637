"""Makes a comparison's cells: each a `marble train` in a process of its own, several side by side.

A finished cell is never made again; a broken one goes on from its newest checkpoint. Every process has a fixed number
of threads, so that cells neither starve each other nor depend on how many are at work.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from marble.compare.folder import Cell
from marble.compare.sameness import incidental_of
from marble.config import Config, dump_config
from marble.errors import MarbleError
from marble.run import Run
from marble.storage import write_atomic

_USER_ERROR = 2
"""Exit code of `marble train` after a message that begins with `marble: `."""
_ERROR_LENGTH = 400
"""Characters kept of a broken cell's error."""
_LOOK_EVERY = 0.2
"""Seconds between looks at the processes."""


@dataclass
class Place:
    """How many cells run side by side, and on what each."""

    jobs: int
    threads: int
    devices: list[str]  # GPUs by number, one a cell in turn; empty on the CPU


@dataclass
class Work:
    """A cell at work."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int  # which of the jobs
    log_start: int  # bytes of the log written by earlier attempts
    began: float

    def share(self) -> tuple[int, float]:
        """Updates made, and the share of the budget that is spent."""
        row = last_metrics(self.cell.folder)
        made, budget = row.get("update", 0), self.cell.config.budget
        shares = [made / budget.updates] if budget.updates else []
        if budget.minutes:
            shares.append(row.get("time", {}).get("elapsed", 0.0) / 60 / budget.minutes)
        return made, min(1.0, max(shares))


Watcher = Callable[[list[Work], list[Cell], list[Cell]], None]
"""Told about cells at work, those waiting, and those that have ended since the last time."""


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of a run's `metrics.jsonl`; empty if there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            return row
    return {}


def choose_place(config: Config, jobs: int | None, threads: int | None) -> Place:
    """One cell a GPU where the model goes to a GPU, or else as many single-threaded cells as there are cores.

    A GPU that the configuration names by its number is the only one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = _gpus() if config.model.device in ("auto", "cuda") else []
    if devices:
        jobs = jobs or len(devices)
        return Place(jobs, threads or max(1, cores // jobs), devices)
    if config.model.device.startswith("cuda:"):
        return Place(jobs or 1, threads or max(1, cores // (jobs or 1)), [])
    threads = threads or 1
    return Place(jobs or max(1, cores // threads), threads, [])


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


class Crew:
    """Makes cells until all have been tried once. Ctrl-C lets those at work finish their epoch; twice, it does not."""

    def __init__(self, path: Path, place: Place) -> None:
        """For the comparison in `path`; use as a context manager.

        Raises:
            MarbleError: another one, or what it left running, is at work there.
        """
        self.path, self.place = path, place
        self.working: list[Work] = []
        self.asked = 0  # interruptions

    def __enter__(self) -> Crew:
        self._lock = (self.path / ".lock").open("w")  # held by the cells' processes too, should this one be killed
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise MarbleError(f'out: another marble compare is at work in "{self.path}"') from error
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._interrupt) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for work in self.working:  # after an error of our own
            os.kill(work.process.pid, signal.SIGINT)
            work.process.wait()
        self._lock.close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        for work in self.working:
            with suppress(ProcessLookupError):
                os.kill(work.process.pid, signal.SIGINT)

    def make(self, cells: Sequence[Cell], watch: Watcher) -> bool:
        """Make those of `cells` that are not done and may go on; whether none was interrupted."""
        waiting = [cell for cell in cells if not cell.done and not cell.strayed()]
        while self.working or (waiting and not self.asked):
            while waiting and not self.asked and len(self.working) < self.place.jobs:
                self.working.append(self._start(waiting.pop(0)))
            watch(self.working, waiting, self._ended())
            time.sleep(_LOOK_EVERY)
        return not self.asked

    def _start(self, cell: Cell) -> Work:
        folder = cell.folder
        if folder.exists() and not (folder / "config.yaml").exists():  # broken off before it was a run
            shutil.rmtree(folder)
        command = [sys.executable, "-m", "marble", "train"]
        if folder.exists():
            command += ["--resume", str(folder), *_changes(cell, self.place.threads)]
        else:
            config = cell.config.model_copy(update={"threads": self.place.threads})
            write_atomic(cell.beside(".yaml"), dump_config(config))
            command += [str(cell.beside(".yaml")), "--out", str(folder)]
        slot = min({*range(self.place.jobs)} - {work.slot for work in self.working})
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.place.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        if devices := self.place.devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with cell.beside(".log").open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C comes from here alone, and once
                pass_fds=[self._lock.fileno()],
            )
        return Work(cell, process, slot, start, time.monotonic())

    def _ended(self) -> list[Cell]:
        """Cells whose process has ended, each with its record written."""
        ended = []
        for work in list(self.working):
            pid, status, usage = os.wait4(work.process.pid, os.WNOHANG)
            if not pid:
                continue
            work.process.returncode = code = os.waitstatus_to_exitcode(status)
            self.working.remove(work)
            before = work.cell.record
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            record = {
                "seconds": before.get("seconds", 0.0) + time.monotonic() - work.began,
                "memory": max(peak, before.get("memory", 0)),
                "jobs": sorted({*before.get("jobs", []), self.place.jobs}),
                "threads": sorted({*before.get("threads", []), self.place.threads}),
                "error": None if work.cell.done or self.asked else _error(work, code),
            }
            write_atomic(work.cell.beside(".json"), json.dumps(record))
            ended.append(work.cell)
        return ended


def _changes(cell: Cell, threads: int) -> list[str]:
    """Arguments of `marble train --resume` for what a broken cell's run is to go on with otherwise."""
    known = incidental_of(Run(cell.folder).config)
    wanted = incidental_of(cell.config) | {"threads": threads}
    wanted.pop("diagnose_every")  # a run keeps that
    pairs = [(f"--{name}", json.dumps(value)) for name, value in wanted.items() if known.get(name) != value]
    return [part for pair in pairs for part in pair]


def _error(work: Work, code: int) -> str:
    """The last that a broken cell said: marble's own message whole, of anything else the last line."""
    with work.cell.beside(".log").open("rb") as log:
        log.seek(work.log_start)
        text = log.read().decode("utf-8", errors="replace").strip()
    if code < 0:
        cause = "; memory may have run out" if -code == signal.SIGKILL else ""
        return f"ended by signal {-code} ({signal.Signals(-code).name}){cause}"
    if code == _USER_ERROR and (said := [*re.finditer(r"^marble: ", text, re.MULTILINE)]):
        text = " ".join(text[said[-1].end() :].split())
    return (text.splitlines() or [f"ended with exit code {code}"])[-1][:_ERROR_LENGTH]
