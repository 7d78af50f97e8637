"""Published weights in whatever form: fetched or local, read without pickle's powers, loaded without silence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from marble.errors import MarbleError, first_line

_SHOWN = 8
"""Keys listed in a message."""


def fetch(source: str, filename: str, revision: str | None = None) -> Path:
    """The file `filename` of a folder or of a hub repository (from its cache if it is there); or `source`, if a file.

    Raises:
        MarbleError: it is not there, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or source.startswith((".", "/", "~")):
        if not (path / filename).is_file():
            raise MarbleError(f'"{path / filename}" does not exist')
        return path / filename
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise MarbleError(f'cannot get "{filename}" of "{source}": {first_line(error)}') from error


def read_state(file: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` or `.pth` that holds tensors alone.

    Args:
        file: what to read.
        inside: the key of the state dict, where the file holds more than one thing.

    Raises:
        MarbleError: it cannot be read, wants to run code, or holds no tensors by name.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; all mean that this file will not do
        raise MarbleError(f'"{file}" cannot be read as weights alone: {first_line(error)}') from error
    if inside is not None and isinstance(state, Mapping) and inside in state:
        state = state[inside]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise MarbleError(f'"{file}" holds no tensors by name')
    return dict(state)


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a whole state dict.

    Raises:
        MarbleError: lists keys that are missing, not expected, or of another shape.
    """
    own = module.state_dict()
    problems = []
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    for kind, keys in (
        ("missing", [key for key in own if key not in state]),
        ("unexpected", [key for key in state if key not in own]),
        ("of another shape", [f"{key} {list(state[key].shape)} for {list(own[key].shape)}" for key in wrong]),
    ):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            problems.append(f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{more}")
    if problems:
        raise MarbleError(f"{what} does not fit its model: " + "; ".join(problems))
    module.load_state_dict(state)


def materialise(module: nn.Module) -> nn.Module:
    """Memory on the CPU for a module made on the meta device, with the positions that no state dict holds."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(positions := getattr(part, "position_ids", None), Tensor):
            positions.copy_(torch.arange(positions.shape[-1]).expand_as(positions))
    return module


def weights_revision(source: str, *files: Path) -> str:
    """Which weights these files are: repository and commit if from the hub, else name and hash.

    Args:
        source: hub repository, folder or file.
        files: of the source, at least one.
    """
    if not is_local(source) and files[0].parent.parent.name == "snapshots":
        return f"{source}@{files[0].parent.name}"
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**24):
                digest.update(part)
    return f"{Path(source).expanduser().name}@sha256:{digest.hexdigest()[:16]}"


def is_local(source: str) -> bool:
    """Whether weights are named by a path rather than by a hub repository."""
    return source.startswith((".", "/", "~")) or Path(source).expanduser().exists()
