"""The plain scenes: a sky, a ground and what stands on it, by place, time and extra."""

from __future__ import annotations

import numpy as np

from marble.mini.render import RGB, Canvas, coverage
from marble.mini.world import Spec

SKIES: dict[str, tuple[RGB, RGB]] = {
    "noon": ((70, 130, 210), (175, 210, 235)),
    "sunset": ((80, 60, 120), (240, 150, 80)),
    "night": ((10, 14, 38), (42, 52, 92)),
}
LIGHT: dict[str, tuple[float, float, float]] = {
    "noon": (1.0, 1.0, 1.0),
    "sunset": (0.95, 0.68, 0.58),
    "night": (0.30, 0.34, 0.50),
}
GROUNDS: dict[str, RGB] = {
    "beach": (228, 205, 150),
    "desert": (222, 170, 95),
    "forest": (70, 110, 55),
    "mountain": (105, 110, 100),
    "meadow": (110, 170, 70),
    "city": (95, 95, 100),
}


def draw_place(canvas: Canvas, spec: Spec, rng: np.random.Generator, variety: float) -> None:
    """Draw `spec.place` at `spec.time` with `spec.extra` onto `canvas`."""
    size = canvas.size
    horizon = size * (0.62 + 0.12 * variety * rng.uniform(-1, 1))
    canvas.gradient(*SKIES[spec.time], 0, horizon)
    _sky_lights(canvas, spec, rng, variety, horizon)
    if spec.extra == "clouds":
        _clouds(canvas, spec, rng, horizon)
    light = np.asarray(LIGHT[spec.time], np.float32)
    ground = np.asarray(GROUNDS[spec.place], np.float32) * light
    canvas.gradient(tuple(ground * 1.1), tuple(ground * 0.72), horizon, size)
    _FEATURES[spec.place](canvas, rng, horizon, light)
    if spec.extra == "birds":
        _birds(canvas, spec, rng, horizon)


def _sky_lights(canvas: Canvas, spec: Spec, rng: np.random.Generator, variety: float, horizon: float) -> None:
    x = canvas.size * (0.5 + 0.35 * variety * rng.uniform(-1, 1))
    if spec.time == "night":
        for _ in range(10):
            star = np.hypot(canvas.x - rng.uniform(2, 62), canvas.y - rng.uniform(2, horizon - 8)) - 0.6
            canvas.paint(coverage(star), (220, 220, 235))
        canvas.paint(coverage(np.hypot(canvas.x - x, canvas.y - 13) - 5.5), (232, 232, 215))
    else:
        y, r, colour = (12, 6, (255, 245, 190)) if spec.time == "noon" else (horizon - 4, 9, (255, 205, 110))
        glow = np.clip(1 - np.hypot(canvas.x - x, canvas.y - y) / (3.2 * r), 0, 1) * 0.55
        canvas.paint(glow * (canvas.y < horizon), colour)
        canvas.paint(coverage(np.hypot(canvas.x - x, canvas.y - y) - r), colour)


def _clouds(canvas: Canvas, spec: Spec, rng: np.random.Generator, horizon: float) -> None:
    colour = {"noon": (245, 248, 250), "sunset": (250, 200, 175), "night": (92, 98, 128)}[spec.time]
    for _ in range(3):
        x, y = rng.uniform(8, 56), rng.uniform(6, horizon * 0.6)
        for dx, r in ((-6, 3.2), (-1, 4.6), (5, 3.4)):
            canvas.paint(coverage(np.hypot(canvas.x - x - dx, (canvas.y - y) * 1.3) - r) * 0.9, colour)


def _birds(canvas: Canvas, spec: Spec, rng: np.random.Generator, horizon: float) -> None:
    colour = (25, 25, 35) if spec.time != "night" else (205, 205, 220)
    for _ in range(3):
        x, y = rng.uniform(8, 56), rng.uniform(8, horizon - 14)
        wings = np.abs((canvas.y - y) + 1.6 * np.sin(np.abs(canvas.x - x) / 5 * np.pi)) - 0.9
        canvas.paint(coverage(np.maximum(wings, np.abs(canvas.x - x) - 5)), colour)


def _beach(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    shore = horizon + 8 + 1.8 * np.sin(canvas.x / 9 + rng.uniform(0, 6))
    canvas.paint(coverage(np.maximum(canvas.y - shore, horizon - canvas.y)), np.array([55, 135, 185]) * light)
    canvas.paint(coverage(np.abs(canvas.y - shore) - 1.0), np.array([240, 245, 245]) * light)


def _desert(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    for step, shade in ((4, 0.92), (11, 0.8)):
        dune = horizon + step + 3.5 * np.sin(canvas.x / 10 + rng.uniform(0, 6))
        canvas.paint(coverage(dune - canvas.y), np.array([222, 170, 95]) * shade * light)


def _forest(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    for x in np.linspace(5, 59, 7) + rng.uniform(-2.5, 2.5, 7):
        top, foot = horizon - rng.uniform(14, 22), horizon + rng.uniform(2, 8)
        tree = np.maximum(np.abs(canvas.x - x) - (canvas.y - top) * 0.27, canvas.y - foot)
        canvas.paint(coverage(tree), np.array([28, 84, 46]) * rng.uniform(0.85, 1.2) * light)


def _mountain(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    for x, height in ((rng.uniform(12, 26), rng.uniform(20, 28)), (rng.uniform(36, 52), rng.uniform(24, 32))):
        slope = np.abs(canvas.x - x) * 1.15 - (canvas.y - (horizon - height))
        canvas.paint(coverage(np.maximum(slope * 0.66, canvas.y - horizon)), np.array([112, 108, 122]) * light)
        snow = np.maximum(slope * 0.66, canvas.y - (horizon - height * 0.62))
        canvas.paint(coverage(snow), np.array([240, 243, 248]) * light)


def _meadow(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    hill = horizon - 4 * np.sin(canvas.x / 12 + rng.uniform(0, 6))
    canvas.paint(coverage(np.maximum(hill - canvas.y, canvas.y - horizon - 6)), np.array([128, 188, 86]) * light)
    for _ in range(9):
        x, y = rng.uniform(3, 61), rng.uniform(horizon + 6, 61)
        colour = np.array([(235, 90, 110), (250, 220, 90), (245, 245, 245)][int(rng.integers(3))])
        canvas.paint(coverage(np.hypot(canvas.x - x, canvas.y - y) - 1.4), colour * light)


def _city(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    night = light[0] < 0.5
    x = 2.0
    while x < 60:
        width, height = rng.uniform(7, 12), rng.uniform(14, 34)
        top = horizon - height
        box = np.maximum(np.maximum(x - canvas.x, canvas.x - x - width), np.maximum(top - canvas.y, canvas.y - horizon))
        canvas.paint(coverage(box), np.array([98, 104, 124]) * rng.uniform(0.75, 1.15) * np.maximum(light, 0.4))
        lamp = (255, 220, 130) if night else (175, 200, 220)
        dots = ((canvas.x - x) % 3.5 > 1.6) & ((canvas.y - top) % 4.5 > 2.4) & (box < -1.4)
        canvas.paint(dots * 0.85, lamp)
        x += width + 1.0


_FEATURES = {
    "beach": _beach,
    "desert": _desert,
    "forest": _forest,
    "mountain": _mountain,
    "meadow": _meadow,
    "city": _city,
}
