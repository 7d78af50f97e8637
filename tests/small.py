"""Updates of a pipeline with random weights on made-up scores: what `make_update` needs, and no more.

Also run by the processes of `test_distributed.py`, which have no pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from marble import Policy
from marble.balance.method import Method
from marble.balance.signals import Signals, signals_of
from marble.config import Config, make_config
from marble.gradients import PerRewardGradients
from marble.objectives.visit import Visits, plan_epoch
from marble.prompts import PromptBatch, Record
from marble.rewards import RewardTable
from marble.rewards.absence import Absence
from marble.rollout import Rollout, collect
from marble.setup import Parts
from marble.step import make_update
from marble.update import Updater

PROMPTS, GROUP, REWARDS = 3, 4, 3
IMAGES = PROMPTS * GROUP
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def config_of(**sections: Any) -> Config:
    """Three rewards, an update an epoch, steps so short that Adam's are proportional to the gradient."""
    values: dict[str, Any] = {
        "prompts": [{"source": "x"}],
        "rewards": [{"reward": f"r{k}"} for k in range(REWARDS)],
        "rollout": {"prompts": PROMPTS, "group_size": GROUP, "steps": 4, "batch": IMAGES},
        "objective": {"beta": 0.5, "kl": 0.0, "timesteps": 2, "amax": 50.0},
        "optimizer": {"micro_batch": 8, "lr": 0.1, "eps": 1.0, "clip": 1e6, "weight_decay": 0.0},
        "balance": {"refresh": 1},
        "diagnose_every": 0,
    }
    for name, change in sections.items():
        values[name] = values[name] | change if isinstance(values.get(name), dict) else change
    return make_config(values)


def policy_of(folder: Path) -> Policy:
    """The pipeline in `folder` with a transformer of two narrow layers, on latents of 4 × 4.

    Its trained adapter is away from the sampling one, and both from the base model.
    """
    from diffusers import DiffusionPipeline, SD3Transformer2DModel

    pipe = DiffusionPipeline.from_pretrained(folder)
    settings = {**pipe.transformer.config, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = SD3Transformer2DModel.from_config({**settings, "caption_projection_dim": 32, "sample_size": 4})
    pipe.register_modules(transformer=narrow)
    policy = Policy(pipe, {"max_sequence_length": 12})
    policy.add_adapters(rank=2, alpha=4, targets=["attn.to_q", "attn.to_v", "attn.to_out.0"], seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, size in (("default", 0.1), ("old", 0.08)):
            for parameter in policy._slots[name]:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return policy


def rollout_of(policy: Policy, scheduler: str = "own") -> Rollout:
    texts = ["a red circle", "the word cat", "a blue square"]
    batch = PromptBatch([Record(text, "x") for text in texts], GROUP, list(range(IMAGES)))
    return collect(policy, batch, steps=4, images_per_call=IMAGES, scheduler=scheduler)


def signals_for(epoch: int = 0, spoilt: tuple[int, ...] = ()) -> Signals:
    """Random scores; the last reward judges the last two prompts, and those in `spoilt` find all images alike."""
    scores = torch.randn(IMAGES, REWARDS, dtype=torch.float64, generator=torch.Generator().manual_seed(epoch))
    scores[:GROUP, 2] = torch.nan
    scores[:, list(spoilt)] *= 0
    table = RewardTable(["a", "b", "c"], scores, ~scores.isnan())
    return signals_of(table, torch.arange(PROMPTS).repeat_interleave(GROUP), WEIGHTS, std="group")


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters]).clone()


@dataclass
class Trial:
    """One policy and its images, for many short runs that all start from the same parameters."""

    policy: Policy
    rollout: Rollout
    start: dict[str, list[Tensor]]

    @classmethod
    def of(cls, folder: Path, scheduler: str = "own") -> Trial:
        policy = policy_of(folder)
        start = {name: [p.detach().clone() for p in slot] for name, slot in policy._slots.items()}
        return cls(policy, rollout_of(policy, scheduler), start)

    def parts(self, config: Config) -> Parts:
        """Everything anew, from the start."""
        with torch.no_grad():
            for name, slot in self.policy._slots.items():
                for parameter, value in zip(slot, self.start[name], strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
        engine = PerRewardGradients(self.policy.denoiser, parameters=self.policy.parameters)
        updater = Updater(self.policy, config)
        rewards: list[Any] = [SimpleNamespace(name=term.reward) for term in config.rewards]
        return Parts(self.policy, None, rewards, [], Method(config), engine, updater, [], Absence(1))

    @staticmethod
    def plan(config: Config, epoch: int = 0, own: range | None = None) -> list[list[Visits]]:
        optimizer = config.optimizer
        return plan_epoch(
            IMAGES,
            config.rollout.steps,
            timesteps=config.objective.timesteps,
            updates=optimizer.updates_per_epoch,
            micro_batch=optimizer.micro_batch,
            seed=config.seed,
            epoch=epoch,
            own=own,
        )

    def run(
        self,
        config: Config,
        epochs: int = 1,
        own: range | None = None,
        spoilt: tuple[int, ...] = (),
        after: Callable[[], None] | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]], Parts]:
        """Parameters `[P]` after some epochs on the same images with other scores, every update's metrics, the parts.

        Args:
            config: of the run.
            epochs: how many.
            own: the images of this process, if there are others.
            spoilt: rewards without a signal.
            after: called after every update.
        """
        parts, metrics = self.parts(config), []
        rollout = self.rollout if own is None else part_of(self.rollout, own)
        for epoch in range(epochs):
            signals = signals_for(epoch, spoilt)
            for plan in self.plan(config, epoch, own):
                metrics.append(make_update(config, parts, rollout, signals, plan))
                if after is not None:
                    after()
        return flat(self.policy.parameters), metrics, parts

    @property
    def origin(self) -> Tensor:
        """`[P]`: the parameters at the start."""
        return flat(self.start["default"])


def part_of(rollout: Rollout, own: range) -> Rollout:
    """The images that one of several processes holds."""
    chosen = torch.arange(own.start, own.stop)
    return replace(rollout, samples=rollout.samples[chosen], offset=own.start)
