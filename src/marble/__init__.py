"""marble: fine-tune any Diffusers text-to-image model on several rewards at once.

Letters used throughout: N images in a batch, K rewards, G images per prompt (a group), T denoising steps,
P trainable parameters, `A[n, k]` advantage, `alpha[k]` balance on the simplex.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marble.advantages import group_advantages
    from marble.balance import Balancer, min_norm_weights
    from marble.config import Config
    from marble.errors import MarbleError
    from marble.evaluation import Evaluation, evaluate
    from marble.gradients import PerRewardGradients, reference_gradients
    from marble.objectives import AffineLoss, awm_loss, nft_loss, ppo_loss
    from marble.policy import Policy
    from marble.prompts import Record
    from marble.rewards import Reward
    from marble.run import Run
    from marble.training import train

_HOMES = {
    "AffineLoss": "marble.objectives",
    "Balancer": "marble.balance",
    "Config": "marble.config",
    "Evaluation": "marble.evaluation",
    "MarbleError": "marble.errors",
    "PerRewardGradients": "marble.gradients",
    "Policy": "marble.policy",
    "Record": "marble.prompts",
    "Reward": "marble.rewards",
    "Run": "marble.run",
    "awm_loss": "marble.objectives",
    "evaluate": "marble.evaluation",
    "group_advantages": "marble.advantages",
    "min_norm_weights": "marble.balance",
    "nft_loss": "marble.objectives",
    "ppo_loss": "marble.objectives",
    "reference_gradients": "marble.gradients",
    "train": "marble.training",
}
__all__ = [
    "AffineLoss",
    "Balancer",
    "Config",
    "Evaluation",
    "MarbleError",
    "PerRewardGradients",
    "Policy",
    "Record",
    "Reward",
    "Run",
    "awm_loss",
    "evaluate",
    "group_advantages",
    "min_norm_weights",
    "nft_loss",
    "ppo_loss",
    "reference_gradients",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import marble` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'marble' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
