"""The folder that is pushed to the hub: LoRA, card, config, evaluation and the pictures shown; nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from marble.card.page import write_card
from marble.card.results import card_images
from marble.export import (
    LORA_FILE,
    base_of,
    details_of,
    finish_lora,
    last_part,
    public_name,
    public_rewards,
    public_source,
    read_lora,
    without_paths,
)
from marble.run import Run
from marble.storage import write_atomic


def write_bundle(run: Run, repo: str, folder: Path, license_id: str | None = None) -> list[Path]:
    """Write what is published of a run.

    The config and the evaluation are published without paths of this machine; prompts stay as they are. A LoRA
    of an earlier version of marble is finished on the way.

    Args:
        run: with its LoRA exported.
        repo: `owner/name` on the hub, for the card.
        folder: where to; made if it is not there.
        license_id: the hub's name of the LoRA's license.

    Returns:
        The files written, relative to `folder`, in order.

    Raises:
        MarbleError: the run has no LoRA, or one that cannot be exported.
    """
    card = write_card(run, repo, license_id)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.path / "lora" / LORA_FILE, folder / LORA_FILE)
    header = read_lora(folder / LORA_FILE)[1]
    finish_lora(folder / LORA_FILE, {} if "marble_version" in header else details_of(run))
    write_atomic(folder / "README.md", card)
    write_atomic(folder / "config.yaml", public_config(run))
    evaluation = run.evaluation()
    if evaluation:
        write_atomic(folder / "evaluation.json", json.dumps(without_paths(evaluation)))
    for name, source in card_images(run).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def public_config(run: Run) -> str:
    """A run's configuration as YAML, with paths of this machine cut to their last part."""
    values = without_paths(public_rewards(run.config.model_dump(mode="json", exclude={"prompts"})))
    model = run.config.model
    if base_of(run).kind == "local":
        values["model"]["id"] = last_part(model.id)
    values["model"]["merge"] = [public_source(source) for source in model.merge]
    if model.lora.start is not None:
        values["model"]["lora"]["start"] = public_source(model.lora.start)
    prompts = []
    for term in run.config.prompts:
        others = term.model_dump(mode="json", exclude_defaults=True, exclude={"source", "share"})
        prompts.append({"source": public_name(term.source), "share": term.share, **others})
    values = {name: prompts if name == "prompts" else values[name] for name in run.config.model_dump()}
    return "# as run; local paths are cut to their last part\n" + yaml.safe_dump(values, sort_keys=False)
