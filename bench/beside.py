"""What judging beside the sampling hides: the same images and rewards, in line and in threads, in one process.

    .venv/bin/python bench/beside.py [--images 96] [--rounds 3]

Samples the embedded model and judges its pictures, four times as large, by OCR (on the processor that also samples) and
by a reward that waits as one on another machine does, 0.25 s for a portion of eight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from marble.mini.prompts import words
from marble.policy import Policy
from marble.prompts import PromptBatch, Record
from marble.rewards import Judging, Reward
from marble.rewards.ocr import OCR
from marble.rollout import collect


class LargeOCR(OCR):
    """OCR of pictures at 256 pixels, which is where it reads."""

    batch = 8

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """As OCR does."""
        return super().score(F.interpolate(images, scale_factor=4, mode="nearest"), records)


class Elsewhere(Reward):
    """Waits, and needs no processor here."""

    name = "elsewhere"
    batch = 8

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """Brightness, after a while."""
        time.sleep(0.25)
        return images.float().mean(dim=(1, 2, 3))


def epoch(policy: Policy, batch: PromptBatch, rewards: list[Reward], steps: int) -> tuple[float, float, float, Tensor]:
    """Seconds of one epoch, of its sampling, hidden; and the scores."""
    began = time.perf_counter()
    judging = Judging(rewards, batch.records, batch.group_ids)
    collect(policy, batch, steps=steps, images_per_call=batch.group_size, seen=judging.add)
    sampled = time.perf_counter()
    scores = judging.table().scores
    return time.perf_counter() - began, sampled - began, judging.hidden, scores


def main() -> None:
    """Print seconds an epoch by where the rewards judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    policy = Policy.from_pretrained("mini", call={"max_sequence_length": 12})
    policy.add_adapters(rank=4, alpha=8, seed=0)
    group = 8
    batch = PromptBatch(words("train")[: args.images // group], group, list(range(args.images)))
    made: dict[str, list[Reward]] = {"ocr": [LargeOCR()], "elsewhere": [Elsewhere()], "both": [LargeOCR(), Elsewhere()]}
    for rewards in made.values():
        for reward in rewards:
            reward.prepare()
    print(f"{'rewards':10} {'in line':>9} {'beside':>9} {'ratio':>7} {'sampling':>9} {'hidden':>8}   seconds an epoch")
    for name, rewards in made.items():
        rows: dict[int, list[tuple[float, float, float]]] = {0: [], 1: []}
        seen: list[Tensor] = []
        for _ in range(args.rounds):
            for workers in (0, 1):
                for reward in rewards:
                    reward.workers = workers
                *row, scores = epoch(policy, batch, rewards, args.steps)
                rows[workers].append((row[0], row[1], row[2]))
                seen.append(scores)
        assert all(torch.equal(seen[0].nan_to_num(-1), scores.nan_to_num(-1)) for scores in seen)
        inline, beside = (statistics.median(row[0] for row in rows[workers]) for workers in (0, 1))
        sampling, hidden = (statistics.median(row[i] for row in rows[1]) for i in (1, 2))
        print(f"{name:10} {inline:9.2f} {beside:9.2f} {beside / inline:7.2f} {sampling:9.2f} {hidden:8.2f}")


if __name__ == "__main__":
    main()
