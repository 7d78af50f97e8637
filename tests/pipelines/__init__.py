"""Tiny real Diffusers pipelines with random weights, built locally and saved as any user's folder is.

Classes, schedulers and calling conventions are the real ones; widths, images and texts are small, and a token is
a letter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import families, further, later
from .families import SIZE, TOKENS

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "sana", "qwenimage", "zimage", "wan")
"""Those that marble names."""
FURTHER = ("pixart_sigma", "lumina2", "auraflow", "hunyuandit", "cogview4")
LATER = ("flux2_klein", "chroma", "ltx", "cogvideox", "mochi")
"""Those it does not; there is also `sd15-v`, the first with v-prediction."""

_BUILDERS = {
    "sd15": families.sd15,
    "sd15-v": families.sd15_v,
    "sdxl": families.sdxl,
    "sd3": families.sd3,
    "flux": families.flux,
    "sana": families.sana,
    "qwenimage": families.qwenimage,
    "zimage": families.zimage,
    "wan": families.wan,
    "pixart_sigma": further.pixart_sigma,
    "lumina2": further.lumina2,
    "auraflow": further.auraflow,
    "hunyuandit": further.hunyuandit,
    "cogview4": further.cogview4,
    **{name: getattr(later, name) for name in LATER},
}
_SQUARE = {"height": SIZE, "width": SIZE}
_LARGER = {"height": 2 * SIZE, "width": 2 * SIZE}  # of pipelines that take eight pixels per latent for granted
_CALLS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd15-v": {},
    "sdxl": {},
    "sd3": {"max_sequence_length": TOKENS},
    "flux": {"max_sequence_length": TOKENS},
    "sana": {
        "max_sequence_length": TOKENS,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    "qwenimage": {},
    "zimage": {"max_sequence_length": 2 * TOKENS},
    "wan": {"num_frames": 5, "max_sequence_length": TOKENS},
    "pixart_sigma": {"max_sequence_length": TOKENS, "clean_caption": False, "use_resolution_binning": False},
    "lumina2": {"max_sequence_length": 2 * TOKENS, "system_prompt": "", **_LARGER},
    "auraflow": {"max_sequence_length": TOKENS},
    "hunyuandit": {"use_resolution_binning": False, **_LARGER},
    "cogview4": {},
    **later.CALLS,
}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a pipeline, whose weights `seed` decides, for `DiffusionPipeline.from_pretrained`.

    Args:
        name: of `FAMILIES`, of `FURTHER`, of `LATER`, or `sd15-v`.
        folder: to save it in.
        seed: of the weights; torch's own generator stays as it was.

    Returns:
        The folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _BUILDERS[name]()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def call_of(name: str) -> dict[str, Any]:
    """What a call of that pipeline needs, beside the prompt and what every pipeline takes, to stay tiny."""
    return {**_SQUARE, **_CALLS[name]}
