"""Timing side by side, and the peak of allocated tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every arm, `repeats` times in turn, each first once unmeasured.

    Rounds go back and forth, so that a machine that slows down in the course of a round favours no arm.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for repeat in range(repeats):
        names = list(arms) if repeat % 2 == 0 else list(arms)[::-1]
        for name in names:
            _wait(device)
            began = time.perf_counter()
            arms[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, and the middle half of the values."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """`summary` of the ratios round by round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made by `work` took at any one time, temporaries included."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.autograd.profiler import profile

    with profile(use_device=None, profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
