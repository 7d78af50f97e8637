"""Images as published scorers want them: resized as PIL does it, bit for bit, but in batches and on any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Method = Literal["bilinear", "bicubic"]

_BITS = 22  # of the fraction of PIL's coefficients: 32 less 8 of the image and 2 against overflow
_REACH = {"bilinear": 1.0, "bicubic": 2.0}
_A = -0.5  # of the bicubic filter; PyTorch's own has -0.75 unless it is antialiased


def resize(images: Tensor, size: tuple[int, int], method: Method) -> Tensor:
    """Resize with PIL's filters, which average over what falls away when they shrink.

    Args:
        images: `[..., H, W]`, uint8, or float on any scale.
        size: height and width.
        method: the filter.

    Returns:
        `[..., height, width]` of the same dtype: of uint8 exactly what `PIL.Image.resize` makes (fixed point, rounded
        to 8 bits after each axis, first across and then down), of floats the same without rounding.

    Pillow 13 goes down first where `H − height > 2 (W − width)`, which moves pixels of sharp pictures by up to 30
    levels; scorers were trained and their numbers published with those before it.
    """
    height, width = size
    if width != images.shape[-1]:
        across = images.transpose(-1, -2).contiguous()  # whole rows are copied much faster than single columns
        images = _resize_rows(across, width, method).transpose(-1, -2)
    if height != images.shape[-2]:
        images = _resize_rows(images.contiguous(), height, method)
    return images.contiguous()


def resize_shortest(images: Tensor, size: int, method: Method) -> Tensor:
    """Resize so that the shorter side has `size` pixels and the longer one its share, rounded down, as torchvision."""
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, (size, int(size * width / height)), method)
    return resize(images, (int(size * height / width), size), method)


def center_crop(images: Tensor, size: tuple[int, int], *, halves: Literal["down", "even"] = "down") -> Tensor:
    """The middle, `[..., height, width]`, with zeros around it where an image is smaller.

    Args:
        images: `[..., H, W]`.
        size: height and width.
        halves: where the middle lies between two pixels: "down" as image processors of transformers have it, "even"
            as torchvision's `CenterCrop`.
    """
    for axis, wanted in ((-2, size[0]), (-1, size[1])):
        spare = images.shape[axis] - wanted
        if spare >= 0:
            start = spare // 2 if halves == "down" else round(spare / 2)
            images = images.narrow(axis, start, wanted)
        else:
            before = (1 - spare) // 2 if halves == "down" else -spare // 2
            around = (before, -spare - before)
            images = F.pad(images, around if axis == -1 else (0, 0, *around))
    return images


def fit_longest(images: Tensor, size: int, method: Method) -> Tensor:
    """Resize so that the longer side has `size` pixels, in the middle of a black square, `[..., size, size]`.

    As `ResizeMaxSize` of HPSv2's open_clip, but an image whose longer side fits already gets its square, too.
    """
    height, width = images.shape[-2:]
    scale = size / float(max(height, width))
    new = (max(1, round(height * scale)), max(1, round(width * scale)))
    down, across = size - new[0], size - new[1]
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(resize(images, new, method), around)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(x − mean) / std` of each channel, `[..., 3, H, W]` float32; uint8 is brought to [0, 1] before."""
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    shift, spread = (torch.tensor(each, device=images.device)[:, None, None] for each in (mean, std))
    return (scaled - shift) / spread


def _resize_rows(images: Tensor, count: int, method: Method) -> Tensor:
    """`[..., count, W]` of contiguous `[..., H, W]`."""
    rows, weights = _filter(images.shape[-2], count, method)
    rows = rows.to(images.device)
    if images.dtype != torch.uint8:
        exact = images if images.dtype == torch.float64 else images.float()
        parts = weights.to(exact.dtype).to(images.device)
        total = exact.new_zeros(*images.shape[:-2], count, images.shape[-1])
        for row, part in zip(rows, parts, strict=True):
            total.addcmul_(exact.index_select(-2, row), part[:, None])
        return total.to(images.dtype)
    fixed = (weights * 2**_BITS + torch.where(weights < 0, -0.5, 0.5)).trunc().to(torch.int32).to(images.device)
    sums = torch.full(
        (*images.shape[:-2], count, images.shape[-1]), 2 ** (_BITS - 1), dtype=torch.int32, device=images.device
    )
    for row, part in zip(rows, fixed, strict=True):
        sums += images.index_select(-2, row) * part[:, None]
    return sums.bitwise_right_shift_(_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _filter(before: int, after: int, method: Method) -> tuple[Tensor, Tensor]:
    """Which of `before` pixels each of `after` is made of, and their shares: `[T, after]` int64 and float64.

    In double precision and in PIL's order of operations, since the fixed-point shares must be its to the last bit.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    reach = _REACH[method] * stretch
    taps = math.ceil(reach) * 2 + 1
    pixels = torch.zeros(taps, after, dtype=torch.int64)
    shares = torch.zeros(taps, after, dtype=torch.float64)
    for i in range(after):
        centre = (i + 0.5) * scale
        first, last = max(0, int(centre - reach + 0.5)), min(before, int(centre + reach + 0.5))
        raw = [_weight((p - centre + 0.5) * (1.0 / stretch), method) for p in range(first, last)]
        total = 0.0
        for each in raw:  # not `sum`, which newer Pythons compensate
            total += each
        pixels[: last - first, i] = torch.arange(first, last)
        shares[: last - first, i] = torch.tensor([each / total for each in raw], dtype=torch.float64)
    used = shares.any(dim=1)
    return pixels[used], shares[used]


def _weight(x: float, method: Method) -> float:
    """The filter at `x` pixels from the centre."""
    x = abs(x)
    if method == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * _A if x < 2 else 0.0
