"""The plain scenes: a sky, a ground and what stands on it, by place, time and extra."""

from __future__ import annotations

import numpy as np

from marble.mini.render import RGB, Canvas, coverage
from marble.mini.world import Spec

SKIES: dict[str, tuple[RGB, RGB]] = {
    "noon": ((70, 130, 210), (175, 210, 235)),
    "sunset": ((80, 60, 120), (240, 150, 80)),
    "night": ((10, 14, 38), (42, 52, 92)),
    "dawn": ((150, 170, 215), (250, 205, 190)),
    "midday": ((40, 150, 200), (190, 225, 215)),
    "dusk": ((30, 20, 60), (120, 60, 110)),
}
LIGHT: dict[str, tuple[float, float, float]] = {
    "noon": (1.0, 1.0, 1.0),
    "sunset": (0.95, 0.68, 0.58),
    "night": (0.30, 0.34, 0.50),
    "dawn": (0.95, 0.82, 0.80),
    "midday": (1.0, 1.0, 0.96),
    "dusk": (0.52, 0.38, 0.50),
}
GROUNDS: dict[str, RGB] = {
    "beach": (228, 205, 150),
    "desert": (222, 170, 95),
    "forest": (70, 110, 55),
    "mountain": (105, 110, 100),
    "meadow": (110, 170, 70),
    "city": (95, 95, 100),
    "lake": (84, 140, 100),
    "volcano": (92, 78, 74),
    "farm": (190, 165, 80),
    "island": (40, 120, 165),
    "canyon": (196, 104, 66),
    "glacier": (205, 225, 238),
}
SUNS: dict[str, tuple[float, int, RGB]] = {
    "noon": (12, 6, (255, 245, 190)),
    "midday": (11, 7, (255, 250, 215)),
    "sunset": (-4, 9, (255, 205, 110)),
    "dawn": (-2, 7, (255, 225, 190)),
}
"""Height of the sun (pixels; from the horizon, if negative), its radius and colour; there is a moon at other times."""
CLOUDS: dict[str, RGB] = {
    "noon": (245, 248, 250),
    "sunset": (250, 200, 175),
    "night": (92, 98, 128),
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
    if spec.extra == "kites":
        _kites(canvas, rng, horizon)
    if spec.extra == "rain":
        _rain(canvas, rng)


def _sky_lights(canvas: Canvas, spec: Spec, rng: np.random.Generator, variety: float, horizon: float) -> None:
    x = canvas.size * (0.5 + 0.35 * variety * rng.uniform(-1, 1))
    if spec.time not in SUNS:
        for _ in range(10):
            star = np.hypot(canvas.x - rng.uniform(2, 62), canvas.y - rng.uniform(2, horizon - 8)) - 0.6
            canvas.paint(coverage(star), (220, 220, 235))
        canvas.paint(coverage(np.hypot(canvas.x - x, canvas.y - 13) - 5.5), (232, 232, 215))
    else:
        y, r, colour = SUNS[spec.time]
        y = horizon + y if y < 0 else y
        glow = np.clip(1 - np.hypot(canvas.x - x, canvas.y - y) / (3.2 * r), 0, 1) * 0.55
        canvas.paint(glow * (canvas.y < horizon), colour)
        canvas.paint(coverage(np.hypot(canvas.x - x, canvas.y - y) - r), colour)


def _clouds(canvas: Canvas, spec: Spec, rng: np.random.Generator, horizon: float) -> None:
    colour = CLOUDS[spec.time]
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


def _kites(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    for colour in ((235, 70, 60), (60, 90, 220), (250, 200, 40)):
        x, y = rng.uniform(9, 55), rng.uniform(8, horizon - 16)
        tail = np.maximum(np.abs(canvas.x - x - np.sin((canvas.y - y) / 2.5)) - 0.5, np.abs(canvas.y - y - 8) - 5)
        canvas.paint(coverage(tail), colour)
        canvas.paint(coverage((np.abs(canvas.x - x) * 1.3 + np.abs(canvas.y - y) - 4.5) * 0.7), colour)


def _rain(canvas: Canvas, rng: np.random.Generator) -> None:
    for _ in range(16):
        x, y = rng.uniform(2, 62), rng.uniform(2, 58)
        drop = np.maximum(np.abs(canvas.x - x + (canvas.y - y) * 0.35) - 0.55, np.abs(canvas.y - y) - 3)
        canvas.paint(coverage(drop) * 0.8, (225, 235, 250))


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


def _lake(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    x, y = 32 + rng.uniform(-8, 8), (horizon + canvas.size) / 2 + 1
    water = np.hypot((canvas.x - x) / 2.3, canvas.y - y) - 8.5
    canvas.paint(coverage(water), np.array([62, 130, 195]) * light)
    ripples = (np.sin((canvas.y - y) * 1.9 + np.sin(canvas.x / 6)) > 0.55) & (water < -1.5)
    canvas.paint(ripples * 0.55, np.array([205, 232, 245]) * np.maximum(light, 0.4))


def _volcano(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    x, height = 32 + rng.uniform(-12, 12), rng.uniform(24, 32)
    down = canvas.y - (horizon - height)
    cone = np.maximum((np.abs(canvas.x - x) - 4 - 0.72 * down) * 0.8, np.maximum(-down, canvas.y - horizon))
    canvas.paint(coverage(cone), np.array([98, 72, 68]) * light)
    lava = np.maximum(np.abs(canvas.x - x - 1.5 * np.sin(down / 3)) - 1.8 - 0.05 * down, np.maximum(-down, down - 17))
    canvas.paint(coverage(lava), (255, 110, 40))
    for dx, dy, r in ((0, -4, 3.5), (4, -8, 4.5), (9, -12, 5.0)):
        puff = np.hypot(canvas.x - x - dx, canvas.y - (horizon - height) - dy) - r
        canvas.paint(coverage(puff) * 0.75, np.array([150, 145, 150]) * np.maximum(light, 0.4))


def _farm(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    rows = (np.sin((canvas.x - 32) / (1.2 + 0.16 * (canvas.y - horizon).clip(0))) > 0.2) & (canvas.y > horizon + 2)
    canvas.paint(rows * 0.6, np.array([120, 100, 45]) * light)
    x, width, height = rng.uniform(16, 48), rng.uniform(8, 10), rng.uniform(13, 17)
    wall = np.maximum(np.abs(canvas.x - x) - width, np.maximum(horizon - height - canvas.y, canvas.y - horizon - 3))
    canvas.paint(coverage(wall), np.array([178, 52, 46]) * light)
    up = canvas.y - (horizon - height - 8)
    roof = np.maximum((np.abs(canvas.x - x) - 1.4 * up) * 0.58, up - 8)
    canvas.paint(coverage(roof), np.array([92, 70, 66]) * light)
    door = np.maximum(np.abs(canvas.x - x) - 2.8, np.maximum(horizon - 5 - canvas.y, canvas.y - horizon - 3))
    canvas.paint(coverage(door), np.array([240, 232, 214]) * np.maximum(light, 0.4))


def _island(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    crest = (np.sin((canvas.y - horizon) * 1.3 + np.sin(canvas.x / 5)) > 0.8) & (canvas.y > horizon + 1)
    canvas.paint(crest * 0.4, np.array([200, 230, 240]) * light)
    x, y = rng.uniform(18, 46), horizon + 7
    sand = np.hypot((canvas.x - x) / 2.2, canvas.y - y) - 6.5
    canvas.paint(coverage(np.maximum(sand, canvas.y - y)), np.array([236, 212, 150]) * light)
    lean = rng.uniform(-0.25, 0.25)
    stem = np.abs(canvas.x - x - lean * (y - 6 - canvas.y)) - 1.1
    canvas.paint(
        coverage(np.maximum(stem, np.maximum(canvas.y - y + 5, y - 24 - canvas.y))), np.array([120, 84, 52]) * light
    )
    top = x + lean * 18
    for side in (-1, -0.45, 0.45, 1):
        bend = 6 * np.abs(side) * ((canvas.x - top) / 9) ** 2 + (1 - abs(side)) * -5
        leaf = np.maximum(np.abs(canvas.y - (y - 24) - bend) - 1.5, np.abs(canvas.x - top - side * 5) - 5)
        canvas.paint(coverage(leaf), np.array([52, 140, 66]) * light)


def _canyon(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    gap = 32 + rng.uniform(-7, 7)
    for side, width in ((-1, rng.uniform(9, 14)), (1, rng.uniform(9, 14))):
        away = side * (canvas.x - gap)
        wall = np.maximum(width - away - 0.12 * (horizon - canvas.y), np.maximum(horizon - 26 - canvas.y, 0 * away))
        mask = coverage(np.maximum(wall, canvas.y - horizon - 1))
        canvas.paint(mask, np.array([186, 92, 58]) * light)
        canvas.paint(mask * (np.sin(canvas.y * 1.15) > 0.45), np.array([222, 146, 96]) * light)


def _glacier(canvas: Canvas, rng: np.random.Generator, horizon: float, light: np.ndarray) -> None:
    for _ in range(5):
        x, width, height = rng.uniform(4, 60), rng.uniform(6, 11), rng.uniform(12, 26)
        lean, up = rng.uniform(-0.2, 0.2), horizon - canvas.y
        ice = np.maximum((np.abs(canvas.x - x - lean * up) - width * (1 - up / height)) * 0.85, -up - 2)
        canvas.paint(coverage(ice), np.array([176, 214, 240]) * np.maximum(light, 0.35))
        shade = np.maximum(ice, x + lean * up - canvas.x)
        canvas.paint(coverage(shade), np.array([118, 168, 214]) * np.maximum(light, 0.35))


_FEATURES = {
    "beach": _beach,
    "desert": _desert,
    "forest": _forest,
    "mountain": _mountain,
    "meadow": _meadow,
    "city": _city,
    "lake": _lake,
    "volcano": _volcano,
    "farm": _farm,
    "island": _island,
    "canyon": _canyon,
    "glacier": _glacier,
}
