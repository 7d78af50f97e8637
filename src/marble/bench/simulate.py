"""A solve's messages between real processes on this machine, over gloo: what they hand over, and how long it takes.

Two ways, of which training has the first: all rows to all processes, or each sums its own columns, Grams are added up
and the direction is gathered. Launched by `simulate`; a worker is `python -m marble.bench.simulate FOLDER`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marble.bench.scale import handed, padded, sent
from marble.errors import MarbleError
from marble.gradients.rows import Rows, gram_of

WAYS = ("whole", "scattered")
BLOCK = 49_152
"""Numbers of a parameter: a factor of a LoRA of rank 32 on a layer of width 1536."""
PATIENCE = 600
"""Seconds that processes wait for each other."""


def whole(rows: Rows, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram and the direction `[P]`, as training makes them."""
    rows.sum_over_processes()
    return rows.gram(), torch.cat(rows.mix(mixture))


def scattered(rows: Rows, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """The same, every process with the sum of its own columns alone.

    Columns are exchanged, then added up here. That sends what a reduce-scatter sends. gloo's own `reduce_scatter`
    sends twice that: it is an all-reduce of which a part is kept.
    """
    processes, matrix = dist.get_world_size(), rows.matrix()
    if processes == 1:
        return whole(rows, mixture)
    count, wide = matrix.shape[1], padded(matrix.shape[1], processes)
    own = torch.empty(len(matrix), wide // processes)
    there, come = torch.zeros(wide), torch.empty(wide)
    for row, total in zip(matrix, own, strict=True):
        there[:count] = row
        dist.all_to_all_single(come, there)
        torch.sum(come.view(processes, -1), dim=0, out=total)
    del there, come
    gram = gram_of(own)
    dist.all_reduce(gram)
    direction = torch.empty(wide)
    dist.all_gather(list(direction.split(wide // processes)), mixture.float() @ own)
    return gram, direction[:count]


class Messages:
    """`with Messages() as seen`: bytes handed to collectives in this process, and seconds in them."""

    names = ("all_reduce", "all_to_all_single", "all_gather")

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0

    def __enter__(self) -> Messages:
        self._before = {name: getattr(dist, name) for name in self.names}
        for name, call in self._before.items():
            setattr(dist, name, self._counted(call, 0 if name == "all_reduce" else 1))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._before.items():
            setattr(dist, name, call)

    def _counted(self, call: Callable[..., Any], own: int) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.bytes += arguments[own].numel() * arguments[own].element_size()
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return counted


def simulate(processes: int, sizes: Sequence[tuple[int, int]], repeats: int = 5) -> list[dict[str, Any]]:
    """Both ways between so many processes, a thread each.

    Args:
        processes: W; 1 sends nothing.
        sizes: (P, R) in turn.
        repeats: measured rounds, after one that is not.

    Returns:
        For every size: `parameters`, `rows`, `processes`, `error` (largest relative difference of Gram and direction
        between the two ways), and for each way `handed_bytes`, `message_seconds`, `seconds` (Gram and direction
        included; of the quickest round, both) and `extra_bytes` (the most memory beyond the rows, None where the
        system does not say).

    Raises:
        MarbleError: a process failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps({"sizes": list(sizes), "repeats": repeats}), encoding="utf-8")
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        common = os.environ | {"GLOO_SOCKET_IFNAME": loopback, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "marble.bench.simulate", name]
        workers = []
        try:
            for rank in range(processes):
                with (folder / f"{rank}.log").open("w") as log:
                    workers.append(subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=log, stderr=log))
            while any(worker.poll() is None for worker in workers) and not any(w.poll() for w in workers):
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for rank, worker in enumerate(workers):
            if worker.returncode > 0:
                said = (folder / f"{rank}.log").read_text(encoding="utf-8").strip().splitlines()
                raise MarbleError(f"process {rank} of {processes} failed: {said[-1] if said else worker.returncode}")
        found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The a and b of `seconds = a + b bytes`, by least squares of relative errors, neither below 0.

    Args:
        points: (bytes, seconds), two or more.
    """
    rows = torch.tensor([[1 / seconds, size / seconds] for size, seconds in points], dtype=torch.float64)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    a, b = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
    if a < 0:
        a, b = 0.0, (rows[:, 1].sum() / rows[:, 1].square().sum()).item()
    return a, b


def check(results: Sequence[dict[str, Any]], fitted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Predictions beside measurements of one W: bytes by formula, seconds by a line through the `fitted` sizes.

    Returns:
        For every way and size: `handed_bytes` and `predicted_bytes`, `message_seconds` and `predicted_seconds`,
        whether it was `fitted`, and the prediction's relative `error`.
    """
    lines = []
    for way in WAYS:
        numbers = [(r, (way, r["parameters"], r["rows"], r["processes"])) for r in results]
        points = [(sent(*at), r["ways"][way]["message_seconds"]) for r, at in numbers if fitted(r)]
        a, b = fit(points) if all(seconds > 0 for _, seconds in points) else (0.0, 0.0)  # one process sends nothing
        for r, at in numbers:
            measured, predicted = r["ways"][way], a + b * sent(*at)
            lines.append(
                {
                    "way": way,
                    "processes": r["processes"],
                    "parameters": r["parameters"],
                    "rows": r["rows"],
                    "handed_bytes": measured["handed_bytes"],
                    "predicted_bytes": handed(*at),
                    "message_seconds": measured["message_seconds"],
                    "predicted_seconds": predicted,
                    "latency": a,
                    "bytes_per_second": 1 / b if b else None,
                    "fitted": fitted(r),
                    "error": predicted / measured["message_seconds"] - 1 if predicted else 0.0,
                }
            )
    return lines


# ---- in a worker ---------------------------------------------------------------------------------------


def _worker(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=PATIENCE),
    )
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    found = [_measure(parameters, rows, plan["repeats"]) for parameters, rows in plan["sizes"]]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _measure(parameters: int, count: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    start = torch.randn(count, parameters, generator=generator)
    mixture = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    blocks = [len(block) for block in torch.empty(parameters).split(BLOCK)]
    rows = Rows((count - 1, 1), blocks, dtype=start.dtype, device=start.device, whole=True)
    ways: dict[str, Any] = {}
    answers = []
    for way, work in zip(WAYS, (whole, scattered), strict=True):
        rounds: list[tuple[float, float]] = []
        extra: list[int] = []
        for _ in range(repeats + 1):
            rows.matrix().copy_(start)
            dist.barrier()
            before = _begin_peak()
            with Messages() as seen:
                began = time.perf_counter()
                answer = work(rows, mixture)
                seconds = time.perf_counter() - began
            if before is not None:
                extra.append(_status("VmHWM") - before)
            rounds.append((seconds, seen.seconds))
        answers.append(answer)
        seconds, messages = map(min, zip(*rounds[1:], strict=True))  # what else runs here only adds
        ways[way] = {"handed_bytes": seen.bytes, "seconds": seconds, "message_seconds": messages}
        ways[way]["extra_bytes"] = max(extra[1:]) if extra else None
    pairs = zip(answers[0], answers[1], strict=True)
    error = max(((b.double() - a.double()).norm() / a.double().norm()).item() for a, b in pairs)
    processes = dist.get_world_size()
    return {"parameters": parameters, "rows": count, "processes": processes, "error": error, "ways": ways}


def _begin_peak() -> int | None:
    """Forget the peak so far (Linux); what is taken now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
