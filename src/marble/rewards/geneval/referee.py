"""One detector and one CLIP for GenEval's three scores: each image is looked at once, whichever of them ask."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marble.prompts import Record
from marble.rewards.clip import load_clip
from marble.rewards.geneval.colours import ColourNamer, cut_out
from marble.rewards.geneval.detector import Detection, Detector, load_detector
from marble.rewards.geneval.logic import Asked, Found, Verdict, decide

REMEMBERED = 4096
"""Calls whose verdicts are kept."""

_LOADING = threading.Lock()
_REFEREES: dict[tuple[Any, ...], Referee] = {}


@dataclass(frozen=True)
class Rules:
    """What a verdict depends on besides image, targets and networks."""

    threshold: float
    counting_threshold: float
    max_objects: int
    margin: float


class Referee:
    """Gives verdicts; those of the latest calls are remembered.

    A call is taken from memory whole or not at all, so that it does not depend on what came before in which batch an
    image is judged.
    """

    def __init__(self, detector: Detector, colours: ColourNamer, rules: Rules, revision: str) -> None:
        """By these networks; `revision` says which they are."""
        self.detector, self.colours, self.rules, self.revision = detector, colours, rules, revision
        self.looked_at = 0
        """Images that were not remembered."""
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, list[Verdict]] = OrderedDict()

    def verdicts(self, images: Tensor, records: Sequence[Record]) -> list[Verdict]:
        """Judge pictures.

        Args:
            images: `[N, 3, H, W]` uint8, on the networks' device.
            records: `[N]`, with targets that `Asked.of` can read.
        """
        wanted = [Asked.of(record.targets) for record in records]
        assert all(wanted)
        key = hashlib.sha256(json.dumps([list(images.shape), *map(repr, wanted)]).encode())
        key.update(images.cpu().contiguous().numpy().tobytes())
        with self._lock:  # whoever asks for the same meanwhile waits, and is then told from memory
            known = self._memory.get(key.digest())
            if known is None:
                known = self._look(images, wanted)  # type: ignore[arg-type]
                self._memory[key.digest()] = known
                if len(self._memory) > REMEMBERED:
                    self._memory.popitem(last=False)
            return known

    def _look(self, images: Tensor, wanted: Sequence[Asked]) -> list[Verdict]:
        self.looked_at += len(images)
        rules = self.rules
        least = min(rules.threshold, rules.counting_threshold)
        found = [
            self._counted(detections, one)
            for detections, one in zip(self.detector.detect(images, least), wanted, strict=True)
        ]
        colours = self._colours(images, found, wanted)
        return [
            decide(
                one,
                {name: [Found(d.box, colours.get(id(d))) for d in detections] for name, detections in of_class.items()},
                rules.margin,
            )
            for of_class, one in zip(found, wanted, strict=True)
        ]

    def _counted(self, detections: Sequence[Detection], wanted: Asked) -> dict[str, list[Detection]]:
        """Of each class those that count as found, best first."""
        least = self.rules.counting_threshold if wanted.counting else self.rules.threshold
        found: dict[str, list[Detection]] = {}
        for detection in detections:
            same = found.setdefault(detection.name, [])
            if detection.score > least and len(same) < self.rules.max_objects:
                same.append(detection)
        return found

    def _colours(
        self, images: Tensor, found: Sequence[dict[str, list[Detection]]], wanted: Sequence[Asked]
    ) -> dict[int, str]:
        """The colours that have to be known, by the detection's `id`, all images' in one go."""
        asked: dict[int, Detection] = {}
        crops: list[Tensor] = []
        for image, of_class, one in zip(images, found, wanted, strict=True):
            for clause in one.objects:
                there = of_class.get(clause.name, [])
                if clause.colour is None or len(there) < clause.count:
                    continue
                for detection in there[: clause.count]:
                    if id(detection) not in asked:
                        asked[id(detection)] = detection
                        crops.append(cut_out(image, detection.mask, detection.box))
        named = self.colours.name(crops, [detection.name for detection in asked.values()])
        return dict(zip(asked, named, strict=True))


def find_referee(
    detector: str,
    detector_revision: str | None,
    clip: str,
    clip_revision: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    sides: tuple[int, int],
    rules: Rules,
) -> Referee:
    """The one referee of these settings, whoever asks; its networks are loaded.

    Args:
        detector: hub repository or folder of the detector.
        detector_revision: branch, tag or commit on the hub.
        clip: hub repository or folder of the CLIP that names colours.
        clip_revision: branch, tag or commit on the hub.
        device: where both run.
        dtype: precision of the CLIP.
        sides: pixels of the shorter side of what the detector sees, and those that its longer side may have.
        rules: what counts.

    Raises:
        MarbleError: a network cannot be had, or does not fit.
    """
    key = (detector, detector_revision, clip, clip_revision, device, dtype, sides, rules)
    with _LOADING:  # two threads would load twice, and then not share
        if key not in _REFEREES:
            eyes = load_detector(detector, detector_revision, device, sides)
            colours = load_clip(clip, clip_revision, device, dtype, name="settings.clip")
            revision = f"{eyes.revision} + {colours.revision}"
            _REFEREES[key] = Referee(eyes, ColourNamer(colours), rules, revision)
        return _REFEREES[key]
