"""Importance sampling of visits: more of them where the rewards' gradients are large, each counting for less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marble.config import Objective
from marble.distributed import rank, sum_over_processes
from marble.objectives.visit import Visits, visit_loss
from marble.policy import Policy
from marble.rollout import Rollout
from marble.seeds import derive, generator

_LIMIT = 4.0
"""No visit is expected more than so many times as often as with even visits, nor so many times as rarely."""
_SMALL = 1e-9
"""Nothing is wanted so much less than what is wanted most."""
_DECAY = 0.9
"""Of the average over epochs of what was measured."""


def expected_visits(advantages: Tensor, norms: Tensor, timesteps: int, *, most: float = torch.inf) -> Tensor:
    """How often each image is visited at each step, on average over plans.

    What a visit adds to reward k's gradient is its advantage times its slope's gradient. Optimal importance sampling is
    in proportion to the length of what each visit adds. Here that length is taken to be
    `norms[t] · sqrt(sum_k A[n, k]² / sum_m A[m, k]²)`: every reward's noise counts relative to its own advantages, so
    that images come first which a reward judges that judges few. The advantage-free part of the loss is as large for
    all images, and its estimate gets noisier.

    Args:
        advantages: `[N, K]`, clipped as the loss does; 0 where a reward does not apply.
        norms: `[T − 1]`, typical length of a slope's gradient at each step that is trained; if none is known, equal.
        timesteps: visits per image, on average, at most T − 1.
        most: of any one number, at least `timesteps / (T − 1)`; with 1 no visit comes twice.

    Returns:
        `[N, T − 1]` float64 of sum `N · timesteps`, each between a quarter of the even `timesteps / (T − 1)` and four
        times that, and at most `most`.
    """
    shares = advantages.double().square()
    lengths = (shares / shares.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)).sum(dim=1).sqrt()
    wanted, even = lengths[:, None] * norms.double(), timesteps / len(norms)
    wanted = wanted.clamp_min(wanted.max() * _SMALL) if wanted.any() else torch.ones_like(wanted)
    low, high, count = even / _LIMIT, min(even * _LIMIT, most), wanted.numel() * even
    below, above = 0.0, high / wanted.min().item()  # of what `wanted` is multiplied by
    for _ in range(100):
        factor = (below + above) / 2
        below, above = (below, factor) if (wanted * factor).clamp(low, high).sum() > count else (factor, above)
    return (wanted * above).clamp(low, high)


class StepNorms:
    """How long a slope's gradient typically is at each step of the sampler's grid.

    Measured on one image a step and epoch, whichever process has it, and averaged over epochs.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None  # [T − 1], a moving average
        self._mass = 0.0

    def measure(
        self,
        policy: Policy,
        rollout: Rollout,
        settings: Objective,
        shares: Sequence[range],
        *,
        seed: int,
        epoch: int,
        scale: float = 1.0,
    ) -> Tensor:
        """Measure on some images of an epoch, and average with what was measured before.

        Args:
            policy: trained and old.
            rollout: the images that this process holds.
            settings: of the objective.
            shares: which of all processes' images each holds.
            seed: of the run.
            epoch: which epoch.
            scale: of losses on the way back.

        Returns:
            `[T − 1]` float64, the same in all processes; what is not finite, and what is 0 everywhere, counts for
            nothing.
        """
        count, own = shares[-1].stop, shares[rank()]
        squares = torch.zeros(len(rollout.samples.levels) - 1, dtype=torch.float64)
        order = torch.randperm(count, generator=generator(seed, "probes", epoch)).tolist()
        chosen = [order[step % count] for step in range(len(squares))]  # so that processes share the work
        mine = [step for step, image in enumerate(chosen) if image in own]
        rounds = max(sum(image in other for image in chosen) for other in shares) if policy.in_step else len(mine)
        plain = settings.model_copy(update={"kl": 0.0})
        for number in range(rounds):
            counts = number < len(mine)  # the others only keep step
            step = mine[number] if counts else 0
            image = chosen[step] if counts else own.start
            noise = (derive(seed, "probe", epoch, step),)
            visit = Visits(torch.tensor([image - own.start]), torch.tensor([step]), noise)
            loss, _ = visit_loss(policy, rollout, visit, plain)
            found = torch.autograd.grad(scale * loss.slope.sum(), policy.parameters, allow_unused=True)
            lengths = [torch.linalg.vector_norm(part.float()) for part in found if part is not None]
            del found, loss
            if counts and lengths:
                squares[step] = (torch.stack(lengths).double() / scale).square().sum()
        squares = sum_over_processes(squares)
        if squares.isfinite().all() and squares.any():
            kept = torch.zeros_like(squares) if self._squares is None else self._squares
            self._squares = _DECAY * kept + (1 - _DECAY) * squares
            self._mass = _DECAY * self._mass + 1 - _DECAY
        return torch.ones_like(squares) if self._squares is None else (self._squares / self._mass).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """What later epochs depend on."""
        return {} if self._squares is None else {"squares": self._squares, "mass": self._mass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._squares, self._mass = state.get("squares"), state.get("mass", 0.0)
