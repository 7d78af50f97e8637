"""What rewards by networks have in common: where they run, in what precision, loaded once, sized to memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.memory import find_device, forget, is_out_of_memory
from marble.prompts import Record
from marble.rewards.base import Reward

log = logging.getLogger("marble")

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelReward(Reward):
    """A reward by a network.

    A subclass writes `load`, which returns whatever `judge` needs, and `judge`. `load` asks `loaded` (or a function of
    its own under `functools.cache`) for networks, so that two rewards on the same weights share them.
    """

    cached = True

    def __init__(self, *, device: str = "auto", dtype: Dtype = "float32") -> None:
        """To run on `device` (auto: this process's GPU or the CPU) in `dtype`; scores are always single precision."""
        self.device_name, self.dtype = device, getattr(torch, dtype)
        self._parts: Any = None
        self._most: int | None = None  # images at once that fit into memory, once some did not

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return find_device(self.device_name, "settings.device", shared=True)

    @property
    def parts(self) -> Any:
        """What `load` returned, loaded on first use."""
        if self._parts is None:
            import transformers

            transformers.utils.logging.disable_progress_bar()
            self._parts = self.load()
        return self._parts

    def prepare(self) -> None:
        """Load the network.

        Raises:
            MarbleError: it cannot be had, or does not fit.
        """
        _ = self.parts

    def load(self) -> Any:
        """Load what `judge` needs, on `device` in `dtype`.

        Raises:
            MarbleError: it cannot be had, or does not fit.
        """
        raise NotImplementedError

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """As `score`, with `images` on `device`, without gradients; fewer at a time if memory is short."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32 on the CPU, in halves if memory does not suffice (all at once if groupwise).

        Raises:
            MarbleError: memory does not suffice for one image.
        """
        _ = self.parts
        scores, start = [], 0
        while start < len(images):
            stop = len(images) if self._most is None else min(start + self._most, len(images))
            try:
                scores.append(self.judge(images[start:stop].to(self.device), records[start:stop]).float().cpu())
                start = stop
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if stop - start == 1 or self.groupwise:
                    raise MarbleError(
                        f"out of memory while judging {stop - start} images: use settings.dtype or settings.device"
                    ) from error
            forget(self.device)  # out here the error no longer holds on to its tensors
            self._most = (stop - start + 1) // 2
            log.warning(
                "reward %s: out of memory with %d images at once; going on with at most %d",
                self.name,
                stop - start,
                self._most,
            )
        return torch.cat(scores) if scores else torch.empty(0)
