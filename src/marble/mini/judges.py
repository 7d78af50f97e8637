"""The learned judges of the miniature world: two text-image alignment judges trained apart, one of preference.

All are small two-tower networks over pixels and caption. What they learn from is rendered on the spot:
the right picture, a near miss, the right picture drawn badly, and junk (noise, flat colour, half-and-half
blobs) that must come last for every caption.
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from marble.mini.pairs import blur, draw_spec, noise, wash, wobble
from marble.mini.render import Canvas, render
from marble.mini.world import Spec, World
from marble.storage import load_tree, save_tree

CAPTION_LENGTH = 14
KINDS = ("alignment", "preference", "second")
"""Trained judges by name; `second` is the alignment judge that nothing is ever trained on."""
CLEAN, MISS, MILD, HEAVY, JUNK = range(5)
"""The five pictures of a caption, in the order they are rendered."""


class CaptionIds:
    """Caption → word indices, letters one by one inside quotes; 0 is padding, 1 an unknown word."""

    def __init__(self, world: World) -> None:
        tokens = [*world.grammar_words, *world.letters]
        self.index = {token: i for i, token in enumerate(tokens, start=2)}
        self.size = len(tokens) + 2

    def __call__(self, captions: list[str]) -> Tensor:
        """Indices `[N, 14]`."""
        rows = []
        for caption in captions:
            ids: list[int] = []
            for word in re.findall(r"[A-Za-z]+", caption):
                known = word in self.index and not (word.isupper() and len(word) > 1)
                ids += [self.index[word]] if known else [self.index.get(c, 1) for c in word]
            rows.append((ids + [0] * CAPTION_LENGTH)[:CAPTION_LENGTH])
        return torch.tensor(rows)


@dataclass(frozen=True)
class JudgeShape:
    """What may differ between two judges besides their data."""

    channels: tuple[int, int, int]
    kernel: int  # of the first convolution
    width: int  # of both towers' outputs
    gelu: bool


SHAPES = {
    "alignment": JudgeShape((24, 48, 96), 5, 96, True),
    "preference": JudgeShape((24, 48, 96), 5, 96, True),
    "second": JudgeShape((32, 64, 64), 7, 128, False),
}


class Judge(nn.Module):
    """Two towers: `image(pixels [N,3,S,S] in [0,1])` and `text(ids [N,14])`, each to unit vectors `[N, width]`."""

    def __init__(self, vocabulary: int, shape: JudgeShape) -> None:
        super().__init__()
        a, b, c = shape.channels
        act = nn.GELU if shape.gelu else nn.SiLU
        self.image_tower = nn.Sequential(
            nn.Conv2d(3, a, shape.kernel, stride=2, padding=shape.kernel // 2),
            act(),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            nn.GroupNorm(8, b),
            act(),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            nn.GroupNorm(8, c),
            act(),
            nn.Conv2d(c, c, 3, padding=1),
            act(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.LazyLinear(shape.width * 2),
            act(),
            nn.Linear(shape.width * 2, shape.width),
        )
        self.embed = nn.Embedding(vocabulary, 48, padding_idx=0)
        self.order = nn.Parameter(torch.randn(CAPTION_LENGTH, 48) * 0.1)
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.text_mixer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_tower = nn.Sequential(nn.Linear(CAPTION_LENGTH * 48, 192), act(), nn.Linear(192, shape.width))
        self.scale = nn.Parameter(torch.tensor(2.3))

    def image(self, pixels: Tensor) -> Tensor:
        """Unit vectors of pictures."""
        return F.normalize(self.image_tower(pixels * 2 - 1), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """Unit vectors of captions."""
        states = self.text_mixer((self.embed(ids) + self.order) * (ids > 0)[..., None])
        return F.normalize(self.text_tower((states * (ids > 0)[..., None]).flatten(1)), dim=-1)


def build_judge(world: World, kind: str) -> Judge:
    """An untrained judge of one of `KINDS`."""
    judge = Judge(CaptionIds(world).size, SHAPES[kind])
    judge.image(torch.zeros(1, 3, world.size, world.size))  # gives the lazy layer its size
    return judge


def junk_picture(world: World, rng: np.random.Generator) -> np.ndarray:
    """A picture that no caption deserves: noise, one flat colour, or a blob of two halves. uint8 `[S, S, 3]`."""
    size, colours = world.size, [np.array(c, np.float32) for c in world.palette.values()]
    draw = rng.integers(4)
    if draw == 0:
        return rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    if draw == 1:
        soft = rng.normal(128, 70, (size // 8, size // 8, 3)).clip(0, 255).astype(np.uint8)
        return blur(np.kron(soft, np.ones((8, 8, 1), np.uint8)), 3.0)
    one, two = (colours[i] for i in rng.choice(len(colours), 2, replace=False))
    if draw == 2:
        return np.full((size, size, 3), one, np.float32).astype(np.uint8)
    canvas = Canvas(size)
    canvas.gradient(*world.backdrops[int(rng.integers(len(world.backdrops)))])
    x, y, r = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(10, 24)
    blob = np.hypot(canvas.x - x, canvas.y - y) + 3 * np.sin(canvas.x / 4 + canvas.y / 5) < r
    split = (canvas.x > x) if rng.random() < 0.5 else (canvas.y > y)
    canvas.paint((blob & split).astype(np.float32), one)
    canvas.paint((blob & ~split).astype(np.float32), two)
    return canvas.pixels.astype(np.uint8)


def spoil(image: np.ndarray, rng: np.random.Generator, heavy: bool) -> np.ndarray:
    """One or two of: blurred, bent, washed out, noisy; mildly or heavily. uint8 `[S, S, 3]` both ways."""
    low, high = (0.6, 1.0) if heavy else (0.15, 0.45)
    for way in rng.choice(4, size=int(rng.integers(1, 3)), replace=False):
        s = rng.uniform(low, high)
        if way == 0:
            image = blur(image, 3.0 * s)
        elif way == 1:
            image = wobble(image, rng, 6.0 * s)
        elif way == 2:
            image = wash(image, 1 - 0.85 * s, rng.uniform(-30, 40) * s)
        else:
            image = noise(image, rng, 60 * s)
    return image


def _draw_examples(world: World, seed: int, start: int, count: int) -> tuple[np.ndarray, list[str]]:
    pictures, captions = [], []
    for index in range(start, start + count):
        rng = np.random.default_rng([seed, index])
        spec: Spec = draw_spec(world, rng)
        clean = render(world, spec, rng)
        miss = render(world, world.confuse(spec, rng), rng)
        if rng.random() < 0.3:  # most pictures that the judge will see are drawn less than well
            miss = spoil(miss, rng, heavy=False)
        mild, heavy = spoil(clean, rng, heavy=False), spoil(clean, rng, heavy=True)
        pictures.append(np.stack([clean, miss, mild, heavy, junk_picture(world, rng)]))
        captions.append(world.caption(spec))
    return np.stack(pictures), captions


def _alignment_loss(judge: Judge, text: Tensor, vision: Tensor) -> Tensor:
    """Contrastive both ways; near misses, badly drawn pictures and junk stand among the wrong answers."""
    scale = judge.scale.exp().clamp(max=60)
    count = len(text)
    rows = torch.arange(count)
    pool = vision[:, [CLEAN, MISS, JUNK]].transpose(0, 1).flatten(0, 1)
    to_picture = scale * text @ pool.T
    to_text = scale * vision[:, CLEAN] @ text.T
    same = (text @ text.T) > 0.9999
    same.fill_diagonal_(False)
    to_text = to_text.masked_fill(same, -1e4)
    to_picture[:, :count] = to_picture[:, :count].masked_fill(same, -1e4)
    mild = (scale * vision[:, MILD] @ text.T).masked_fill(same, -1e4)
    loss = F.cross_entropy(to_picture, rows) + F.cross_entropy(to_text, rows) + 0.5 * F.cross_entropy(mild, rows)
    cosine = (vision * text[:, None]).sum(-1)
    near = F.softplus(-scale * (cosine[:, CLEAN] - cosine[:, MISS])).mean()
    worse = sum(F.softplus(-scale * (cosine[:, a] - cosine[:, b])).mean() for a, b in ((MILD, HEAVY), (HEAVY, JUNK)))
    return loss + near + 0.3 * worse


def _preference_loss(judge: Judge, text: Tensor, vision: Tensor) -> Tensor:
    """Bradley-Terry over the pairs of pictures whose order is plain."""
    score = judge.scale.exp() * (vision * text[:, None]).sum(-1)
    pairs = ((CLEAN, MILD), (MILD, HEAVY), (HEAVY, JUNK), (CLEAN, MISS), (MISS, JUNK), (CLEAN, HEAVY))
    return torch.stack([F.softplus(score[:, b] - score[:, a]).mean() for a, b in pairs]).mean()


def train_judge(world: World, kind: str, seed: int, path: Path, *, scale: float = 1.0) -> None:
    """Train one judge and save it with the two raw scores that its reward maps to 0 and 1.

    Args:
        world: what to draw.
        kind: one of `KINDS`.
        seed: of the weights and of the pictures; every judge adds its own constant, so none shares data.
        path: the safetensors file to write.
        scale: share of the full 12 000 captions (with five pictures each) and 900 steps (of 96 captions).
    """
    examples, steps = round(12_000 * scale), max(20, round(900 * scale))
    seed = seed * 10 + KINDS.index(kind)
    torch.manual_seed(seed)
    judge, ids = build_judge(world, kind), CaptionIds(world)
    chunk = 250
    with ProcessPoolExecutor(1) as pool:
        jobs = [
            pool.submit(_draw_examples, world, seed, s, min(chunk, examples - s)) for s in range(0, examples, chunk)
        ]
        parts = [job.result() for job in track(jobs, f"{kind}: pictures")]
    pictures = torch.from_numpy(np.concatenate([p for p, _ in parts])).permute(0, 1, 4, 2, 3).contiguous()
    captions = ids([c for _, part in parts for c in part])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    lossfn = _preference_loss if kind == "preference" else _alignment_loss
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), f"{kind}: training"):
        chosen = torch.randint(len(captions), (96,), generator=generator)
        batch = pictures[chosen].flatten(0, 1).float() / 255
        vision = judge.image(batch).view(96, 5, -1)
        loss = lossfn(judge, judge.text(captions[chosen]), vision)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        judge.eval()
        some = min(400, len(captions))
        vision = judge.image(pictures[:some].flatten(0, 1).float() / 255).view(some, 5, -1)
        cosine = (vision * judge.text(captions[:some])[:, None]).sum(-1)
    low, high = cosine[:, JUNK].mean().item(), cosine[:, CLEAN].mean().item()
    weights = {name: value.half() for name, value in judge.state_dict().items()}
    save_tree(path, {"kind": kind, "weights": weights, "low": low, "high": high})


def load_judge(world: World, path: Path) -> tuple[Judge, float, float]:
    """A trained judge, and the cosines of junk and of right pictures: the 0 and 1 of its reward."""
    saved = load_tree(path)
    judge = build_judge(world, saved["kind"])
    judge.load_state_dict({name: value.float() for name, value in saved["weights"].items()})
    return judge.eval().requires_grad_(False), saved["low"], saved["high"]
