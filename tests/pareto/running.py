"""Two tiny real runs of the embedded model."""

from marble.config import demo_config_path, make_config, read_config
from marble.overrides import override
from marble.training import train

BUDGET = [
    *("--prompts", "[{source: mini-places}, {source: mini-objects}]", "--threads", "1", "--budget.updates", "2"),
    *("--rollout.prompts", "2", "--rollout.group_size", "2", "--rollout.steps", "2", "--objective.timesteps", "1"),
    *("--optimizer.updates_per_epoch", "1", "--optimizer.lr", "0.02", "--checkpoint_every", "1"),
    *("--evaluation.prompts", "4", "--evaluation.images", "2", "--evaluation.steps", "2", "--evaluation.every", "0"),
    *("--diagnose_every", "0"),
]
REWARDS = ["mini-aesthetic", "mini-preference", "mini-composition"]


def specialist(folder, reward, *settings):
    """A run on one of `REWARDS`, the others held out."""
    others = ", ".join(name for name in REWARDS if name != reward)
    rewards = ["--rewards", f"[{reward}]", "--held_out_rewards", f"[{others}]"]
    config = make_config(override(read_config(demo_config_path()), [*BUDGET, *rewards, *settings]))
    return train(config, folder).path


def two_runs(folder):
    """On aesthetics and on preference, of different ranks and scales."""
    small = ["--model.lora.rank", "4", "--model.lora.alpha", "16"]  # a power of two folds into the weights exactly
    return [
        specialist(folder / "aesthetic", "mini-aesthetic"),
        specialist(folder / "preference", "mini-preference", *small),
    ]
