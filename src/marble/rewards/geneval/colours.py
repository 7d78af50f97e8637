"""The colour of an object, by CLIP: which of ten colours its class is likeliest called with.

Source: `color_classification` of github.com/djghosh13/geneval, `evaluation/evaluate_images.py`, and the zero-shot
classifier of github.com/LAION-AI/CLIP_benchmark that it calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from marble.prompts.coco import COLOURS
from marble.rewards.clip import Clip, Preprocessing
from marble.rewards.geneval.logic import Box
from marble.rewards.images import center_crop, normalise, resize_shortest

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = 0x99
"""Grey level of what is not the object."""
MOST = 64
"""Crops that are encoded at a time."""


class ColourNamer:
    """Names the colours of objects."""

    def __init__(self, clip: Clip) -> None:
        """By one CLIP."""
        self.clip = clip
        self._texts: dict[str, Tensor] = {}

    def name(self, crops: Sequence[Tensor], classes: Sequence[str]) -> list[str]:
        """`[M]`, each one of the ten colours; see `cosines`."""
        return [COLOURS[best] for best in self.cosines(crops, classes).argmax(dim=1).tolist()]

    def cosines(self, crops: Sequence[Tensor], classes: Sequence[str]) -> Tensor:
        """How near objects are to being called by each colour.

        Args:
            crops: M pictures `[3, h, w]` uint8 of any sizes, see `cut_out`.
            classes: `[M]`, what each shows.

        Returns:
            `[M, 10]` float32 in [−1, 1].
        """
        parts = [torch.empty(0, len(COLOURS))]
        for start in range(0, len(crops), MOST):
            pixels = torch.stack([self.prepare(crop) for crop in crops[start : start + MOST]])
            texts = torch.stack([self._colours_of(name) for name in classes[start : start + MOST]])
            parts.append(torch.einsum("md,mcd->mc", self.clip.images(pixels), texts).cpu())
        return torch.cat(parts)

    def prepare(self, crop: Tensor) -> Tensor:
        """A picture as open_clip prepares it for CLIP: `[3, S, S]` float32 of `[3, h, w]` uint8."""
        usual = self.clip.preprocessing
        assert isinstance(usual, Preprocessing)
        side = self.clip.network.config.vision_config.image_size
        square = center_crop(resize_shortest(crop, side, "bicubic"), (side, side), halves="even")
        return normalise(square, usual.mean, usual.std)

    def _colours_of(self, name: str) -> Tensor:
        """`[10, D]`, the mean direction of a colour's texts; of a class always encoded in the same batch."""
        if name not in self._texts:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            each = self.clip.texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1)
            self._texts[name] = F.normalize(each.mean(dim=1), dim=-1)
        return self._texts[name]


def cut_out(image: Tensor, mask: Tensor, box: Box) -> Tensor:
    """An object before a grey ground, cropped to its box: `[3, h, w]` of `[3, H, W]` uint8 and `[H, W]` bool."""
    x0, y0, x1, y1 = map(int, map(round, box))
    return torch.where(mask, image, BACKGROUND)[:, y0:y1, x0:x1]
