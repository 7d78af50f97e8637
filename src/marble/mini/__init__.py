"""The embedded model `mini`, its world and its rewards."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def weights_folder(world: str) -> Path:
    """Where the model and the judges of a world lie: `model/` and `judges/`."""
    return Path(str(files("marble.mini"))) / ("weights" if world == "mini" else f"weights_{world.replace('-', '_')}")


def model_folder() -> Path:
    """The folder of the embedded pipeline, as `DiffusionPipeline.from_pretrained` reads it."""
    return weights_folder("mini") / "model"


def second_model_folder() -> Path:
    """The folder of the second world's pipeline."""
    return weights_folder("mini-b") / "model"
