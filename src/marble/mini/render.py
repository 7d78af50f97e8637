"""Draws a `Spec` as 64×64 pixels. Whatever the caption leaves open is drawn from `rng`.

Everything is a coverage mask in [0, 1] painted over a canvas; masks come from signed distances in pixels
(negative inside), so edges are antialiased without supersampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marble.mini.font import GLYPH_HEIGHT, stamp
from marble.mini.world import RGB, Spec, World

VIGNETTE = 0.38
"""How much darker the corners of a perfect picture are than its centre."""


class Canvas:
    """A float picture `[S, S, 3]` in 0–255 with pixel-centre coordinates `x`, `y` `[S, S]`."""

    def __init__(self, size: int) -> None:
        self.size = size
        axis = np.arange(size, dtype=np.float32) + 0.5
        self.x, self.y = np.meshgrid(axis, axis)
        self.pixels = np.zeros((size, size, 3), dtype=np.float32)

    def gradient(self, top: RGB, bottom: RGB, start: float = 0.0, stop: float | None = None) -> None:
        """Fill rows `start` to `stop` (pixels) from colour `top` to colour `bottom`."""
        stop = self.size if stop is None else stop
        share = np.clip((self.y - start) / max(stop - start, 1.0), 0, 1)[..., None]
        colour = np.asarray(top, np.float32) * (1 - share) + np.asarray(bottom, np.float32) * share
        inside = ((self.y >= start) & (self.y < stop))[..., None]
        self.pixels = np.where(inside, colour, self.pixels)

    def paint(self, mask: np.ndarray, colour: RGB | np.ndarray) -> None:
        """Lay `colour` over the picture where `mask` `[S, S]` in [0, 1] says."""
        cover = mask[..., None]
        self.pixels = self.pixels * (1 - cover) + np.asarray(colour, np.float32) * cover

    def finish(self, vignette: float, centre: tuple[float, float]) -> np.ndarray:
        """The picture with its light falling off from `centre` (shares of the size), as uint8."""
        dx, dy = self.x / self.size - centre[0], self.y / self.size - centre[1]
        light = 1 + 0.06 - vignette * 2 * (dx**2 + dy**2)
        return np.clip(self.pixels * light[..., None], 0, 255).astype(np.uint8)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Signed distance in pixels → antialiased coverage in [0, 1]."""
    return np.clip(0.5 - distance, 0, 1)


def _circle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(dx, dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    slope = 0.8944  # the two sides fall two pixels for each one they widen
    side = (np.abs(dx) * 2 - (dy + r)) * 0.5 * slope
    return np.maximum(side, dy - 0.9 * r)


def _cross(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    ax, ay = np.abs(dx), np.abs(dy)
    bar = 0.34 * r
    return np.minimum(np.maximum(ax - r, ay - bar), np.maximum(ax - bar, ay - r))


def _diamond(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return (np.abs(dx) + np.abs(dy) - 1.1 * r) * 0.7071


def _ring(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.abs(np.hypot(dx, dy) - 0.75 * r) - 0.25 * r


def _heart(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    ax = np.abs(dx)
    lobes = np.hypot(ax - 0.46 * r, dy + 0.38 * r) - 0.52 * r
    corner = np.maximum(ax + dy - 0.815 * r, ax - dy - 0.84 * r) * 0.7071  # tangent to the lobes
    point = np.maximum(corner, -(dy + 0.38 * r))
    return np.minimum(lobes, point)


def _bar(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(dx) - r, np.abs(dy) - 0.42 * r)


def _bow(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum((np.abs(dy) - 0.9 * np.abs(dx)) * 0.7433 - 0.09 * r, np.abs(dx) - r)


SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "heart": _heart,
    "bar": _bar,
    "bow": _bow,
}
"""Shape → signed distance `(dx, dy, r) -> pixels`, where `r` is the nominal radius in pixels."""


@dataclass(frozen=True)
class Spot:
    """Where one object stands, in pixels."""

    x: float
    y: float
    r: float


def _radius(size: str, kind: str, count: int, rng: np.random.Generator) -> float:
    low, high = {2: (9.0, 12.0), 3: (8.0, 10.0)}.get(count, (7.0, 8.5))
    if kind == "attribute":
        low, high = {"small": (7.0, 9.0), "": (11.0, 16.0), "large": (18.0, 22.0)}[size]
    elif count == 1:  # a count gone wrong
        low, high = 9.0, 12.0
    return float(rng.uniform(low, high))


def place_things(world: World, spec: Spec, rng: np.random.Generator, variety: float) -> list[Spot]:
    """Spots for the spec's objects: apart from each other, inside the picture, in the stated relation.

    `variety` in [0, 1] scales how far they stray from the picture's middle.
    """
    size, count = world.size, len(spec.things)
    for attempt in range(300):
        shrink = max(0.65, 0.995**attempt)
        spots: list[Spot] = []
        for thing in spec.things:
            r = _radius(thing.size, spec.kind, count, rng) * shrink
            reach = (size / 2 - r - 3) * (variety if spec.kind == "attribute" else 1.0)
            for _ in range(20):
                spot = Spot(size / 2 + rng.uniform(-1, 1) * reach, size / 2 + rng.uniform(-1, 1) * reach, r)
                if all(max(abs(spot.x - o.x), abs(spot.y - o.y)) > r + o.r + 2 for o in spots):
                    spots.append(spot)
                    break
        if len(spots) == count and (not spec.relation or _related(spots[0], spots[1], spec.relation)):
            return spots
    raise RuntimeError(f"no room for {world.caption(spec)!r}")


def _related(a: Spot, b: Spot, relation: str) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > 1.3 * abs(across)


def render(
    world: World, spec: Spec, rng: np.random.Generator, *, variety: float = 1.0, vignette: float = VIGNETTE
) -> np.ndarray:
    """Draw `spec`.

    Args:
        world: shapes, palette and fonts to draw with.
        spec: what the caption fixes.
        rng: source of everything that the caption leaves open.
        variety: 0 (always the same middle-of-the-road layout) to 1 (all the room there is).
        vignette: fall-off of the light towards the corners; `VIGNETTE` in a perfect picture.

    Returns:
        uint8 `[64, 64, 3]`.
    """
    canvas = Canvas(world.size)
    if spec.kind == "place":
        from marble.mini.places import draw_place

        draw_place(canvas, spec, rng, variety)
    else:
        pick = int(rng.integers(len(world.backdrops))) if rng.random() < variety else 0
        top, bottom = world.backdrops[pick]
        if rng.random() < 0.5 * variety:
            top, bottom = bottom, top
        canvas.gradient(top, bottom)
        if spec.kind == "word":
            _write(canvas, world, spec, rng, variety)
        else:
            for thing, spot in zip(spec.things, place_things(world, spec, rng, variety), strict=True):
                mask = coverage(SHAPES[thing.shape](canvas.x - spot.x, canvas.y - spot.y, spot.r))
                canvas.paint(mask, world.palette[thing.colour])
    centre = 0.5 + 0.12 * variety * rng.uniform(-1, 1, 2)
    return canvas.finish(vignette, (float(centre[0]), float(centre[1])))


def _write(canvas: Canvas, world: World, spec: Spec, rng: np.random.Generator, variety: float) -> None:
    width = world.letter_pitch * len(spec.word) - world.letter_gap
    height = GLYPH_HEIGHT * world.letter_scale
    free_x, free_y = world.size - width, world.size - height
    left = round(free_x / 2 + rng.uniform(-0.35, 0.35) * variety * free_x)
    top = round(free_y / 2 + rng.uniform(-0.35, 0.35) * variety * free_y)
    mask = np.zeros((world.size, world.size), np.float32)
    for at, letter in enumerate(spec.word):
        x = left + at * world.letter_pitch
        mask[top : top + height, x : x + 5 * world.letter_scale] = stamp(letter, world.letter_scale)
    canvas.paint(mask, world.palette[spec.colour])
