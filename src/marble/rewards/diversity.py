"""How far a picture is from the others of its prompt, in the features of CLIP or DINOv2."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from marble.errors import MarbleError
from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.checkpoint import fetch
from marble.rewards.clip import load_clip, load_network, load_preprocessing, named
from marble.rewards.model import Dtype, ModelReward

ENCODER = "openai/clip-vit-large-patch14"
_DINO = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


class Diversity(ModelReward):
    """Of each image, the mean of `1 − cos` to the other images of its group."""

    name = "diversity"
    needs_prompt = False
    groupwise = True
    about = "groupwise: mean cosine distance to the other pictures of the prompt, by CLIP or DINOv2; 0 to about 0.4"
    facts = Facts(
        model=f"{ENCODER}; any CLIP or DINOv2 as settings.encoder",
        preprocessing="the encoder's own: shorter side resized (bicubic, as PIL), centre square, mean and deviation",
        scale="mean of 1 − cosine, in 0 to 2; 0 for a group of one or of equal pictures, about 0.1 to 0.4 by CLIP",
        applies="every prompt; it is not read, but pictures are compared within its group only",
        licence="MIT (OpenAI's CLIP)",
        hacks="any difference counts: leaving the prompt, noise, odd colours and styles pay as much as another idea; "
        "of use only beside a reward for the prompt",
    )

    def __init__(
        self, *, encoder: str = ENCODER, revision: str | None = None, device: str = "auto", dtype: Dtype = "float32"
    ) -> None:
        """By the features of an encoder.

        Args:
            encoder: hub repository or folder of a CLIP (its projected features) or a DINOv2 (its class token).
            revision: branch, tag or commit on the hub.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of the encoder; distances are always in single precision.
        """
        super().__init__(device=device, dtype=dtype)
        self.encoder, self._asked = encoder, revision
        self.revision = f"{encoder}@{revision or 'main'}"

    def load(self) -> Callable[[Tensor], Tensor]:
        """What makes `[G, D]` features of length 1; `revision` then says which commit, or the hash of local weights.

        Raises:
            MarbleError: it cannot be had, or is of another kind.
        """
        features, self.revision = _load(self.encoder, self._asked, self.device, self.dtype)
        return features

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[G]` float32, 0 for a group of one."""
        count = len(images)
        if count < 2:
            return torch.zeros(count)
        features = self.parts(images)
        distance = (1 - features @ features.T).clamp_min(0)
        return distance.fill_diagonal_(0).sum(dim=1) / (count - 1)


@functools.cache
def _load(
    encoder: str, revision: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], str]:
    name = "settings.encoder"
    kind = named(name, _model_type, encoder, revision)
    if kind == "clip":
        clip = load_clip(encoder, revision, device, dtype, texts=False, name=name)
        return lambda images: clip.images(clip.preprocessing(images)), clip.revision
    if kind in _DINO:
        network, version = named(name, load_network, _DINO[kind], encoder, revision, device, dtype)
        preprocessing = named(name, load_preprocessing, encoder, revision)
        return lambda images: _class_token(network, preprocessing(images)), version
    raise MarbleError(f'{name}: "{encoder}" is of model_type {kind}; it must be one of clip, {", ".join(_DINO)}')


def _class_token(network: Any, pixels: Tensor) -> Tensor:
    return F.normalize(network(pixel_values=pixels.to(network.dtype)).pooler_output.float(), dim=-1)


def _model_type(encoder: str, revision: str | None) -> str | None:
    file = fetch(encoder, "config.json", revision)
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise MarbleError(f'"{file}" is no config: {error}') from error
