"""How well the reward `ocr` reads: words drawn in several fonts, plain and spoiled, and pictures without text.

.venv/bin/python bench/ocr_reading.py [--words 40] [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from marble.prompts import Record
from marble.prompts.text_rendering import text_rendering
from marble.rewards.ocr import OCR

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "STIXGeneral")


def drawn(text: str, font: str, size: int, rng: np.random.Generator, *, spoiled: bool) -> Tensor:
    """A picture `[3, size, size]` with `text` anywhere in it; spoiled: on texture, turned, blurred and noisy."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    height = size // 8
    while True:
        face = ImageFont.truetype(str(folder / f"{font}.ttf"), height)
        _, _, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, font=face)
        if right < 0.9 * size:
            break
        height -= 1
    light, dark = rng.integers(150, 256, 3), rng.integers(0, 80, 3)
    ink, paper = (light, dark) if rng.random() < 0.5 else (dark, light)
    ground = np.broadcast_to(paper.astype(float), (size, size, 3))
    if spoiled:
        coarse = rng.normal(0, 12, (16, 16, 3))
        ground = ground + np.kron(coarse, np.ones((size // 16, size // 16, 1)))
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    layer = Image.new("L", (size, size))
    place = (int(rng.integers(4, int(max(5, size - right)))), int(rng.integers(4, int(size - bottom))))
    ImageDraw.Draw(layer).text(place, text, font=face, fill=255)
    if spoiled:
        layer = layer.rotate(float(rng.uniform(-4, 4)), Image.Resampling.BICUBIC)
    picture.paste(tuple(int(c) for c in ink), mask=layer)
    if spoiled:
        picture = picture.filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.array(picture) + (rng.normal(0, 8, (size, size, 3)) if spoiled else 0)
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(2, 0, 1)


def textless(size: int, rng: np.random.Generator) -> Tensor:
    """A picture of noise, a gradient, blobs or rings."""
    kind = rng.integers(4)
    down, across = np.mgrid[:size, :size] / size
    if kind == 0:
        pixels = rng.normal(128, rng.uniform(5, 90), (size, size, 3))
    elif kind == 1:
        pixels = 128 + 127 * np.sin(across[..., None] * rng.normal(0, 6, 3) + down[..., None] * rng.normal(0, 6, 3))
    else:
        picture = Image.new("RGB", (size, size), tuple(int(c) for c in rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(1, 6))):
            x, y, reach = (int(v) for v in rng.integers(size // 16, size // 2, 3))
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            box = (x, y, x + reach, y + reach)
            draw.ellipse(box, **({"fill": colour} if kind == 2 else {"outline": colour, "width": 5}))
        pixels = np.array(picture)
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(2, 0, 1)


def main() -> None:
    """Print the share read exactly, by size and state, and what pictures without text scored."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--textless", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    texts = [record.targets["text"] for record in text_rendering("train")]
    chosen = [str(text) for text in rng.choice(sorted(set(texts)), args.words, replace=False)]
    reward = OCR()
    reward.prepare()
    pairs = [(text, font) for text in chosen for font in FONTS]
    records = [Record(text, "drawn", {"text": text}) for text, _ in pairs]
    for size in (256, 512):
        for spoiled in (False, True):
            images = torch.stack([drawn(text, font, size, rng, spoiled=spoiled) for text, font in pairs])
            began = time.perf_counter()
            scores = reward.score(images, records)
            each = (time.perf_counter() - began) / len(images)
            state = "spoiled" if spoiled else "plain"
            exact = (scores == 1).float().mean().item()
            print(f"{size} px, {state:8} {len(pairs)} texts: {exact:.1%} exact, {1000 * each:.0f} ms each")
        pictures = torch.stack([textless(size, rng) for _ in range(args.textless)])
        wanted = [Record(str(text), "drawn", {"text": str(text)}) for text in rng.choice(chosen, args.textless)]
        scores = reward.score(pictures, wanted)
        above = int((scores > 0).sum())
        print(f"{size} px, without text {args.textless}: {above} scored above 0, at most {scores.max():.3f}")


if __name__ == "__main__":
    main()
