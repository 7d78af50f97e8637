"""The rules that tie several settings together, each with the reason and the nearest values that would do."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from marble.catalogue import FROM_ADVANTAGES, FROM_GRADIENTS, NEED_TORCHJD, SUMS

if TYPE_CHECKING:
    from marble.config import Config


RESERVED_CALL = (
    *("prompt", "num_images_per_prompt", "num_videos_per_prompt", "num_inference_steps"),
    *("guidance_scale", "true_cfg_scale", "generator", "output_type", "return_dict", "sigmas", "timesteps"),
    *("latents", "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
"""Arguments of a pipeline's call that training sets itself."""


def split_by_share(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportions of `shares` that sum to `total` (largest remainders first)."""
    exact = [share * total / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def held_out_shares(config: Config) -> list[float]:
    """What each source gives to the evaluation's prompts, in proportion."""
    return [1.0 if config.evaluation.mixture == "even" else source.share for source in config.prompts]


def stage_ends(shares: Sequence[float], updates: int) -> list[int]:
    """The update before which each stage of `sequential` ends: halves rounded up."""
    return [int(done / sum(shares) * updates + 0.5) for done in itertools.accumulate(shares)]


def knows_floors(method: str) -> bool:
    """Whether a method keeps a reward's floor."""
    return method in FROM_GRADIENTS and method != "published"


def knows_priorities(method: str) -> bool:
    """Whether a method heeds priorities."""
    return method not in (*SUMS, "published")


def check_rules(config: Config) -> None:
    """Check a configuration's fields against each other.

    Raises:
        ValueError: one line per broken rule.
    """
    problems = [*_model(config), *_geometry(config), *_ppo(config), *_balance(config), *_budget(config)]
    if problems:
        raise ValueError("\n  ".join(problems))


def _model(config: Config) -> list[str]:
    model, problems = config.model, []
    problems += [
        f"model.call: {name} is set by other settings; leave it out" for name in model.call if name in RESERVED_CALL
    ]
    if model.quantize and model.train == "full":
        problems.append(f"model.train: quantised weights cannot be trained, got full with quantize = {model.quantize}")
    if model.quantize and model.merge:
        problems.append(f"model.merge: quantised weights cannot be added to, got quantize = {model.quantize}")
    if model.train == "full" and model.lora.start:
        problems.append(f"model.lora.start: with train = full merge it instead: model.merge: [{model.lora.start}]")
    if model.quantize or config.optimizer.name == "adamw-8bit":
        field = "model.quantize" if model.quantize else "optimizer.name"
        if importlib.util.find_spec("bitsandbytes") is None:
            problems.append(f'{field}: needs bitsandbytes: pip install "marble-diffusion[quantize]"')
    return problems


def _geometry(config: Config) -> list[str]:
    rollout, objective, optimizer = config.rollout, config.objective, config.optimizer
    problems = []
    if objective.timesteps > rollout.steps - 1:
        problems.append(
            f"objective.timesteps: at most rollout.steps − 1 (the last step is not trained), got {objective.timesteps} "
            f"with rollout.steps = {rollout.steps}; use objective.timesteps = {rollout.steps - 1} "
            f"or rollout.steps = {objective.timesteps + 1}"
        )
    if config.model.shard and config.model.train == "full":
        problems.append("model.shard: only a frozen base can be in shards, got model.train = full; use lora")
    if config.model.shard and config.model.quantize:
        problems.append(f"model.shard: not with quantised weights, got model.quantize = {config.model.quantize}")
    for field, total, shares in (
        ("rollout.prompts", rollout.prompts, [source.share for source in config.prompts]),
        ("evaluation.prompts", config.evaluation.prompts, held_out_shares(config)),
    ):
        if 0 in split_by_share(shares, total):
            enough = next(n for n in itertools.count(total) if 0 not in split_by_share(shares, n))
            problems.append(f"{field}: at least one for each source by its share, got {total}; use {enough}")
    visits = rollout.prompts * rollout.group_size * objective.timesteps
    if optimizer.updates_per_epoch > visits:
        problems.append(
            f"optimizer.updates_per_epoch: at most one update per image and timestep "
            f"({rollout.prompts} × {rollout.group_size} × {objective.timesteps} = {visits}), "
            f"got {optimizer.updates_per_epoch}; use {visits}"
        )
    return problems


def _ppo(config: Config) -> list[str]:
    """PPO is not trained with what the other objectives start from, as a config written out in full for them has it."""
    objective, scheduler, problems = config.objective, config.rollout.scheduler, []
    if objective.name != "ppo":
        return []
    if scheduler != "sde":
        problems.append(
            f"rollout.scheduler: ppo needs the log-probabilities of the sampler's steps, got {scheduler}; use sde"
        )
    if objective.clip >= 1:
        problems.append(
            f"objective.clip: a ratio of ppo is clipped to 1 ± this, so less than 1, got {objective.clip}; its authors "
            "use 1e-4, with objective.kl = 0.04"
        )
    if objective.old.slope > 0 and objective.old.limit > 0:
        problems.append(
            "objective.old: ppo's old policy is the one that sampled, without decay, got slope = "
            f"{objective.old.slope} and limit = {objective.old.limit}; its authors use slope = 0 and limit = 0"
        )
    return problems


def _balance(config: Config) -> list[str]:
    balance, problems = config.balance, []
    if balance.finish and config.budget.updates is None:
        problems.append("balance.finish: counts from the end, so budget.updates must be given")
    elif balance.finish and balance.finish >= (config.budget.updates or 0):
        problems.append(f"balance.finish: less than budget.updates = {config.budget.updates}, got {balance.finish}")
    if balance.method == "published" and balance.visits != "even":
        problems.append(f"balance.visits: published has even ones, got {balance.visits}; use balance.method = marble")
    if balance.method == "published" and (balance.advantage_scale, balance.norms) != ("published", "raw"):
        problems.append(
            "balance.method: published is the paper's method to the letter, got advantage_scale = "
            f"{balance.advantage_scale} and norms = {balance.norms}; use method = marble for either correction"
        )
    problems += [*_preferences(config), *_stages(config)]
    names = [term.label for term in config.rewards]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f'rewards: "{name}" is given more than once; settings: {{name: …}} tells two of a kind apart')
    for name in sorted(set(names) & {use.label for use in config.held_out_rewards}):
        problems.append(f'held_out_rewards: "{name}" is also trained on; with other settings, give it a settings.name')
    return problems


def _stages(config: Config) -> list[str]:
    """The schedule of `sequential`."""
    balance, names, problems = config.balance, [term.label for term in config.rewards], []
    if balance.stages and balance.method != "sequential":
        problems.append(f"balance.stages: only sequential has stages, got balance.method = {balance.method}")
    if balance.method == "sequential" and config.budget.updates is None:
        problems.append("balance.method: sequential divides budget.updates, which must be given")
    for i, stage in enumerate(balance.stages):
        problems += [
            f'balance.stages.{i}.rewards: "{name}" is not a training reward; those are {", ".join(names)}'
            for name in stage.rewards
            if name not in names
        ]
    shares, least = [stage.share for stage in balance.stages] or [1.0] * len(names), config.optimizer.updates_per_epoch
    ends = stage_ends(shares, config.budget.updates or 0)
    lengths = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    if balance.method == "sequential" and config.budget.updates and min(lengths) < least:
        enough = math.ceil(least * sum(shares) / min(shares))
        smaller = f" or optimizer.updates_per_epoch = {min(lengths)}" if min(lengths) else ""
        problems.append(
            f"balance.stages: each lasts an epoch, optimizer.updates_per_epoch = {least} updates, or longer, got "
            f"{', '.join(map(str, lengths))}; use budget.updates = {enough}{smaller}, or other shares"
        )
    return problems


def _preferences(config: Config) -> list[str]:
    """Priorities, floors and the ways of solving, against the method."""
    balance, method, problems = config.balance, config.balance.method, []
    for i, term in enumerate(config.rewards):
        if term.floor and not knows_floors(method):
            problems.append(
                f"rewards.{i}.floor: needs a method that takes every reward's gradient (and is not the paper's to the "
                f"letter), got balance.method = {method}; use marble"
            )
        if term.priority != 1 and not knows_priorities(method):
            other = "use rewards.N.weight instead" if method in SUMS else "use balance.method = marble"
            problems.append(f"rewards.{i}.priority: {method} knows none, got {term.priority}; {other}")
    plain = {"smooth": "weights", "estimate": "batch", "gradients": "whole"}
    for field, only in plain.items():
        if method == "published" and getattr(balance, field) != only:
            problems.append(
                f"balance.{field}: published has {only}, got {getattr(balance, field)}; use balance.method = marble"
            )
    # not those that are written out at their defaults, as in every run's own config.yaml
    changed = {f for f in (*plain, "solve_share") if getattr(balance, f) != type(balance).model_fields[f].default}
    for field in sorted(changed) if method in FROM_ADVANTAGES and method != "uniform" else ():
        problems.append(f"balance.{field}: {method} takes no reward's gradient, so this changes nothing; leave it out")
    if method in NEED_TORCHJD and importlib.util.find_spec("torchjd") is None:
        problems.append(f'balance.method: {method} needs TorchJD: pip install "marble-diffusion[torchjd]"')
    if balance.estimate == "halves":
        if balance.smooth != "gram":
            problems.append("balance.estimate: halves is too noisy to solve on unaveraged; use balance.smooth = gram")
        shares = [source.share for source in config.prompts]
        if min(split_by_share(shares, config.rollout.prompts)) < 2:
            enough = next(n for n in itertools.count(2) if min(split_by_share(shares, n)) >= 2)
            problems.append(
                f"rollout.prompts: halves need two prompts of every source, got {config.rollout.prompts}; use {enough}"
            )
    if method == "closed-loop" and len(config.rewards) < 2:
        problems.append("balance.method: closed-loop compares rewards, got one reward; use marble")
    return problems


def _budget(config: Config) -> list[str]:
    problems = []
    if config.budget.updates is None and config.budget.minutes is None:
        problems.append("budget: give updates, minutes or both")
    stop = config.evaluation.early_stop
    if stop is not None and not config.evaluation.every:
        problems.append("evaluation.early_stop: needs evaluation.every > 0")
    return problems
