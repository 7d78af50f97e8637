"""One of the two processes of `test_portions.py`; `python -m tests.scoring.other_process …` is the other."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from marble.distributed import leave
from marble.scoring import make_plan, score

PATIENCE = 120  # seconds that one process waits for the other


def scored(number: int, folder: str, model: str, config: str, lora: str) -> None:
    """An evaluation by two processes that meet in `folder`; each is given an output folder of its own."""
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=timedelta(seconds=PATIENCE))
    try:
        score(make_plan(model, config=Path(config), lora=lora, portion=3), Path(folder) / str(number))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scored(1, *sys.argv[1:])
    leave(0)
