"""Direction to parameters: clip, optimise, and move the averages that sample and are exported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marble.config import Config, Optimizer
from marble.errors import MarbleError
from marble.policy import Policy

_SCALE = 2.0**14
_GROWS_AFTER = 200
"""Updates without overflow after which the scale of float16 losses doubles again."""


class Updater:
    """AdamW on what is trained, and what follows it.

    Attributes:
        updates: made so far.
        most: images that fitted into memory in one forward and backward pass, None while all did.
        scale: losses are multiplied by it on the way back and gradients divided: more than 1 in float16 only.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        """Set up for `policy.parameters`."""
        settings = config.optimizer
        self.policy, self.settings, self.config = policy, settings, config
        self.optimizer = _optimizer(policy.parameters, settings)
        self.updates, self.fine = 0, 0
        self.most: int | None = None
        self.scale = _SCALE if config.model.dtype == "float16" else 1.0

    def apply(self, direction: Sequence[Tensor] | None = None, broken: str = "") -> float:
        """Make one update with the gradients collected in the parameters, plus `direction`, `[p]` for each, if given.

        The collected gradients are those of the scaled losses; the direction is to scale already. Its tensors become
        the parameters' gradients and are clipped in place. If float16 overflowed, the update is left out and the
        scale lowered. `broken` says, for the message, which rewards' gradients are not finite.

        Returns:
            The gradient's norm before clipping; NaN if the update was left out.

        Raises:
            MarbleError: it is not finite, whatever the scale; the parameters are left as they were.
        """
        if self.scale != 1:
            for parameter in self.policy.parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.scale
        if direction is not None:
            self._add(direction)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters, self.settings.clip)
        if not norm.isfinite():
            self.back_off(", ".join(part for part in (broken, broken_layers(self.policy)) if part))
            return math.nan
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.fine += 1
        if self.config.model.dtype == "float16" and self.fine % _GROWS_AFTER == 0:
            self.scale = min(2 * self.scale, _SCALE)
        self.policy.copy_adapter("default", "ema", keep=min((1 + self.updates) / (10 + self.updates), self.config.ema))
        return norm.item()

    def back_off(self, where: str) -> None:
        """Count an update that overflowed as made, with a lower scale for the next.

        Raises:
            MarbleError: the scale is as low as it gets, or was never the reason.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale <= 1:
            remedy = "a lower optimizer.lr usually helps"
            if self.config.model.dtype == "float16":
                remedy = "model.dtype: bfloat16 or float32 usually helps"
            raise MarbleError(
                f"the gradient of update {self.updates + 1} is not finite ({where}); what was learned before is "
                f"kept; {remedy}"
            )
        self.scale, self.fine = max(self.scale / 4, 1.0), 0
        self.updates += 1

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
        """The optimiser's state, the count of updates, and the scale of the losses."""
        return {
            "updates": self.updates,
            "fine": self.fine,
            "scale": self.scale,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.updates, self.fine = state["updates"], state["fine"]
        if self.config.model.dtype == "float16":
            self.scale = state["scale"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr


def broken_layers(policy: Policy) -> str:
    """Which of the trained parameters have a gradient that is not finite, the first three by name."""
    trained = {id(parameter) for parameter in policy.parameters}
    named = [(name, p) for name, p in policy.denoiser.named_parameters() if id(p) in trained and p.grad is not None]
    bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    if not bad:
        return f"its norm, over {len(named)} layers"
    return f"in {len(bad)} of {len(named)} layers: {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}"


def _optimizer(parameters: list[torch.nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)
