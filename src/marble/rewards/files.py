"""Pictures on disk as rewards want them, and scores of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from marble.errors import MarbleError, first_line
from marble.prompts import Record
from marble.rewards.base import Reward, RewardTable
from marble.rewards.judging import score_images


def read_picture(path: Path) -> Tensor:
    """`[3, H, W]` uint8 of an image in any format and mode, upright; `[F, 3, H, W]` of an animation (GIF, PNG, WebP).

    What is transparent is shown on white, as browsers do.

    Raises:
        MarbleError: there is no such file, or it is not an image.
    """
    if not path.is_file():
        raise MarbleError(f'"{path}" does not exist' if not path.exists() else f'"{path}" is a folder, not an image')
    try:
        with Image.open(path) as image:
            moves = image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False)
            frames = []
            for at in range(image.n_frames if moves else 1):  # type: ignore[attr-defined]
                image.seek(at)
                frames.append(_colours(image))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MarbleError(f'"{path}" is not an image that can be read: {first_line(error)}') from error
    return frames[0] if len(frames) == 1 else torch.stack(frames)


def score_pictures(rewards: Sequence[Reward], pictures: Sequence[Tensor], records: Sequence[Record]) -> RewardTable:
    """Score pictures of any sizes; those of one prompt and one size are a group.

    Args:
        rewards: K rewards.
        pictures: N pictures or videos as `read_picture` gives them.
        records: `[N]`, what each is to show.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        by_shape[picture.shape].append(i)
    scores = torch.full((len(pictures), len(rewards)), torch.nan, dtype=torch.float64)
    wanted = torch.zeros(len(pictures), len(rewards), dtype=torch.bool)
    for rows in by_shape.values():
        some = [records[i] for i in rows]
        distinct = list(dict.fromkeys(some))
        groups = torch.tensor([distinct.index(record) for record in some])
        table = score_images(rewards, torch.stack([pictures[i] for i in rows]).float() / 255, some, groups)
        scores[rows], wanted[rows] = table.scores, table.wanted
    return RewardTable.of([reward.name for reward in rewards], scores, wanted)


def _colours(image: Image.Image) -> Tensor:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = upright.convert("I").point(lambda value: value / 256).convert("L")
    if "A" in upright.getbands() or "transparency" in upright.info:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
