"""The model card: what a LoRA is, what it bought, how to load it, and how it was made."""

from __future__ import annotations

from typing import Any

import yaml

from marble.card.making import environment, prompts, rewards, training
from marble.card.markdown import code, plain
from marble.card.results import gains, guidance, pictures
from marble.card.use import comfyui, diffusers, makes_videos, name_of
from marble.errors import MarbleError
from marble.export import LORA_FILE, Base, base_of, read_lora
from marble.run import Run


def write_card(run: Run, repo: str, license_id: str | None = None) -> str:
    """The text of a run's model card (`README.md`).

    Everything that a run's author, prompts or rewards could have put there is escaped, and no path of this
    machine is in it.

    Args:
        run: with its LoRA exported; whatever else is missing is said to be.
        repo: `owner/name` on the hub.
        license_id: the hub's name of the LoRA's license, if its author gives one.

    Raises:
        MarbleError: the run has no LoRA.
    """
    file = run.path / "lora" / LORA_FILE
    if not file.is_file():
        raise MarbleError(f'"{run.path}" has no lora/{LORA_FILE}: {_why_not(run)}')
    base, (tensors, _) = base_of(run), read_lora(file)
    parts = [
        _front_matter(base, license_id),
        f"# {plain(repo.split('/')[-1])}",
        _about(run, base),
        "## What was gained\n" + gains(run),
        pictures(run),
        "## Loading it\n" + diffusers(run, base, repo),
        comfyui(run, base, tensors),
        "## Rewards\n" + rewards(run),
        "## Prompts\n" + prompts(run),
        "## Training\n" + training(run, tensors),
        "## Limits\n" + _limits(run),
        "## License\n"
        + (code(license_id) if license_id else "None stated for this LoRA")
        + ". The base model has its own.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _why_not(run: Run) -> str:
    if run.config.model.train == "full":
        return "all of its model was trained, and only LoRA are published"
    if (run.path / "lora").is_dir():
        return "its LoRA is in PEFT's layout, because Diffusers has none for this model; that is not published"
    return f"it has not finished. Go on with it first: marble train --resume {run.path}"


def _front_matter(base: Base, license_id: str | None) -> str:
    kind = "text-to-video" if makes_videos(base) else "text-to-image"
    values: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": kind}
    if base.kind == "hub":
        values |= {"base_model": base.name, "base_model_relation": "adapter"}
    if license_id:
        values["license"] = license_id
    values["tags"] = [kind, "diffusers", "lora", "diffusion-rl", "marble"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, width=float('inf')).strip()}\n---"


def _about(run: Run, base: Base) -> str:
    count, config = len(run.config.rewards), run.config
    trained = "one reward" if count == 1 else f"{count} rewards at once"
    with_marble = f"marble {plain(environment(run).get('marble-diffusion', ''))}".strip()
    return (
        f"A LoRA for {name_of(base)}, fine-tuned by reinforcement learning on {trained} with {with_marble} "
        f"(method {code(config.balance.method)}, objective {code(config.objective.name)})."
    )


def _limits(run: Run) -> str:
    trained, evaluated = guidance(run.config.rollout.guidance), guidance(run.config.evaluation.guidance)
    return (
        f"- Trained with {trained} and evaluated with {evaluated}; what it does at other guidance scales was not "
        "measured.\n"
        "- Rewards are proxies for what people want, and a model can learn to please them in ways that people would "
        "not like. Held-out rewards and pictures are there to see that by; they are no proof against it.\n"
        "- It keeps the base model’s own limits and biases, and was judged on the prompt sources above only."
    )
