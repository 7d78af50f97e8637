"""The rules that tie several settings together, each with the reason and the nearest values that would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marble.config import Config


def check_rules(config: Config) -> None:
    """Check a configuration's fields against each other.

    Raises:
        ValueError: one line per broken rule.
    """
    problems = [*_geometry(config), *_balance(config), *_budget(config)]
    if problems:
        raise ValueError("\n  ".join(problems))


def _geometry(config: Config) -> list[str]:
    rollout, objective, optimizer = config.rollout, config.objective, config.optimizer
    problems = []
    if objective.timesteps > rollout.steps - 1:
        problems.append(
            f"objective.timesteps: at most rollout.steps − 1 (the last step is not trained), got {objective.timesteps} "
            f"with rollout.steps = {rollout.steps}; use objective.timesteps = {rollout.steps - 1} "
            f"or rollout.steps = {objective.timesteps + 1}"
        )
    if rollout.prompts < len(config.prompts):
        problems.append(
            f"rollout.prompts: at least one an epoch for each of the {len(config.prompts)} sources, "
            f"got {rollout.prompts}; use {len(config.prompts)}"
        )
    visits = rollout.prompts * rollout.group_size * objective.timesteps
    if optimizer.updates_per_epoch > visits:
        problems.append(
            f"optimizer.updates_per_epoch: at most one update per image and timestep "
            f"({rollout.prompts} × {rollout.group_size} × {objective.timesteps} = {visits}), "
            f"got {optimizer.updates_per_epoch}; use {visits}"
        )
    if config.evaluation.prompts < len(config.prompts):
        problems.append(
            f"evaluation.prompts: at least one for each of the {len(config.prompts)} sources, "
            f"got {config.evaluation.prompts}"
        )
    return problems


def _balance(config: Config) -> list[str]:
    balance, problems = config.balance, []
    if balance.finish and config.budget.updates is None:
        problems.append("balance.finish: counts from the end, so budget.updates must be given")
    elif balance.finish and balance.finish >= (config.budget.updates or 0):
        problems.append(f"balance.finish: less than budget.updates = {config.budget.updates}, got {balance.finish}")
    names = [term.reward for term in config.rewards]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f'rewards: "{name}" is given more than once')
    for name in sorted(set(names) & set(config.held_out_rewards)):
        problems.append(f'held_out_rewards: "{name}" is also trained on')
    return problems


def _budget(config: Config) -> list[str]:
    problems = []
    if config.budget.updates is None and config.budget.minutes is None:
        problems.append("budget: give updates, minutes or both")
    stop = config.evaluation.early_stop
    if stop is not None and not config.evaluation.every:
        problems.append("evaluation.early_stop: needs evaluation.every > 0")
    return problems
