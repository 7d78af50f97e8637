"""Direction to parameters: clip, optimise, and move the averages that sample and are exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marble.config import Config
from marble.errors import MarbleError
from marble.policy import Policy


class Updater:
    """AdamW on the trained adapter, and what follows it."""

    def __init__(self, policy: Policy, config: Config) -> None:
        """Set up for `policy.parameters`."""
        settings = config.optimizer
        self.policy, self.settings, self.config = policy, settings, config
        self.optimizer = torch.optim.AdamW(
            policy.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.updates = 0

    def apply(self, direction: Sequence[Tensor] | None = None) -> float:
        """Make one update with the gradients collected in the parameters, plus `direction`, `[p]` for each, if given.

        The direction's tensors become the parameters' gradients and are clipped in place.

        Returns:
            The gradient's norm before clipping.

        Raises:
            MarbleError: it is not finite; the parameters are left as they were.
        """
        if direction is not None:
            self._add(direction)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.settings.clip)
        if not norm.isfinite():
            raise MarbleError(
                f"the gradient of update {self.updates + 1} is not finite; what was learned until the last checkpoint "
                "is kept. A lower optimizer.lr usually helps"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.policy.copy_adapter("default", "ema", keep=min((1 + self.updates) / (10 + self.updates), self.config.ema))
        return norm.item()

    def end_epoch(self) -> float:
        """Move the sampling policy towards the trained one; returns how much of it was kept."""
        keep = self.config.objective.old.at(self.updates)
        self.policy.copy_adapter("default", "old", keep=keep)
        return keep

    def _add(self, direction: Sequence[Tensor]) -> None:
        for parameter, part in zip(self.policy.parameters, direction, strict=True):
            part = part.view_as(parameter).to(parameter.dtype)
            parameter.grad = part if parameter.grad is None else parameter.grad + part

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state and the count of updates."""
        return {"updates": self.updates, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
