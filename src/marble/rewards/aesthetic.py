"""LAION's aesthetic predictor: how much people would like a picture, by a linear head on CLIP ViT-L/14.

Source: christophschuhmann/improved-aesthetic-predictor, `simple_inference.py`, weights
`sac+logos+ava1-l14-linearMSE.pth`, which `trl-lib/ddpo-aesthetic-predictor` on the hub keeps as `aesthetic-model.pth`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record
from marble.rewards.base import Facts
from marble.rewards.checkpoint import fetch, load_into, read_state, weights_revision
from marble.rewards.clip import Clip, ClipReward, named
from marble.rewards.head import LinearHead
from marble.rewards.model import Dtype

SOURCE, HEAD, HEAD_FILE = "openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class Aesthetic(ClipReward):
    """The head's answer, whatever the prompt."""

    name = "aesthetic"
    about = "learned: would people like it, whatever it shows; CLIP ViT-L/14 with LAION's head, 1 to 10, mostly 4 to 7"
    facts = Facts(
        model=f"{SOURCE}, with {HEAD} ({HEAD_FILE}: LAION's sac+logos+ava1-l14-linearMSE.pth)",
        preprocessing="shorter side to 224 pixels (bicubic, as PIL), centre square, CLIP's mean and deviation",
        scale="marks from 1 to 10, without bounds; most pictures 4 to 7, trained models reach 8 and more",
        applies="every prompt; it is not read",
        licence="MIT (CLIP) and Apache-2.0 (head)",
        hacks="does not know the prompt: rewarded alone it ends in one painterly or portrait-like picture for "
        "everything; likes soft light, blurred backgrounds, frames and golden tints",
    )
    reads = False
    needs_prompt = False

    def __init__(
        self,
        *,
        source: str = SOURCE,
        revision: str | None = None,
        processor: str | None = None,
        head: str = HEAD,
        head_file: str = HEAD_FILE,
        device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        """From published weights.

        Args:
            source: hub repository or folder of a CLIP.
            revision: branch, tag or commit on the hub, of `source`.
            processor: hub repository or folder of the preprocessing, if not `source`.
            head: hub repository or folder of the head, or its file.
            head_file: the head's file in that repository or folder.
            device: where to run; auto: this process's GPU or the CPU.
            dtype: of CLIP; the head always runs in single precision.
        """
        super().__init__(source=source, revision=revision, processor=processor, device=device, dtype=dtype)
        self.head, self.head_file = head, head_file
        self.revision += f" + {head}@main"

    def load(self) -> _Parts:
        """CLIP and head; `revision` then says which commits, or the hashes of local files.

        Raises:
            MarbleError: they cannot be had, or do not fit together.
        """
        clip = super().load()
        name = "settings.head"
        head, version = named(name, _load_head, self.head, self.head_file, self.device)
        if (width := clip.network.config.projection_dim) != head.width:
            raise MarbleError(f'{name}: "{self.head}" takes {head.width} features, "{self.source}" has {width}')
        self.revision = f"{clip.revision} + {version}"
        return _Parts(clip, head)

    def judge(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """`[N]` float32."""
        clip = self.parts.clip
        return self.parts.head(clip.images(clip.preprocessing(images)))


@dataclass(frozen=True, eq=False)
class _Parts:
    clip: Clip
    head: LinearHead


@functools.cache
def _load_head(source: str, filename: str, device: torch.device) -> tuple[Any, str]:
    file = fetch(source, filename)
    state = read_state(file)
    first = state.get("layers.0.weight")
    with torch.random.fork_rng(devices=[]):  # a run's own random numbers stay as they were
        head = LinearHead(768 if first is None or first.ndim != 2 else first.shape[1])
    load_into(head, state, f'"{file}"')
    return head.to(device).eval().requires_grad_(False), weights_revision(source, file)
