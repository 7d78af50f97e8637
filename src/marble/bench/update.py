"""The update phase on a denoiser of some shape: old and trained forward, backward, balance, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from marble.balance import Balancer
from marble.bench.measure import interleaved, peak_bytes, ratio, summary
from marble.bench.shapes import Shape
from marble.gradients import PerRewardGradients, gram_of, reference_gradients, whole_gram
from marble.objectives import AffineLoss, nft_loss

REFRESH = 10
_MIXED = ("weighted sum", "exact")
"""What an amortised schedule consists of: its time is theirs in proportion, its peak the higher one."""


class Phase:
    """A denoiser with LoRA, and an update of it in several ways."""

    def __init__(
        self, shape: Shape, *, batch: int, rewards: int, rank: int, checkpointing: bool, dtype: str, device: str
    ) -> None:
        """Build it: `dtype` is fp32, or bf16 for frozen weights in bfloat16 under autocast."""
        from peft import LoraConfig

        torch.manual_seed(0)
        self.device, self.half = torch.device(device), dtype == "bf16"
        with torch.device(self.device):
            network: Any = shape.build()
        network = network.to(torch.bfloat16 if self.half else torch.float32).requires_grad_(False).train()
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=shape.targets)
        network.add_adapter(settings)
        self.network: nn.Module = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        if checkpointing:
            network.enable_gradient_checkpointing()
        self.latent_argument = shape.latent_argument
        self.x_t, self.x0 = torch.randn(2, batch, *shape.latents).to(self.device)
        self.inputs = _to(shape.inputs(batch), self.device)
        self.timestep = (torch.rand(batch) * 1000).to(self.device)
        self.advantages = torch.randn(batch, rewards).to(self.device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.engine = PerRewardGradients(network, parameters=self.parameters)
        self.balancer = Balancer(rewards, refresh=1, smooth="gram", fold=True)

    def loss(self) -> AffineLoss:
        """Both forward passes; the adapter stands for the old policy's too, which costs the same."""
        with torch.no_grad():
            old = self._predict()
        return nft_loss(self.x0, self._predict(), old + 0.01 * self.x0, beta=0.1, amax=5.0)

    def _predict(self) -> Tensor:
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()
        with cast:
            arguments = {self.latent_argument: self.x_t, "timestep": self.timestep, **self.inputs}
            return self.x_t - 0.5 * self.network(**arguments)[0].float()

    def weighted_sum(self, backwards: int = 1) -> None:
        """One backward pass; with two, what no exact update can go below."""
        each = self.loss().at(self.advantages.mean(dim=1)).mean()
        for left in reversed(range(backwards)):
            each.backward(retain_graph=left > 0)
        self._step()

    def exact(self) -> None:
        """Every reward's gradient by the engine, and a solve."""
        rewards = self.advantages.shape[1]
        rows = self.engine.rows(rewards, 1)
        weights = self.advantages / len(self.x0)
        with self.engine:
            loss = self.loss()
            self.engine.accumulate(rows, loss, weights, torch.full_like(weights[:, :1], 1 / len(weights)))
        self.balancer.step(whole_gram(rows.gram()))
        self._step(rows.mix(torch.cat([self.balancer.coefficients, torch.ones(1)])))

    def by_backwards(self) -> None:
        """Every reward's gradient by a backward pass of its own, and a solve."""
        rows = reference_gradients(self.loss(), self.advantages, self.parameters)
        self.balancer.step(gram_of(rows))
        self._step((self.balancer.coefficients.to(rows) @ rows).split(self.engine.sizes))

    def _step(self, direction: Sequence[Tensor] = ()) -> None:
        for parameter, part in zip(self.parameters, direction, strict=False):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def error(self) -> float:
        """Largest relative error of the engine's rows against K backward passes."""
        with self.engine:
            loss = self.loss()
            ours = self.engine.compute(loss, self.advantages)
            true = reference_gradients(loss, self.advantages, self.parameters).float()
        return ((ours - true).norm(dim=1) / true.norm(dim=1)).max().item()

    def held_bytes(self) -> int:
        """What lies in memory between updates: weights, inputs, optimiser state."""
        inputs = [self.x_t, self.x0, self.timestep, self.advantages, *_tensors(self.inputs)]
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.network.parameters(), *inputs, *state])


def bench_update(
    shape: Shape,
    *,
    rewards: int,
    batch: int | None = None,
    rank: int = 32,
    checkpointing: bool = False,
    dtype: str = "fp32",
    device: str = "cpu",
    repeats: int = 7,
    slow: bool = True,
) -> dict[str, Any]:
    """Measure one shape at one number of rewards.

    Args:
        shape: one of `SHAPES`.
        rewards: K.
        batch: N; the shape's own, if not given.
        rank: of the LoRA.
        checkpointing: recompute activations in the backward pass (then the floor is higher).
        dtype: fp32 or bf16.
        device: cpu or cuda.
        repeats: rounds.
        slow: measure K backward passes too.

    Returns:
        For every arm `seconds`, `against_weighted_sum` and `peak_bytes`; `floor` (two plain backward passes against
        one), `over_floor` (exact against that), the engine's `error`, `fast_share` and `engine_share` of an update.
    """
    options: dict[str, Any] = {"rank": rank, "checkpointing": checkpointing, "dtype": dtype, "device": device}
    phase = Phase(shape, batch=batch or shape.batch, rewards=rewards, **options)
    arms: dict[str, Callable[[], None]] = {
        "weighted sum": phase.weighted_sum,
        "two plain backwards": lambda: phase.weighted_sum(backwards=2),
        "exact": phase.exact,
    }
    if slow:
        arms["exact by K backwards"] = phase.by_backwards
    error = phase.error()
    seconds = interleaved(arms, repeats, phase.device)
    plain, exact, floor = seconds["weighted sum"], seconds["exact"], seconds["two plain backwards"]
    amortised = f"amortised N={REFRESH}, from {_MIXED[1]} and {_MIXED[0]}"
    seconds[amortised] = [((REFRESH - 1) * p + e) / REFRESH for p, e in zip(plain, exact, strict=True)]
    held = phase.held_bytes()
    result: dict[str, Any] = {
        "batch": len(phase.x0),
        "rewards": rewards,
        "parameters": phase.engine.count,
        **options,
        "repeats": repeats,
        "floor": ratio(floor, plain),
        "over_floor": ratio(exact, floor),
        "engine_share": summary([(e - f) / e for e, f in zip(exact, floor, strict=True)]),
        "error": error,
        "fast_share": phase.engine.fast_share,
        "arms": {},
    }
    for name, values in seconds.items():
        row = {"seconds": summary(values), "against_weighted_sum": ratio(values, plain)}
        if name in arms:
            row["peak_bytes"] = held + peak_bytes(arms[name], phase.device)  # type: ignore[assignment]
        result["arms"][name] = row
    result["arms"][amortised]["peak_bytes"] = max(result["arms"][name]["peak_bytes"] for name in _MIXED)
    return result


def _to(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    return {name: _to(value, device) for name, value in values.items()}


def _tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [t for value in values.values() for t in _tensors(value)]
