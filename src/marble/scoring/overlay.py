"""What lies over a model's own weights: nothing, a LoRA, or a whole denoiser that a run trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marble.config import Config, make_config, read_config
from marble.errors import MarbleError
from marble.policy import Policy
from marble.policy.weights import find_lora, scale_lora

_PIECE = 2**24
"""Bytes read at once."""


def run_config(source: str) -> Config | None:
    """The configuration of the run that `source` is the folder of, or the `lora/` of; None if it is neither."""
    path = Path(source)
    for folder in (path, path.parent) if path.name == "lora" else (path,):
        if (folder / "config.yaml").is_file():
            return make_config(read_config(folder / "config.yaml"), str(folder / "config.yaml"))
    return None


@dataclass(frozen=True)
class Overlay:
    """Laid over a policy before it is evaluated."""

    lora: str | None = None
    """Folder, file or hub id."""
    whole: Path | None = None
    """Folder of a denoiser."""
    scale: float = 1.0
    """Of the LoRA's strength."""

    @classmethod
    def find(cls, source: str, field: str, scale: float = 1.0) -> Overlay:
        """What a run exported, or a LoRA in any layout that Diffusers reads.

        Args:
            source: a run folder; or a LoRA's folder (a run's `lora/`, say), file or hub id.
            field: the option that it was given by.
            scale: of the LoRA's strength.

        Raises:
            MarbleError: nothing is there, the run has exported nothing yet, or a scale is given for a whole denoiser.
        """
        path = Path(source)
        if not (path / "config.yaml").is_file():
            find_lora(source, field)
            return cls(lora=source, scale=scale)
        config = run_config(source)
        assert config is not None
        names = ("lora",) if config.model.train == "lora" else ("transformer", "unet")
        folder = next((path / name for name in names if any((path / name).glob("*.safetensors"))), None)
        if folder is None:
            raise MarbleError(f'{field}: the run "{source}" has exported nothing yet: it has no {" or ".join(names)}/')
        if config.model.train == "lora":
            return cls(lora=str(folder), scale=scale)
        if scale != 1:
            raise MarbleError(f'--scale: "{source}" has all of its denoiser trained and no LoRA to scale; leave it out')
        return cls(whole=folder)

    @property
    def empty(self) -> bool:
        """Whether it is the base model."""
        return self.lora is None and self.whole is None

    def lay_over(self, policy: Policy, field: str) -> None:
        """Apply it, for good.

        Raises:
            MarbleError: it is another model's.
        """
        if self.whole is not None:
            policy.load_whole(self.whole)
        elif self.lora is not None:
            policy.load_lora(self.lora, field)
            if self.scale != 1:
                scale_lora(policy.pipe, self.scale)

    def describe(self) -> dict[str, Any] | None:
        """Its source, scale, and the hash of its files here; None for the base model."""
        if self.empty:
            return None
        source = self.lora if self.whole is None else str(self.whole)
        assert source is not None
        path = Path(source)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return {"source": source, "scale": self.scale, "sha256": digest(files) if files else None}


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()
