"""COCO objects in pictures, by Mask2Former: from pixels to scores, boxes and masks as GenEval had them of mmdet.

Preprocessing and post-processing follow mmdet 2's test pipeline of `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco` and
its `MaskFormerFusionHead.instance_postprocess`, github.com/open-mmlab/mmdetection. The weights are those that
transformers can load, trained on the same data by Mask2Former's authors: scores are near those of mmdet's, not equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from marble.errors import MarbleError, first_line
from marble.prompts.coco import NAMES
from marble.rewards.checkpoint import fetch, weights_revision
from marble.rewards.clip import load_preprocessing, named, settle
from marble.rewards.geneval.logic import Box
from marble.rewards.images import normalise, resize

MOST = 100
"""Pairs of query and class that are looked at, an image."""
MULTIPLE = 32
"""Of which the network's input must have its sides."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object in one picture."""

    name: str
    score: float
    """In [0, 1]: the class's probability times how sure the mask is of its pixels."""
    box: Box
    mask: Tensor  # [H, W] bool


class Detector:
    """A Mask2Former for instances of COCO's 80 classes, in single precision: it reckons with coordinates."""

    def __init__(
        self,
        network: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        sides: tuple[int, int],
        revision: str = "",
    ) -> None:
        """Pictures are resized until their shorter side has `sides[0]` pixels or their longer one `sides[1]`."""
        self.network = network
        self.mean, self.std, self.sides, self.revision = mean, std, sides, revision

    def detect(self, images: Tensor, least: float = 0.0) -> list[list[Detection]]:
        """What stands in pictures of one size.

        Args:
            images: `[N, 3, H, W]` uint8, on the network's device.
            least: detections with scores up to this may be left out.

        Returns:
            Of each image at most `MOST` detections, best first.
        """
        height, width = images.shape[-2:]
        scale = min(self.sides[0] / min(height, width), self.sides[1] / max(height, width))
        inner = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        inputs = normalise(resize(images, inner, "bilinear"), self.mean, self.std)
        padded = tuple(-(-side // MULTIPLE) * MULTIPLE for side in inner)
        inputs = F.pad(inputs, (0, padded[1] - inner[1], 0, padded[0] - inner[0]))
        outputs = self.network(pixel_values=inputs)
        return [
            _instances(classes, masks, padded, inner, (height, width), least)
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        ]


def _instances(
    classes: Tensor, masks: Tensor, padded: tuple[int, ...], inner: tuple[int, int], size: tuple[int, int], least: float
) -> list[Detection]:
    """Of one picture's class logits `[Q, 81]` and mask logits `[Q, h, w]`."""
    chances = classes.float().softmax(dim=-1)[:, :-1]
    chance, place = chances.flatten().topk(min(MOST, chances.numel()))
    # a score is at most its chance: masks that cannot pass need not be drawn
    chance, place = chance[chance > least], place[chance > least]
    queries, index = (place // chances.shape[1]).unique(return_inverse=True)
    if not len(queries):
        return []
    drawn = F.interpolate(masks[queries].float()[None], size=padded, mode="bilinear", align_corners=False)
    drawn = drawn[:, :, : inner[0], : inner[1]]
    drawn = F.interpolate(drawn, size=size, mode="bilinear", align_corners=False)[0]
    inside = drawn > 0
    area = inside.flatten(1).sum(dim=1)
    sure = (drawn.sigmoid() * inside).flatten(1).sum(dim=1) / (area + 1e-6)
    x0, x1 = _extent(inside.any(dim=1))
    y0, y1 = _extent(inside.any(dim=2))
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float().tolist()
    scores, order = (chance * sure[index]).sort(descending=True, stable=True)
    labels = (place % chances.shape[1])[order]
    return [
        Detection(NAMES[label], score, tuple(boxes[query]), inside[query])
        for label, score, query in zip(labels.tolist(), scores.tolist(), index[order].tolist(), strict=True)
        if score > least
    ]


def _extent(line: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row of `[D, L]` bool begins to be true and where it has ended; all of it if it never is."""
    whole = line.to(torch.uint8)
    return whole.argmax(dim=1), line.shape[1] - whole.flip(1).argmax(dim=1)


@functools.cache
def load_detector(source: str, revision: str | None, device: torch.device, sides: tuple[int, int]) -> Detector:
    """The detector of a hub repository or a folder in the format of transformers; loaded once.

    Of its `preprocessor_config.json` only mean and deviation count: the published one makes squares of 384 pixels of
    whatever it gets, with which GenEval never worked.

    Args:
        source: hub repository or folder.
        revision: branch, tag or commit on the hub.
        device: where it runs.
        sides: see `Detector`.

    Raises:
        MarbleError: it cannot be had, is no Mask2Former, lacks weights, or knows other than COCO's 80 classes in order.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    kind: Any = Mask2FormerForUniversalSegmentation
    name, local = "settings.detector", Path(source).expanduser().is_dir()
    config = named(name, fetch, source, "config.json", revision)
    preprocessing = named(name, load_preprocessing, source, revision)
    try:
        with torch.random.fork_rng(devices=[]):  # a run's own random numbers stay as they were
            loaded: Any = kind.from_pretrained(
                config.parent if local else source,
                revision=revision,
                local_files_only=local,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers makes of a folder that is not what it should be
        raise MarbleError(f'{name}: cannot load "{source}": {first_line(error)}') from error
    network, found = loaded
    # surplus ones are no harm: older folders also hold what is reckoned anew
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("criterion."))
    if missing:
        raise MarbleError(f'{name}: "{source}" is not whole: it has no {", ".join(missing[:8])}')
    named(name, check_labels, network.config.id2label, source)
    weights = (
        (sorted(config.parent.glob("*.safetensors")) or sorted(config.parent.glob("*.bin"))) if local else [config]
    )
    settled = settle(network, device, torch.float32)
    return Detector(settled, preprocessing.mean, preprocessing.std, sides, weights_revision(source, *weights))


def check_labels(labels: dict[int, str], source: str) -> None:
    """Whether a detector's class n is COCO's class n; it may call it otherwise (tvmonitor, mouse, LABEL_3).

    Raises:
        MarbleError: there are not 80, or one of GenEval's names stands in another place.
    """
    if len(labels) != len(NAMES):
        raise MarbleError(
            f'"{source}" must know COCO\'s {len(NAMES)} classes, it knows {len(labels)}; '
            "take one trained for instances (…-coco-instance)"
        )
    for place, label in labels.items():
        if label in NAMES and NAMES[int(place)] != label:
            raise MarbleError(f'class {place} of "{source}" must be {NAMES[int(place)]} as in COCO, it is {label}')
