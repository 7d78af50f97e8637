"""Rewards by formula: size as JPEG, sharpness, colourfulness, distance. They look at pictures, never at prompts."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from marble.prompts import Record
from marble.rewards.base import Facts, Reward

QUALITY = 95
"""Of the JPEG whose size counts, as in DDPO."""


class _ByImage(Reward):
    """Each image by itself: the same number whatever else is in the batch, and no more memory than one image takes."""

    revision = "1"
    needs_prompt = False

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float64."""
        return torch.tensor([self._one(image) for image in images], dtype=torch.float64)

    def _one(self, image: Tensor) -> float:
        """Of an image, `[3, H, W]` uint8."""
        raise NotImplementedError


class JPEGSize(_ByImage):
    """How many kB (1000 bytes) a picture takes as JPEG of quality 95: the incompressibility of DDPO.

    Source: Black et al. 2023, "Training diffusion models with reinforcement learning", section 5.1.
    """

    name = "jpeg-size"
    about = "closed form: kB of the picture as JPEG, quality 95; settings.small rewards small files instead"
    facts = Facts(
        model="none",
        preprocessing="none; the size depends on the picture's, so compare only pictures of one size",
        scale="kB (1000 bytes) at quality 95 and Pillow's default chroma subsampling; at 512 × 512 from 5 (one colour) "
        "to 310 (random colours); with settings.small its negative",
        applies="every prompt, which it does not look at",
        licence="none needed",
        hacks="noise and fine texture raise it, whatever is shown; with settings.small a plain colour or a blur does",
    )

    def __init__(self, *, small: bool = False) -> None:
        """Reward large files, or with `small` small ones: minus the size."""
        self.small = small

    def _one(self, image: Tensor) -> float:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format="JPEG", quality=QUALITY)
        size = file.tell() / 1000
        return -size if self.small else size


class Sharpness(_ByImage):
    """Variance of the Laplacian: how much neighbouring pixels differ in brightness.

    The grey picture (Rec. 601, in [0, 1], not rounded) goes through the kernel `[0 1 0; 1 −4 1; 0 1 0]`, mirrored at
    the border without repeating it; the variance is over all pixels. OpenCV's `Laplacian(grey, CV_64F).var()` on 0 to
    255 is 255² = 65025 times as much.
    """

    name = "sharpness"
    about = "closed form: variance of the Laplacian of the grey picture in [0, 1]"
    facts = Facts(
        model="none",
        preprocessing="grey by Rec. 601, [0, 1]; not resized, so a picture made larger counts as less sharp",
        scale="0 (one colour) to 16 (a chequerboard of single pixels); random colours 0.75",
        applies="every prompt, which it does not look at",
        licence="none needed",
        hacks="noise, grain, halos and fine texture raise it far above any sharp photograph; a blurred background, "
        "however right, costs",
    )

    def _one(self, image: Tensor) -> float:
        red, green, blue = image.double() / 255
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        wide = F.pad(grey[None, None], (1, 1, 1, 1), mode="reflect")[0, 0]
        around = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
        return float((around - 4 * grey).var(correction=0))


class Colourfulness(_ByImage):
    """`sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²)` with `rg = R − G` and `yb = (R + G) / 2 − B` on 0 to 255.

    Source: Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images", their third measure.
    """

    name = "colourfulness"
    about = "closed form: Hasler and Süsstrunk's spread and strength of colour; grey 0, vivid about 100"
    facts = Facts(
        model="none",
        preprocessing="none",
        scale="0 (grey) to under 300; its authors found 15 slightly, 33 moderately, 59 quite, 82 highly, 109 "
        "extremely colourful",
        applies="every prompt, which it does not look at",
        licence="none needed",
        hacks="garish, saturated colour, patches of opposite colours, tints and coloured noise raise it",
    )

    def _one(self, image: Tensor) -> float:
        red, green, blue = image.double()
        opponent = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)  # [2, H · W]
        spread, strength = opponent.var(dim=1, correction=0).sum().sqrt(), opponent.mean(dim=1).norm()
        return float(spread + 0.3 * strength)


class Distance(Reward):
    """Of each image, the mean RMS distance to the other images of its prompt, as pictures of 16 × 16 in [0, 1].

    What diversity is where no reward tells it: layout and colours count, fine detail and grain average away.
    """

    name = "diversity"
    revision = "distance-1"
    needs_prompt = False
    groupwise = True
    about = "closed form, groupwise: mean RMS distance of 16 × 16 pictures to the others of the prompt; 0 to 1"
    SIDE = 16

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[G]` float64, 0 for a group of one."""
        if len(images) < 2:
            return torch.zeros(len(images), dtype=torch.float64)
        small = F.adaptive_avg_pool2d(images.double() / 255, self.SIDE).flatten(1)
        distance = (small[:, None] - small[None]).square().mean(dim=2).sqrt()
        return distance.sum(dim=1) / (len(images) - 1)
