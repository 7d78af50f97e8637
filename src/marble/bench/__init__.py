"""Speed and memory of an update, as ratios measured side by side in one process."""

from marble.bench.epoch import bench_epoch
from marble.bench.shapes import SHAPES
from marble.bench.update import bench_update

__all__ = ["SHAPES", "bench_epoch", "bench_update"]
