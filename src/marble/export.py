"""Finishes an exported LoRA: its scale folded into the weights, and in its header what it is and how it was made.

Leaves out the writing of the layers, which is stock Diffusers' own (`Policy.save_lora`).
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from marble.errors import MarbleError
from marble.policy import model_path
from marble.registry import is_data_set, is_file, is_url, known
from marble.run import Run

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The LoRA in Diffusers' layout."""
COMFYUI_FILE = "comfyui.safetensors"
"""The same beside it in kohya's layout, for denoisers whose Diffusers layout ComfyUI does not read: U-Nets."""
HISTORY = 200
"""Most points of the history of the balance that a header holds."""

_SETTINGS = "lora_adapter_metadata"  # the header's entry in which Diffusers keeps PEFT's settings
_FACTOR = re.compile(r"(?P<part>[^.]+)\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PATH = re.compile(r"(?<![\w.:/\\])(?:~?/|[A-Za-z]:\\)[^\s\"']*")
_TOLD = (
    *("name", "dtype", "source", "revision", "processor", "tokenizer", "head", "encoder", "interpolation", "model"),
    *("detector", "clip", "detector_revision", "clip_revision"),
)
"""Settings of rewards that say what was scored, and are published."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Base:
    """What a run fine-tuned, without the place where it lies on this machine."""

    kind: str  # hub, registered or local
    name: str  # hub id or registered name; empty for a local folder
    pipeline: str  # name of the pipeline's class; empty if it cannot be told without a download


# ---- the file -------------------------------------------------------------------------------------------


def finish_lora(file: Path, details: dict[str, Any]) -> None:
    """Fold the scale into the weights, and write `details` into the header; each file is replaced whole.

    Diffusers takes the scale alpha / r from PEFT's settings in the header. Other programs do not know those
    and take it from `.alpha` tensors, which this layout has not, or else as 1. Folded into `lora_B`, with
    alpha = r in the settings, it is the same to all. For a U-Net `comfyui.safetensors` is written beside it.

    Args:
        file: what `save_lora_weights` wrote. A finished file stays as it is, but for `details`.
        details: further entries of the header; any that is not a string is written as JSON.

    Raises:
        MarbleError: not a safetensors file, or not of plain LoRA layers (DoRA, biases).
    """
    tensors, header = read_lora(file)
    settings = json.loads(header[_SETTINGS]) if _SETTINGS in header else {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise MarbleError(f'"{file}" holds "{name}"; only the lora_A and lora_B weights of plain LoRA are exported')
        if match["factor"] == "B":
            scale = _scale(settings, match["part"], match["module"], rank=tensor.shape[1])
            tensors[name] = tensor if scale == 1 else (tensor.double() * scale).to(tensor.dtype)
    if settings:
        header[_SETTINGS] = json.dumps(_without_scale(settings), indent=2, sort_keys=True)
    header |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in details.items()}
    _replace(file, tensors, header)
    if all(name.startswith("unet.") for name in tensors):
        others = {key: value for key, value in header.items() if key != _SETTINGS}
        _replace(file.with_name(COMFYUI_FILE), kohya_layout(tensors), others)


def finish_run(run: Run) -> None:
    """Finish the LoRA that a run has just exported, if it has one in Diffusers' layout."""
    file = run.path / "lora" / LORA_FILE
    if file.is_file():
        finish_lora(file, details_of(run))


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and the entries of its header.

    Raises:
        MarbleError: it is not there or cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in sorted(opened.keys())}, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise MarbleError(f'cannot read "{file}": {error}') from error


def kohya_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A finished U-Net LoRA under kohya's names, each layer with its `.alpha`, which is its rank.

    `unet.a.b.lora_A.weight` becomes `lora_unet_a_b.lora_down.weight`.
    """
    renamed = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        assert match is not None
        layer = f"lora_{match['part']}_{match['module'].replace('.', '_')}"
        renamed[f"{layer}.lora_{'down' if match['factor'] == 'A' else 'up'}.weight"] = tensor
        if match["factor"] == "A":
            renamed[f"{layer}.alpha"] = torch.tensor(float(len(tensor)))
    return renamed


def _scale(settings: dict[str, Any], part: str, module: str, rank: int) -> float:
    """What PEFT multiplies one layer's update by."""
    from peft.utils.other import get_pattern_key

    if f"{part}.lora_alpha" not in settings:
        return 1.0  # as Diffusers has it where there are no settings
    pattern: dict[str, float] = settings.get(f"{part}.alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), module), float(settings[f"{part}.lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


def _without_scale(settings: dict[str, Any]) -> dict[str, Any]:
    """PEFT's settings with every layer's alpha its rank; what came from a set is put in order."""
    changed = dict(settings)
    for key in settings:
        part, _, name = key.rpartition(".")
        if name == "lora_alpha":
            ranks = settings.get(f"{part}.rank_pattern") or {}
            changed |= {key: settings[f"{part}.r"], f"{part}.alpha_pattern": ranks, f"{part}.use_rslora": False}
    for key in ("target_modules", "exclude_modules"):
        changed |= {k: sorted(v) for k, v in settings.items() if k.endswith(f".{key}") and isinstance(v, list)}
    return changed


def _replace(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header)
    # safetensors puts the entries in another order every time; the same run shall give the same file
    size = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:size])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    aside = file.with_name(file.name + ".part")
    aside.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])
    os.replace(aside, file)


# ---- what the header says -------------------------------------------------------------------------------


def details_of(run: Run) -> dict[str, Any]:
    """What `finish_lora` writes into the header of a run's LoRA; no path of this machine is among it."""
    config, rows, base = run.config, run.metrics(), base_of(run)
    return {
        "marble_version": version("marble-diffusion"),
        "base_model": base.name,
        "base_model_kind": base.kind,
        "pipeline": base.pipeline,
        "merged_before": [public_source(source) for source in config.model.merge],
        "rewards": rewards_of(run),
        "prompts": [{"source": public_name(term.source), "share": term.share} for term in config.prompts],
        "method": config.balance.method,
        "objective": config.objective.name,
        "updates": updates_of(rows),
        "alpha_history": _history(rows),
        "modelspec.title": run.path.resolve().name,
        "modelspec.implementation": "diffusers",
    }


def rewards_of(run: Run) -> list[dict[str, Any]]:
    """Training rewards in the config's order: name, what it is registered as, revision and preferences."""
    config, evaluation = run.config, run.evaluation()
    registered = [public_name(term.reward) for term in config.rewards]
    names = evaluation.get("training_rewards", registered)
    return [
        {
            "name": name,
            "reward": public_name(term.reward),
            "revision": without_paths(evaluation.get("revisions", {}).get(name, "")),
            "priority": term.priority,
            "floor": term.floor,
            "weight": term.weight,
        }
        for name, term in zip(names, config.rewards, strict=True)
    ]


def updates_of(rows: list[dict[str, Any]]) -> int:
    """How many updates the metrics tell of."""
    return max((row["update"] for row in rows), default=0)


def base_of(run: Run) -> Base:
    """What the run fine-tuned: as its finished LoRA says, or else as its config's `model.id` is understood here."""
    file = run.path / "lora" / LORA_FILE
    header = read_lora(file)[1] if file.is_file() else {}
    if header.get("base_model_kind") in ("registered", "local") or _HUB_ID.fullmatch(header.get("base_model", "")):
        return Base(header["base_model_kind"], header["base_model"], header["pipeline"])
    name = run.config.model.id
    if name in known("model"):
        return Base("registered", name, _class_in(Path(model_path(name)) / "model_index.json"))
    if not _is_hub_id(name):
        return Base("local", "", _class_in(Path(name) / "model_index.json"))
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "model_index.json")
    return Base("hub", name, _class_in(Path(index)) if isinstance(index, str) else "")


def public_name(source: str) -> str:
    """A prompt source's name without the folder that it lies in, a served reward's without its server."""
    if is_data_set(source) and not _is_hub_id(source[3:]):
        return "hf:" + last_part(source)
    return last_part(source) if is_file(source) or is_url(source) else source


def public_rewards(values: dict[str, Any]) -> dict[str, Any]:
    """A config's mapping without what its rewards' settings may hold of servers, keys and folders.

    Numbers, flags and the settings in `_TOLD` stay, the latter without paths.
    """
    told = dict(values)
    for section in ("rewards", "held_out_rewards"):
        told[section] = []
        for use in values.get(section, []):
            kept = {
                name: without_paths(value)
                for name, value in use.get("settings", {}).items()
                if isinstance(value, bool | int | float) or (name in _TOLD and "://" not in str(value))
            }
            told[section].append({**use, "reward": public_name(use["reward"]), "url": [], "settings": kept})
    return told


def public_source(source: str) -> str:
    """A model's or LoRA's hub id as it is, the last part of any path."""
    return source if _is_hub_id(source) else last_part(source)


def without_paths(node: Any) -> Any:
    """A string, or a tree of dicts and lists, with every absolute path in it cut to its last part.

    Only what stands under a key `prompts` stays as it is.
    """
    if isinstance(node, dict):
        return {key: value if key == "prompts" else without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_paths(item) for item in node]
    return _PATH.sub(lambda path: last_part(path[0]), node) if isinstance(node, str) else node


def last_part(path: str) -> str:
    """The name at the end of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def _class_in(index: Path) -> str:
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return name if isinstance(name, str) and name.isidentifier() else ""


def _history(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """`[update, alpha]`, the first and the last and evenly between them, at most `HISTORY`."""
    points = [[row["update"], [round(weight, 4) for weight in row["alpha"]]] for row in rows if "alpha" in row]
    if len(points) <= HISTORY:
        return points
    return [points[round(i * (len(points) - 1) / (HISTORY - 1))] for i in range(HISTORY)]
