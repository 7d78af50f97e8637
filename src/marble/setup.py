"""Builds everything that a run needs from its configuration, cheap checks first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from marble.balance.method import Method
from marble.config import Config, check_names, dump_config
from marble.distributed import decide, world
from marble.errors import MarbleError
from marble.gradients import PerRewardGradients
from marble.memory import GIB, free_bytes, full_training_bytes
from marble.objectives.importance import StepNorms
from marble.policy import Policy, model_path
from marble.prompts import PromptMixture, Record, load_mixture, needs_download
from marble.rewards import Reward, applies_to, check_rewards, load_rewards, prepare_rewards
from marble.rewards.absence import Absence
from marble.rules import held_out_shares, split_by_share
from marble.seeds import derive
from marble.update import Updater

log = logging.getLogger("marble")


@dataclass
class Parts:
    """A run's moving parts, and its fixed held-out prompts."""

    policy: Policy
    prompts: PromptMixture
    rewards: list[Reward]
    held_out_rewards: list[Reward]
    method: Method
    engine: PerRewardGradients
    updater: Updater
    held_out_prompts: list[Record]
    absence: Absence
    step_norms: StepNorms = field(default_factory=StepNorms)


def check_config(config: Config, fetch: bool = True) -> list[str]:
    """All that can be found wrong without loading a model.

    Args:
        config: what to check.
        fetch: whether prompts may be downloaded. If not, sources that would need it are passed over, and whether each
            reward applies to some prompt is checked only if there are none of them.

    Returns:
        The sources passed over.

    Raises:
        MarbleError: names that cannot be found, a model that is not there, prompts or rewards that do not fit.
    """
    problems: list[str] = []
    with _noted(problems):
        check_names(config)
    if not problems:
        with _noted(problems):
            rewards = load_rewards([*config.rewards, *config.held_out_rewards])
            check_rewards(rewards)
        with _noted(problems):
            passed_over = [] if fetch else [source.source for source in config.prompts if needs_download(source)]
            at_hand = [i for i, source in enumerate(config.prompts) if source.source not in passed_over]
            train, held_out = load_mixture([config.prompts[i] for i in at_hand])
    with _noted(problems):
        model_path(config.model.id)
    if problems:
        raise MarbleError("\n".join(problems))
    stop = config.evaluation.early_stop
    kept = {reward.name: reward for reward in rewards[len(config.rewards) :]}
    if stop is not None and stop not in kept:
        raise MarbleError(f'evaluation.early_stop: "{stop}" is not a held-out reward; those are {list(kept) or "none"}')
    chosen = _chosen(config, dict(zip(at_hand, held_out, strict=True)))
    if not passed_over:
        check_applies(rewards, [record for records in train for record in records], "prompt")
        check_applies(rewards, chosen, "held-out prompt")
        if stop is not None:
            check_applies([kept[stop]], chosen[: tracked(config)], "tracked held-out prompt")
    return passed_over


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Go on after a mistake, to find them all."""
    try:
        yield
    except MarbleError as error:
        problems.append(str(error))


def check_processes(config: Config) -> None:
    """Check that the processes that a launcher started can share this run.

    Raises:
        MarbleError: there are more than prompts, or they were given different configurations.
    """
    if config.rollout.prompts < world():
        raise MarbleError(
            f"rollout.prompts: at least one prompt for each of the {world()} processes (a prompt's images are not "
            f"split), got {config.rollout.prompts}; use {world()} or fewer processes"
        )
    if config.model.shard and world() == 1:
        raise MarbleError("model.shard: a base in shards needs several processes; launch with torchrun")
    if dump_config(config) != decide(lambda: dump_config(config)):
        raise MarbleError("this process was given another configuration than the main one; all must have the same")


def tracked(config: Config) -> int:
    """How many of the held-out prompts are followed on the way."""
    return max(2, round(config.evaluation.track * config.evaluation.prompts))


def check_applies(rewards: Sequence[Reward], records: Sequence[Record], what: str) -> None:
    """Check that every reward can judge at least one of the prompts, which are called `what` in the message.

    Raises:
        MarbleError: names those that cannot.
    """
    idle = [reward.name for reward in rewards if not any(applies_to(reward, records))]
    if idle:
        sources = sorted({record.source for record in records})
        raise MarbleError(
            f"rewards: {', '.join(idle)} applies to no {what} of {', '.join(sources)}; "
            "leave the reward out or add prompts that it can judge"
        )


def held_out_prompts(config: Config) -> list[Record]:
    """The evaluation's prompts: as many of each source as its mixture says, the sources in turn.

    Raises:
        MarbleError: a source has fewer.
    """
    return _chosen(config, dict(enumerate(load_mixture(config.prompts)[1])))


def _chosen(config: Config, held_out: Mapping[int, list[Record]]) -> list[Record]:
    """As many of what is held out of each source, by its place among all, as it is to give; the sources in turn."""
    counts = split_by_share(held_out_shares(config), config.evaluation.prompts)
    parts = []
    for i, each in held_out.items():
        source, count = config.prompts[i], counts[i]
        records = list({record.text: record for record in each}.values())
        if len(records) < count:
            nearest = max(2, config.evaluation.prompts * len(records) // count)
            raise MarbleError(
                f"evaluation.prompts: {config.evaluation.prompts} asks for {count} held-out prompts of "
                f'"{source.source}", which has {len(records)}; use {nearest}'
            )
        parts.append(records[:count])
    longest = max((len(part) for part in parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def assemble(config: Config) -> Parts:
    """Build everything; `check_config` first.

    Raises:
        MarbleError: the model cannot be loaded or has no layers for the LoRA.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    rewards = load_rewards([*config.rewards, *config.held_out_rewards])
    prepare_rewards(rewards)
    count = len(config.rewards)
    train, held_out = load_mixture(config.prompts)
    sources = [(records, source.share) for records, source in zip(train, config.prompts, strict=True)]
    policy = _trained_policy(config)
    return Parts(
        policy=policy,
        prompts=PromptMixture(
            sources, prompts=config.rollout.prompts, group_size=config.rollout.group_size, seed=config.seed
        ),
        rewards=rewards[:count],
        held_out_rewards=rewards[count:],
        method=Method(config),
        engine=PerRewardGradients(policy.denoiser, parameters=policy.parameters, in_step=policy.in_step),
        updater=Updater(policy, config),
        held_out_prompts=_chosen(config, dict(enumerate(held_out))),
        absence=Absence(config.missing_limit),
    )


def load_policy(config: Config) -> Policy:
    """The model as configured, with nothing trained yet.

    Raises:
        MarbleError: it cannot be had, or not in this way.
    """
    model = config.model
    return Policy.from_pretrained(
        model.id,
        call=model.call,
        device=model.device,
        dtype=model.dtype,
        whole=model.train == "full",
        revision=model.revision,
        variant=model.variant,
        quantize=model.quantize,
        merge=model.merge,
        trust_remote_code=model.trust_remote_code,
        checkpointing=model.checkpointing,
        vae_tiling=model.vae_tiling,
        vae_slicing=model.vae_slicing,
        offload=model.offload,
        shard=model.shard,
    )


def _trained_policy(config: Config) -> Policy:
    """The model, watched, with its trained weights."""
    policy, model = load_policy(config), config.model
    if model.train == "full":
        _check_room(policy, config)
        policy.train_whole(model.dtype)
    else:
        lora, seed = model.lora, derive(config.seed, "lora") % 2**32
        policy.add_adapters(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed, start=lora.start)
    if model.shard:
        policy.shard()
    policy.learn(guidance=config.rollout.guidance, scheduler=config.rollout.scheduler)
    return policy


def _check_room(policy: Policy, config: Config) -> None:
    """Say what full fine-tuning will take, and refuse what cannot fit."""
    count = sum(p.numel() for p in policy.denoiser.parameters())
    adam = 8 if config.optimizer.name == "adamw" else 2
    parts = full_training_bytes(count, len(config.rewards), adam_bytes=adam)
    needed, free = sum(parts.values()) - parts["weights"], free_bytes(policy.device)
    table = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    log.warning(
        "full fine-tuning of %.1f million parameters takes %.2f GiB besides activations (%s)",
        count / 1e6,
        (needed + parts["weights"]) / GIB,
        table,
    )
    if needed > free:
        raise MarbleError(
            f"model.train: full fine-tuning of {count / 1e6:.1f} million parameters needs {needed / GIB:.1f} GiB more "
            f"on {policy.device}, where {free / GIB:.1f} GiB are free ({table}); use model.train: lora"
        )
