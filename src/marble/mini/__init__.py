"""The embedded model `mini`, its world and its rewards."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def model_folder() -> Path:
    """The folder of the embedded pipeline, as `DiffusionPipeline.from_pretrained` reads it."""
    return Path(str(files("marble.mini"))) / "weights" / "model"
