"""Reads the miniature world's pictures by rule: which word is written, which objects stand where.

Both readers look for what the renderer draws and know nothing of what was asked for, so a picture can
only pass by showing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy import ndimage

from marble.mini.font import stamp
from marble.mini.render import SHAPES, coverage
from marble.mini.world import World

LETTER_THRESHOLD = 0.56
"""Least correlation with a letter's template at which it counts as read. Noise reaches 0.35."""
COLOUR_RADIUS = 78.0
"""Furthest distance (8-bit RGB) from a palette colour in any of `_LIGHTS` at which a pixel has that colour."""
_LIGHTS = (1.06, 0.88, 0.7)
_MASK = 16  # side of the grid on which outlines are compared
_LEAST_AREA = 28  # pixels; anything smaller is a speck
_LARGEST_SHARE = 0.5
WHOLE = (0.5, 0.8)
"""Overlap with a shape's outline at which an object begins to count, and at which it counts in full."""


@dataclass(frozen=True)
class Found:
    """One object in a picture: what it is, how well it matches that shape (0–1), where its middle is (pixels)."""

    colour: str
    shape: str
    whole: float
    x: float
    y: float


class WordReader:
    """Template matching of the world's letters at their fixed size, anywhere in the picture."""

    def __init__(self, world: World) -> None:
        self.world = world
        margin = world.letter_gap // 2
        templates = torch.stack([torch.from_numpy(stamp(c, world.letter_scale)) for c in world.letters])
        templates = torch.nn.functional.pad(templates, (margin,) * 4)
        templates = templates - templates.mean(dim=(1, 2), keepdim=True)
        self.templates = (templates / templates.flatten(1).norm(dim=1)[:, None, None])[:, None]
        self.area = self.templates.shape[-1] * self.templates.shape[-2]

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> list[str]:
        """The word in each of uint8 `[N, 3, S, S]`; a letter that cannot be made out is left out."""
        pixels = images.float()
        middle = pixels.flatten(2).median(dim=2).values[..., None, None]
        ink = (pixels - middle).norm(dim=1, keepdim=True)  # distance from the commonest colour
        height, width = self.templates.shape[-2:]
        total = torch.nn.functional.avg_pool2d(ink, (height, width), stride=1)
        square = torch.nn.functional.avg_pool2d(ink.square(), (height, width), stride=1)
        spread = ((square - total.square()).clamp_min(0) * self.area).sqrt().clamp_min(8.0 * self.area**0.5)
        match = torch.nn.functional.conv2d(ink, self.templates) / spread  # [N, letters, rows, columns]
        match = torch.nn.functional.max_pool2d(match, 3, stride=1, padding=1)  # a pixel astray is forgiven
        best, letter = match.max(dim=1)
        pitch, length = self.world.letter_pitch, self.world.word_length
        columns = best.shape[2] - pitch * (length - 1)
        line = torch.stack([best[:, :, k * pitch : k * pitch + columns] for k in range(length)])
        where = line.sum(dim=0).flatten(1).argmax(dim=1)
        rows, lefts = where // columns, where % columns
        words = []
        for n, (row, left) in enumerate(zip(rows.tolist(), lefts.tolist(), strict=True)):
            at = [left + k * pitch for k in range(length)]
            words.append(
                "".join(self.world.letters[letter[n, row, x]] for x in at if best[n, row, x] >= LETTER_THRESHOLD)
            )
        return words


class ThingFinder:
    """Finds whole, plainly coloured objects: pixels by colour, then connected pieces by outline."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.colours = list(world.palette)
        known = [np.multiply(rgb, light) for rgb in world.palette.values() for light in _LIGHTS]
        behind = [np.multiply(rgb, light) for pair in world.backdrops for rgb in pair for light in _LIGHTS]
        self.references = torch.tensor(np.array(known + behind), dtype=torch.float32).clamp(max=255)

    @cached_property
    def outlines(self) -> np.ndarray:
        """Every shape of the world on the comparison grid, bool `[shapes, 16, 16]`."""
        return np.stack([_outline(shape) for shape in self.world.shapes])

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> np.ndarray:
        """uint8 `[N, 3, S, S]` → palette index per pixel `[N, S, S]`, −1 where it is none."""
        pixels = images.permute(0, 2, 3, 1).float()
        distance = torch.cdist(pixels.flatten(0, 2), self.references)
        nearest, which = distance.min(dim=1)
        which = torch.where((which < len(self.colours) * len(_LIGHTS)) & (nearest < COLOUR_RADIUS), which, -1)
        return torch.where(which < 0, -1, which // len(_LIGHTS)).view(pixels.shape[:3]).numpy()

    def find(self, images: torch.Tensor) -> list[list[Found]]:
        """The objects in each of uint8 `[N, 3, S, S]`, specks left out, blobs with a `whole` near 0 kept."""
        return [self._find_one(classes) for classes in self.classify(images)]

    def _find_one(self, classes: np.ndarray) -> list[Found]:
        found = []
        for index, area in zip(*np.unique(classes[classes >= 0], return_counts=True), strict=True):
            if area < _LEAST_AREA:
                continue
            labels, _ = ndimage.label(classes == index)
            for label, box in enumerate(ndimage.find_objects(labels), 1):
                piece = labels[box] == label
                if piece.sum() >= _LEAST_AREA:
                    shape, whole = self._outline_match(piece)
                    y, x = ((s.start + s.stop) / 2 for s in box)
                    found.append(Found(self.colours[index], shape, whole, x, y))
        return found

    def _outline_match(self, piece: np.ndarray) -> tuple[str, float]:
        grid = _resample(piece)
        overlap = (self.outlines & grid).sum(axis=(1, 2)) / (self.outlines | grid).sum(axis=(1, 2))
        best = int(overlap.argmax())
        height, width = piece.shape
        square = min(height, width) / max(height, width)
        if piece.sum() > _LARGEST_SHARE * self.world.size**2:  # a wall of colour, not an object
            return self.world.shapes[best], 0.0
        whole = (overlap[best] * min(1.0, square / 0.8) - WHOLE[0]) / (WHOLE[1] - WHOLE[0])
        return self.world.shapes[best], float(np.clip(whole, 0, 1))


def _resample(mask: np.ndarray) -> np.ndarray:
    """A bool mask's bounding box stretched to the comparison grid."""
    rows = ((np.arange(_MASK) + 0.5) * mask.shape[0] / _MASK).astype(int)
    columns = ((np.arange(_MASK) + 0.5) * mask.shape[1] / _MASK).astype(int)
    return mask[rows][:, columns]


@lru_cache
def _outline(shape: str) -> np.ndarray:
    axis = np.arange(128) - 63.5
    x, y = np.meshgrid(axis, axis)
    mask = coverage(SHAPES[shape](x, y, 48.0)) > 0.5
    rows, columns = np.nonzero(mask)
    return _resample(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
