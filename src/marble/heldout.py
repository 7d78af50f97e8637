"""Held-out evaluation in the course of a run: before, on the way (with early stop), after; and the samples shown."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from torch import Tensor

from marble.config import Config
from marble.distributed import agree, decide, is_main
from marble.errors import MarbleError
from marble.evaluation import (
    SHOWN_IMAGES,
    SHOWN_PROMPTS,
    Evaluation,
    evaluate,
    fixed_seeds,
    gains,
    sample_of,
    save_sample,
)
from marble.rewards.cache import ScoreCache
from marble.run import Run
from marble.setup import Parts, tracked

log = logging.getLogger("marble")


class HeldOut:
    """Evaluates a run's model on the same prompts and seeds every time."""

    def __init__(self, run: Run, config: Config, parts: Parts) -> None:
        """Set up; nothing is evaluated yet."""
        self.run, self.config, self.parts = run, config, parts
        self.rewards = [*parts.rewards, *parts.held_out_rewards]
        self.seeds = fixed_seeds(config.evaluation.images)
        self.tracked = tracked(config)
        self.cache = ScoreCache.default() if any(ScoreCache.holds(reward) for reward in self.rewards) else None
        self.start: Evaluation | None = None
        self.strikes = 0
        self.best = self._average() if config.evaluation.early_stop else {}

    def _average(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu().clone() for key, value in self.parts.policy.adapter_state("ema").items()}

    @property
    def fallen(self) -> bool:
        """Whether the early-stop reward has been below its start for long enough."""
        return self.strikes >= self.config.evaluation.patience

    def _evaluate(self, count: int, adapter: str | None, shown: int = 0) -> Evaluation:
        settings = self.config.evaluation
        prompts = self.parts.held_out_prompts[:count]
        return evaluate(
            self.parts.policy,
            self.rewards,
            prompts,
            seeds=self.seeds,
            steps=settings.steps,
            adapter=adapter,
            batch=self.config.rollout.batch,
            guidance=settings.guidance,
            scheduler=settings.scheduler,
            frames=self.config.rollout.judged_frames,
            shown=shown,
            cache=self.cache,
        )

    def before(self) -> None:
        """Evaluate the base model, unless an earlier part of this run has; log it as update 0."""
        known = decide(lambda: {key: self.run.evaluation().get(key) for key in ("before", "revisions")})
        if known["before"] is not None:
            self.start = Evaluation.from_json(known["before"])
            for reward in self.rewards:
                then, now = (known["revisions"] or {}).get(reward.name), getattr(reward, "revision", "")
                if then is not None and then != now:
                    log.warning(
                        'reward %s: "%s" judged the base model and "%s" judges now: what they say cannot be compared',
                        *(reward.name, then, now),
                    )
            return
        adapter = None if self.config.model.lora.start is None else "ema"  # where training starts from
        self.start = self._evaluate(len(self.parts.held_out_prompts), adapter, SHOWN_PROMPTS)
        if self.start.silent:
            raise MarbleError(
                f"rewards: no score of {', '.join(self.start.silent)} for any of the base model's pictures (the "
                "warnings above say why); nothing has been trained"
            )
        self._show(self.start, "before")
        self.run.write_evaluation(self._content(self.start))
        self.run.log({"update": 0, "held_out": self._first(self.start).means()})

    def on_the_way(self) -> tuple[dict[str, Any], bool]:
        """Evaluate the average of the adapter so far on the tracked prompts.

        Returns:
            Metrics: mean score by reward, and how many images each gave no score for, if any. Whether to stop, because
            the early-stop reward has been significantly below its start for `patience` evaluations in a row (the
            exported average is then that before the fall); one without a score counts neither way.
        """
        now = self._evaluate(self.tracked, "ema")
        name = self.config.evaluation.early_stop
        if name is not None and self.start is not None:
            gain = gains(self._first(self.start), now).get(name)  # none if it gave no score
            fallen = agree(gain is not None and gain.high < 0)
            self.strikes = self.strikes + 1 if fallen else self.strikes if gain is None else 0
            if not fallen and gain is not None:
                self.best = self._average()
        if self.fallen:
            self.parts.policy.load_adapter_state("ema", self.best)
        metrics: dict[str, Any] = {"held_out": now.means()}
        return metrics | ({"held_out_missing": now.missing} if now.missing else {}), self.fallen

    def after(self) -> None:
        """Evaluate what is exported on all held-out prompts; write `evaluation.json` and the samples.

        Raises:
            MarbleError: a reward gave no score at all; nothing is written, so that it can be tried again.
        """
        end = self._evaluate(len(self.parts.held_out_prompts), "ema", SHOWN_PROMPTS)
        if end.silent:
            raise MarbleError(
                f"rewards: no score of {', '.join(end.silent)} for any of the pictures made after training (the "
                "warnings above say why); what was learned is exported, and marble train --resume evaluates it again"
            )
        self._show(end, "after")
        assert self.start is not None
        self.run.write_evaluation(self._content(self.start, end))

    def state_dict(self) -> dict[str, Any]:
        """What early stopping remembers."""
        return {"strikes": self.strikes, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.strikes, self.best = state["strikes"], state["best"]

    def _first(self, whole: Evaluation) -> Evaluation:
        each = len(self.seeds)
        return Evaluation(
            whole.names,
            whole.scores[: self.tracked * each],
            whole.prompts[: self.tracked],
            whole.images[: self.tracked * each],
        )

    def _content(self, before: Evaluation, after: Evaluation | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {
            "training_rewards": [reward.name for reward in self.parts.rewards],
            "held_out_rewards": [reward.name for reward in self.parts.held_out_rewards],
            "revisions": {reward.name: getattr(reward, "revision", "") for reward in self.rewards},
            "seeds": self.seeds,
            "steps": self.config.evaluation.steps,
            "guidance": self.parts.policy.caller.guided(self.config.evaluation.guidance),
            "sources": [record.source for record in self.parts.held_out_prompts],
            "before": before.to_json(),
        }
        if after is not None:
            content["after"] = after.to_json()
            content["gains"] = {name: asdict(gain) for name, gain in gains(before, after).items()}
        return content

    def _show(self, evaluation: Evaluation, name: str) -> None:
        """Write the first images of the first prompts as `samples/NAME/PPP_I.png`, in the main process."""
        if not is_main():
            return
        folder = self.run.path / "samples" / name
        folder.mkdir(parents=True, exist_ok=True)
        each = len(self.seeds)
        for p in range(min(SHOWN_PROMPTS, len(evaluation.prompts))):
            for i in range(min(SHOWN_IMAGES, each)):
                save_sample(sample_of(evaluation.images[p * each + i]), folder, p, i)
