"""GenEval: are the objects there that were asked for, in the right number, colour and place.

Ghosh et al. 2023. Mask2Former finds COCO's objects, CLIP names their colours, and three scores are made of one verdict:
partial credit to train on, the benchmark's accuracy, and a strict one. See `logic` for what they count, `detector`
and `colours` for how pixels become objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.geneval.logic import Asked, Verdict
from marble.rewards.geneval.referee import Referee, Rules, find_referee
from marble.rewards.model import Dtype, ModelReward

__all__ = ["Accuracy", "GenEval", "StrictAccuracy"]

_FACTS = Facts(
    model="facebook/mask2former-swin-small-coco-instance (objects), openai/clip-vit-large-patch14 (colours)",
    preprocessing="objects: bilinear until the shorter side has 800 or the longer one 1333 pixels, zeros to a multiple "
    "of 32, ImageNet's mean and deviation; colours: the object before #999999, cut to its box, shorter side 224 "
    "bicubic, centre, CLIP's mean and deviation",
    scale="",
    applies="prompts whose targets name objects among COCO's 80 classes, and colours among GenEval's ten if any",
    licence="Mask2Former: MIT in its repository, `other` on the hub; CLIP: MIT",
    hacks="isolated, catalogue-like objects on plain ground are found most surely; backgrounds, style and realism "
    "earn nothing; a colour may be spread over the whole object until it looks painted. The reference's detector is "
    "mmdet's training of the same network, so numbers are near published ones, not equal",
)


class _GenEval(ModelReward):
    """What the three scores share: settings, networks, verdicts."""

    batch = 16
    """The detector sees pictures of 800 pixels, whatever their own size."""
    pays_in_part: bool = False

    def __init__(
        self,
        *,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        detector_revision: str | None = None,
        clip: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        margin: float = 0.1,
        shortest_side: int = 800,
        longest_side: int = 1333,
        published_position_bug: bool = False,
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """As GenEval has it.

        Args:
            detector: hub repository or folder of a Mask2Former for COCO's instances.
            detector_revision: branch, tag or commit on the hub.
            clip: hub repository or folder of the CLIP that names colours.
            clip_revision: branch, tag or commit on the hub.
            threshold: detections with higher scores count, in [0, 1].
            counting_threshold: the same for prompts of the task `counting`.
            max_objects: of a class, the best so many are looked at.
            margin: share of two boxes' sizes by which their centres must be apart, at least 0.
            shortest_side: pixels of the shorter side of what the detector sees.
            longest_side: pixels that its longer side may have.
            published_position_bug: pay half for a wrong place, as the published training code does by a slip; partial
                credit alone has it.
            device: where the networks run.
            dtype: precision of the CLIP; the detector's is single.
        """
        super().__init__(device=device, dtype=dtype)
        for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
            if not 0 <= value <= 1:
                raise MarbleError(f"{self.name}: settings.{name} must be from 0 to 1, got {value}")
        if not 0 <= margin < float("inf"):
            raise MarbleError(f"{self.name}: settings.margin must be at least 0, got {margin}")
        for name, count in (("max_objects", max_objects), ("shortest_side", shortest_side)):
            if count < 1:
                raise MarbleError(f"{self.name}: settings.{name} must be at least 1, got {count}")
        if longest_side < shortest_side:
            raise MarbleError(
                f"{self.name}: settings.longest_side must be at least shortest_side, got {longest_side} and "
                f"{shortest_side}"
            )
        if published_position_bug and not self.pays_in_part:
            raise MarbleError(f"{self.name}: settings.published_position_bug is of geneval alone; leave it out")
        self.published_position_bug = published_position_bug
        self._sources = (detector, detector_revision, clip, clip_revision)
        self._sides = (shortest_side, longest_side)
        self._rules = Rules(threshold, counting_threshold, max_objects, margin)
        self.revision = f"{detector}@{detector_revision or 'main'} + {clip}@{clip_revision or 'main'}"

    def applies(self, record: Record) -> bool:
        """Only where objects and colours that GenEval knows are asked for."""
        return Asked.of(record.targets) is not None

    def load(self) -> Referee:
        """The referee that all three scores of these settings share.

        Raises:
            MarbleError: a network cannot be had, or does not fit.
        """
        referee = find_referee(
            *self._sources, device=self.device, dtype=self.dtype, sides=self._sides, rules=self._rules
        )
        self.revision = referee.revision
        return referee

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32 of `[N, 3, H, W]` uint8."""
        verdicts = self.parts.verdicts(images, records)
        return torch.tensor([self.mark(verdict) for verdict in verdicts])

    def mark(self, verdict: Verdict) -> float:
        """What a verdict is worth by this score."""
        raise NotImplementedError


class GenEval(_GenEval):
    """Partial credit, to train on: each object's number, colour and place is a term, and the mean counts.

    A number earns `1 − |wanted − found| / wanted`, below 0 if more than twice as many are found; colours and places
    are looked at only where the number is right, and earn 0 where it is not.
    """

    name = "geneval"
    pays_in_part = True
    about = "partial credit for objects, numbers, colours and places, by Mask2Former and CLIP; at most 1"
    facts = replace(
        _FACTS,
        scale="mean of terms of partial credit: at most 1, below 0 where more than twice as many objects are found; "
        "within a prompt's images it spreads by about 0.3 for Stable Diffusion 3.5 (a rough estimate)",
    )

    def mark(self, verdict: Verdict) -> float:
        """Partial credit."""
        return verdict.published_credit if self.published_position_bug else verdict.credit


class Accuracy(_GenEval):
    """The benchmark's own score: all that was asked for is there, and nothing excluded.

    More objects than asked for are right, except in the task `counting`, which excludes them.
    """

    name = "geneval-accuracy"
    accuracy_above = 1.0
    about = "1 if all objects, numbers, colours and places are right as the benchmark counts, else 0"
    facts = replace(_FACTS, scale="0 or 1, as the benchmark's `correct`")

    def mark(self, verdict: Verdict) -> float:
        """Right or not."""
        return verdict.accuracy


class StrictAccuracy(_GenEval):
    """All that was asked for is there in exactly the number asked for."""

    name = "geneval-strict-accuracy"
    accuracy_above = 1.0
    about = "1 if all objects are there in exactly the number asked for, coloured and placed right, else 0"
    facts = replace(_FACTS, scale="0 or 1; at most the accuracy, except where a prompt excludes another class")

    def mark(self, verdict: Verdict) -> float:
        """Exactly right or not."""
        return verdict.strict
