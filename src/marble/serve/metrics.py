"""What a server counts, as text that Prometheus reads."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from marble.serve.desk import Desk


class Metrics:
    """Counts of requests; the rest is read off the desks when asked for. Used in the event loop alone."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.requests: Counter[tuple[str, int]] = Counter()  # (endpoint, status)

    def text(self, desks: Sequence[Desk]) -> str:
        """All of it, in Prometheus' text format."""
        names = [desk.reward.name for desk in desks]
        lines = _family(
            "marble_requests_total",
            "counter",
            "Requests by endpoint and status.",
            (({"endpoint": e, "status": str(s)}, n) for (e, s), n in sorted(self.requests.items())),
        )
        for name, kind, meaning, values in (
            ("marble_images_total", "counter", "Images judged.", [desk.images for desk in desks]),
            ("marble_judging_seconds_total", "counter", "Seconds of judging.", [desk.seconds for desk in desks]),
            ("marble_queue_length", "gauge", "Requests waiting.", [desk.length for desk in desks]),
        ):
            lines += _family(name, kind, meaning, (({"reward": r}, v) for r, v in zip(names, values, strict=True)))
        lines += _family("process_resident_memory_bytes", "gauge", "Memory of the process.", [({}, resident_bytes())])
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, rows: Iterable[tuple[dict[str, str], float]]) -> list[str]:
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    for labels, value in rows:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def resident_bytes() -> int:
    """Memory of this process; its highest so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest * (1 if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize()
