"""Random numbers by label: every draw comes from (seed, what for, which), never from a shared stream.

A resumed run therefore needs no saved generator state to go on exactly where it was.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every label."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *labels))
