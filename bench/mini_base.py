"""Where the base model stands between noise and perfect pictures, by reward, on the demo's held-out prompts.

.venv/bin/python bench/mini_base.py            # mini-b: of the second world
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from marble import Policy, evaluate
from marble.config import demo_config_path, make_config, read_config
from marble.mini.render import render
from marble.mini.world import WORLDS, World
from marble.prompts import Record
from marble.rewards import Reward, load_rewards, score_images
from marble.setup import held_out_prompts

IMAGES = 8


def anchors(world: World, rewards: list[Reward], prompts: list[Record]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean scores of noise and of perfect pictures of `prompts`."""
    specs = {world.caption(s): s for pool in world.pools.values() for s in pool}
    specs |= {world.caption(s): s for s in world.word_specs(world.held_out_words)}
    rng = np.random.default_rng(0)
    records = [p for p in prompts for _ in range(IMAGES)]
    groups = torch.arange(len(prompts)).repeat_interleave(IMAGES)
    found = []
    for draw in (
        lambda r: rng.integers(0, 256, (world.size, world.size, 3)).astype(np.uint8),
        lambda r: render(world, specs[r.text], rng),
    ):
        images = torch.from_numpy(np.stack([draw(r) for r in records])).permute(0, 3, 1, 2).float() / 255
        table = score_images(rewards, images, records, groups)
        found.append(dict(zip(table.names, np.nanmean(table.scores.numpy(), axis=0).tolist(), strict=True)))
    return found[0], found[1]


def standing(world: str = "mini", steps: int | None = None) -> dict[str, tuple[float, float, float]]:
    """Reward → mean of noise, of a world's base model, of perfect pictures."""
    path = demo_config_path() if world == "mini" else Path(__file__).parent / f"{world}.yaml"
    config = make_config(read_config(path))
    rewards = load_rewards([*config.rewards, *config.held_out_rewards])
    prompts = held_out_prompts(config)
    noise, perfect = anchors(WORLDS[world], rewards, prompts)
    policy = Policy.from_pretrained(config.model.id, call=config.model.call)
    base = evaluate(
        policy, rewards, prompts, seeds=range(IMAGES), steps=steps or config.evaluation.steps, adapter=None
    ).means()
    return {name: (noise[name], base[name] or 0.0, perfect[name]) for name in noise}


if __name__ == "__main__":
    import sys

    print("| reward | noise | base model | perfect | of the way |\n|---|---|---|---|---|")
    for name, (low, mid, high) in standing(sys.argv[1] if len(sys.argv) > 1 else "mini").items():
        print(f"| {name} | {low:.4f} | {mid:.4f} | {high:.4f} | {100 * (mid - low) / (high - low):.0f}% |")
