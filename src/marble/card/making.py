"""Of the model card: the rewards, the prompts and the training."""

from __future__ import annotations

import json
import re
from typing import Any

from marble.card.markdown import code, plain, table
from marble.card.results import guidance
from marble.catalogue import FROM_GRADIENTS, METHODS, OBJECTIVES
from marble.export import public_name, public_source, rewards_of, updates_of, without_paths
from marble.run import Run

_PACKAGES = ("marble-diffusion", "diffusers", "peft", "transformers", "torch", "python")


def rewards(run: Run) -> str:
    """Training and held-out rewards, with revisions and preferences."""
    evaluation, config = run.evaluation(), run.config
    rows = [
        [
            plain(row["name"]),
            code(row["reward"]),
            plain(row["revision"]) or "not stated",
            "trained on",
            f"{row['priority']:g}",
            "yes" if row["floor"] else "no",
            f"{row['weight']:g}",
        ]
        for row in rewards_of(run)
    ]
    given = [public_name(use.reward) for use in config.held_out_rewards]
    names = evaluation.get("held_out_rewards", given)
    for name, registered in zip(names, given, strict=True):
        revision = plain(without_paths(evaluation.get("revisions", {}).get(name, "")))
        rows.append([plain(name), code(registered), revision or "not stated", "held out", "", "", ""])
    head = ("reward", "given as", "revision", "", "priority", "floor", "weight")
    note = "Weights count in `weighted-sum` only; balancing methods do not use them."
    return table(head, rows, "llllrrr") + f"\n\n{note}"


def prompts(run: Run) -> str:
    """The sources of the training prompts and their shares."""
    sources = run.config.prompts
    whole = sum(term.share for term in sources)
    rows = [[code(public_name(term.source)), f"{100 * term.share / whole:.0f}%"] for term in sources]
    return table(("source", "share"), rows, "lr")


def training(run: Run, tensors: dict[str, Any]) -> str:
    """Method, objective, budget, batch, adapter and versions.

    Args:
        run: the run.
        tensors: of its LoRA, by name.
    """
    config, rows = run.config, run.metrics()
    objective, rollout, model = config.objective, config.rollout, config.model
    last: dict[str, Any] = next((row for row in reversed(rows) if row.get("images")), {})
    minutes = f", {last['time']['elapsed'] / 60:.0f} minutes" if "time" in last else ""
    budget = [_count(config.budget.updates, "update")] if config.budget.updates else []
    budget += [f"{config.budget.minutes:g} minutes"] if config.budget.minutes else []
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name})
    start = f" It went on from {code(public_source(model.lora.start))}." if model.lora.start else ""
    versions = environment(run)
    found = [f"{name} {plain(versions[name])}" for name in _PACKAGES if name in versions]
    lines = [
        f"Method {code(config.balance.method)}: {plain(METHODS[config.balance.method])}.{_solved(run)}",
        f"Objective {code(objective.name)}: {plain(OBJECTIVES[objective.name])}. Advantages are divided by the "
        f"standard deviation of the {objective.std}; sampling steps trained per image: {objective.timesteps}; "
        f"weight of the distance to the base model: {objective.kl:g}.",
        f"{_count(updates_of(rows), 'update')} of a budget of {' or '.join(budget) or 'no limit'}; "
        f"{_count(last.get('images', 0), 'image')}{minutes}.",
        f"An epoch is {_count(rollout.prompts, 'prompt')} × {rollout.group_size} images, sampled in {rollout.steps} "
        f"steps with {guidance(rollout.guidance)}, for {_count(config.optimizer.updates_per_epoch, 'update')}. "
        f"Learning rate {config.optimizer.lr:g}, seed {config.seed}.",
        f"LoRA of rank {' and '.join(map(str, ranks))} on {_count(len(tensors) // 2, 'layer')} ({_endings(tensors)}), "
        f"its scale folded into the weights: the average of the trained weights over updates (decay up to "
        f"{config.ema:g}).{start} Frozen weights in {model.quantize or model.dtype}.",
        f"Versions: {', '.join(found) or 'not recorded'}.",
        "`config.yaml` is the complete configuration, with local paths cut to their last part; `evaluation.json` has "
        "every score. The LoRA’s header holds the history of the balance.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def environment(run: Run) -> dict[str, Any]:
    """What the run recorded of versions; empty if it did not."""
    try:
        return json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _solved(run: Run) -> str:
    balance = run.config.balance
    if balance.method not in FROM_GRADIENTS:
        return ""
    finish = f"; the last {_count(balance.finish, 'update')} at uniform weights" if balance.finish else ""
    return (
        f" Solved anew every {_count(balance.refresh, 'update')}, average of the {balance.smooth} with decay "
        f"{balance.decay:g}{finish}."
    )


def _endings(tensors: dict[str, Any]) -> str:
    layers = {name.split(".lora_")[0] for name in tensors}
    return ", ".join(code(ending) for ending in sorted({re.split(r"\.\d+\.(?=\D)", layer)[-1] for layer in layers}))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
