"""Records one call of a pipeline: what its denoiser and its scheduler are given and answer."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marble.errors import MarbleError
from marble.noise import Trajectory
from marble.watch.conditioning import Conditioning
from marble.watch.manner import Manner, as_sample
from marble.watch.tree import KEEP, rebuild


@dataclass(frozen=True)
class Seen:
    """What one call of the pipeline showed."""

    conditioning: Conditioning
    told: Tensor  # [T] timesteps as the denoiser was told
    steps: Tensor  # [T] timesteps as the scheduler calls them
    x0: Tensor  # [N, …] the scheduler's last sample
    trajectory: Trajectory | None = None  # if the scheduler is one that notes it (`sde`)


class Watch:
    """`with Watch(pipe, part) as watch: pipe(...)`, then `watch.seen(manner)`.

    Attributes:
        calls: the denoiser's arguments by name; of later calls only numbers and short tensors, unless `whole`.
        outputs: its answers, if `whole`.
        steps: the scheduler's timestep, sample and model output of each of its steps; the last two only if `whole`.
        last: the scheduler's last sample.
        taken: what the scheduler noted of its steps, if it does.
    """

    def __init__(self, pipe: Any, part: str, *, whole: bool = False) -> None:
        """Watch `pipe`, whose denoiser is its component `part`; `whole`: keep everything."""
        self.pipe, self.part, self.whole = pipe, part, whole
        self.calls: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.steps: list[tuple[Any, Tensor | None, Tensor | None]] = []
        self.last: Tensor | None = None
        self.taken: list[tuple[Tensor, Tensor]] | None = None

    def __enter__(self) -> Watch:
        denoiser, scheduler = getattr(self.pipe, self.part), self.pipe.scheduler
        signature, step = inspect.signature(denoiser.forward), scheduler.step
        step_signature = inspect.signature(step)

        def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
            bound = _bound(signature, args, kwargs)
            if self.whole:
                bound = rebuild(bound, _copied)
            elif self.calls:  # the conditioning is kept once; of later calls only what may change
                bound = {k: v for k, v in bound.items() if isinstance(v, Tensor) and v.ndim <= 2}
            self.calls.append(bound)

        def after_forward(module: nn.Module, args: tuple, output: Any) -> None:
            self.outputs.append(output)

        @functools.wraps(step)  # pipelines look at its signature to see whether it takes a generator
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            given = step_signature.bind(*args, **kwargs).arguments  # by name: their order differs
            sample, output = given["sample"], given["model_output"]
            self.steps.append((given["timestep"], *((sample.clone(), output.clone()) if self.whole else (None, None))))
            result = step(*args, **kwargs)
            self.last = result[0] if isinstance(result, tuple) else result.prev_sample
            return result

        self._hooks = [denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)]
        if self.whole:
            self._hooks.append(denoiser.register_forward_hook(after_forward))
        scheduler.step = watched_step
        if hasattr(scheduler, "taken"):
            scheduler.taken = []
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        scheduler = self.pipe.scheduler
        del scheduler.step
        if hasattr(scheduler, "taken"):
            self.taken, scheduler.taken = scheduler.taken, None

    def tensors(self, step: int) -> tuple[Tensor, Tensor]:
        """The scheduler's sample and, without a variance, model output at one of its steps, of a `whole` watch."""
        sample, output = self.steps[step][1:]
        assert sample is not None
        assert output is not None
        return sample, as_sample(output, sample)

    def check_calls(self) -> None:
        """Check that the denoiser was called once for every step of the scheduler.

        Raises:
            MarbleError: says how often each was called.
        """
        if self.calls and len(self.calls) == len(self.steps) and self.last is not None:
            return
        hint = ""
        if len(self.calls) == 2 * len(self.steps) > 0:
            hint = " (is that classifier-free guidance? Training goes without; set rollout.guidance to 1)"
        raise MarbleError(
            f"{type(self.pipe).__name__} cannot be watched: expected one call of {self.part} for every scheduler.step, "
            f"saw {len(self.calls)} and {len(self.steps)}{hint}"
        )

    def seen(self, manner: Manner, each: int | None = None) -> Seen:
        """What was seen, in the terms of a known `manner`, of a call for `each` images of every prompt.

        Raises:
            MarbleError: the pipeline did otherwise this time.
        """
        self.check_calls()
        assert self.last is not None
        count = len(self.last)
        try:
            conditioning = Conditioning.of_call(manner, self.calls[0], count, each)
        except (KeyError, ValueError, TypeError) as error:
            raise MarbleError(
                f"{type(self.pipe).__name__} called its {self.part} otherwise than when it was watched: {error} (with "
                "classifier-free guidance? Training goes without; set rollout.guidance to 1)"
            ) from error
        told = torch.stack([call[manner.timestep].flatten()[0] for call in self.calls])
        steps = torch.stack([torch.as_tensor(step[0]) for step in self.steps])
        trajectory = Trajectory.of_steps(self.taken, self.pipe.scheduler.transitions) if self.taken else None
        return Seen(conditioning, told.float().cpu(), steps.cpu(), self.last.detach(), trajectory)


def _bound(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by name; those of a `**kwargs` among the others."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


def _copied(path: Any, node: Any) -> Any:
    """For `rebuild`: tensors copied, for some pipelines write the next latents where the last ones were."""
    return node.clone() if isinstance(node, Tensor) else KEEP
