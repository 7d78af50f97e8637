"""How the engine's tests compare it with one plain backward a reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from marble import AffineLoss, PerRewardGradients, reference_gradients

Forward = Callable[[], AffineLoss]


def random_advantages(count: int, rewards: int = 5, seed: int = 4) -> Tensor:
    """`[N, K]`, some beyond the clip at 5 and about a third 0, as where a reward does not apply."""
    generator = torch.Generator().manual_seed(seed)
    advantages = 3 * torch.randn(count, rewards, generator=generator)
    return advantages * (torch.rand(count, rewards, generator=generator) > 0.3)


def random_applies(count: int, rewards: int = 5, seed: int = 5) -> Tensor:
    """`[N, K]` bool; the first reward judges every image, the last none."""
    applies = torch.rand(count, rewards, generator=torch.Generator().manual_seed(seed)) > 0.4
    applies[:, 0] = True
    applies[:, -1] = False
    return applies


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def plain_rows(module: nn.Module, forward: Forward, advantages: Tensor, applies: Tensor | None = None) -> Tensor:
    return reference_gradients(forward(), advantages, trainable(module), applies)


def engine_rows(
    module: nn.Module, forward: Forward, advantages: Tensor, applies: Tensor | None = None, **options: object
) -> tuple[Tensor, float]:
    """The engine's rows and the share of parameters on its fast path."""
    with PerRewardGradients(module, **options) as engine:
        rows = engine.compute(forward(), advantages, applies)
    assert all(a is b for a, b in zip(engine.parameters, trainable(module), strict=True))
    return rows, engine.fast_share


def distance(rows: Tensor, reference: Tensor) -> Tensor:
    """`[K]`: `|row − reference| / |reference|`; where the reference is 0, 0 or infinity."""
    gap, size = (rows.double() - reference.double()).norm(dim=1), reference.double().norm(dim=1)
    return torch.where(gap == 0, 0.0, gap / size)


def assert_rows(module: nn.Module, rows: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Every reward's row is within `tolerance` of the reference, and no parameter hides behind larger ones."""
    assert rows.shape == reference.shape
    assert rows.isfinite().all()
    assert distance(rows, reference).max() <= tolerance, f"relative errors {distance(rows, reference).tolist()}"
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in trainable(module)]
    least = 0.1 * tolerance * reference.norm(dim=1)
    for name, row, expected in zip(names, rows.split(sizes, dim=1), reference.split(sizes, dim=1), strict=True):
        gap = (row - expected).norm(dim=1)
        assert (gap <= 10 * tolerance * expected.norm(dim=1) + least).all(), f"{name}: {gap.tolist()}"


def assert_equal(
    module: nn.Module,
    forward: Forward,
    advantages: Tensor,
    applies: Tensor | None = None,
    tolerance: float = 1e-5,
    **options: object,
) -> float:
    """Engine and reference agree; returns the share on the fast path."""
    reference = plain_rows(module, forward, advantages, applies)
    assert reference.abs().max() > 0
    rows, share = engine_rows(module, forward, advantages, applies, **options)
    assert_rows(module, rows, reference, tolerance)
    return share


def assert_equal_or_refused(
    module: nn.Module, forward: Forward, advantages: Tensor, applies: Tensor | None = None
) -> None:
    """For what the engine need not support: a wrong answer without an error is the only failure."""
    reference = plain_rows(module, forward, advantages, applies)
    try:
        rows, _ = engine_rows(module, forward, advantages, applies)
    except ValueError:
        return
    assert_rows(module, rows, reference)
