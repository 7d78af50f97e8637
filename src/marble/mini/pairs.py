"""Pictures and captions that do not quite fit: what the base model learns from, and what rewards are checked on.

A base model trained on perfect pairs would leave reinforcement learning nothing to do. So a share of the
training pictures shows something else than its caption says, and most are drawn a little badly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from marble.mini.render import VIGNETTE, render
from marble.mini.world import Spec, World


@dataclass(frozen=True)
class Imperfection:
    """How badly training pairs are made. Probabilities are per picture."""

    confuse: float = 0.30  # caption and picture differ in one thing (and, as often again, in a second)
    wobble: float = 0.35  # outlines bent by up to `wobble_pixels`
    wobble_pixels: float = 3.0
    blur: float = 0.35  # Gaussian, sigma up to `blur_sigma` pixels
    blur_sigma: float = 1.3
    wash: float = 0.50  # contrast taken down to as little as `wash_floor`
    wash_floor: float = 0.45
    flat_light: float = 0.70  # little or no vignette
    timid: float = 0.65  # the middle-of-the-road layout instead of all the room there is
    timid_variety: float = 0.3


def wobble(image: np.ndarray, rng: np.random.Generator, pixels: float) -> np.ndarray:
    """Bend `image` `[S, S, 3]` by a smooth random displacement of about `pixels`."""
    size = image.shape[0]
    field = ndimage.zoom(rng.normal(size=(2, 5, 5)), (1, size / 5, size / 5), order=3) * pixels * 0.6
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    at = np.stack([rows + field[0], columns + field[1]])
    bent = [ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)]
    return np.stack(bent, axis=-1).astype(np.uint8)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, `sigma` in pixels."""
    return ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)).astype(np.uint8)


def wash(image: np.ndarray, contrast: float, shift: float = 0.0) -> np.ndarray:
    """Pull every pixel towards the picture's mean (`contrast` 1 keeps it, 0 leaves one colour) and shift it."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.clip(mean + (image - mean) * contrast + shift, 0, 255).astype(np.uint8)


def noise(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Add white noise, `sigma` in 8-bit levels."""
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def imperfect_pair(world: World, spec: Spec, rng: np.random.Generator, how: Imperfection) -> tuple[np.ndarray, str]:
    """A picture uint8 `[64, 64, 3]` and the caption it is trained with."""
    drawn = spec
    if rng.random() < how.confuse:
        drawn = world.confuse(drawn, rng)
        if rng.random() < how.confuse:
            drawn = world.confuse(drawn, rng)
    light = rng.uniform(-0.08, 0.12) if rng.random() < how.flat_light else VIGNETTE
    variety = how.timid_variety if rng.random() < how.timid else 1.0
    image = render(world, drawn, rng, variety=variety, vignette=light)
    if rng.random() < how.wobble:
        image = wobble(image, rng, rng.uniform(0.8, how.wobble_pixels))
    if rng.random() < how.blur:
        image = blur(image, rng.uniform(0.5, how.blur_sigma))
    if rng.random() < how.wash:
        image = wash(image, rng.uniform(how.wash_floor, 0.9), rng.uniform(-12, 25))
    return image, world.caption(spec)


def draw_spec(world: World, rng: np.random.Generator) -> Spec:
    """A spec to learn from: 28% plain scenes, 38% objects, 34% words (mostly made-up, for the letters)."""
    kind = rng.choice(["place", "attribute", "position", "count", "word"], p=[0.28, 0.12, 0.14, 0.12, 0.34])
    if kind == "word":
        if rng.random() < 0.25:
            word = world.words[rng.integers(len(world.words))]
        else:
            word = "".join(rng.choice(list(world.letters), world.word_length))
        return Spec("word", word=word, colour=str(rng.choice(list(world.palette))))
    pool = world.pools[kind]
    return pool[rng.integers(len(pool))]
