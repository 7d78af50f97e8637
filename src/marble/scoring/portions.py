"""Makes and judges what is left of an evaluation, a portion a process at a time, and draws the conclusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marble.distributed import decide, gather_rows, is_main, rank, world
from marble.errors import MarbleError
from marble.evaluation import SHOWN_IMAGES, SHOWN_PROMPTS, Evaluation, make_and_judge, sample_of
from marble.policy import Policy
from marble.rewards import Reward, RewardTable, load_rewards, prepare_rewards
from marble.rewards.cache import ScoreCache
from marble.rewards.closed_form import Distance
from marble.rewards.gather import gather_table
from marble.rewards.judging import to_bytes
from marble.scoring.folder import Folder
from marble.scoring.overlay import Overlay
from marble.scoring.plan import Plan, check_comparable, read_evaluation
from marble.scoring.summary import summarise
from marble.setup import load_policy

Watch = Callable[[int, int], object]
"""Is told how many portions are finished, and of how many."""


def score(plan: Plan, out: Path, watch: Watch = lambda done, total: None) -> dict[str, Any]:
    """Make an evaluation, or go on with it; all processes have to call this.

    Args:
        plan: what is to be evaluated.
        out: its folder, new or of this very evaluation.
        watch: is told of the progress, in the main process.

    Returns:
        What stands in `out/evaluation.json` then.

    Raises:
        MarbleError: the folder holds something else, a model or reward cannot be had, or a reward failed on a
            portion and gave no score for it (which is then not kept).
    """
    folder = Folder(out)
    if decide(lambda: plan.setup) | {"files": []} != plan.setup | {"files": []}:  # copies may differ in their times
        raise MarbleError("this process was given another evaluation than the main one; all must have the same")
    finished = decide(lambda: folder.enter(plan.setup))
    if finished is not None:
        return finished
    if plan.config.threads:
        torch.set_num_threads(plan.config.threads)
    rewards = _rewards(plan)
    setup = plan.setup | {"revisions": {reward.name: getattr(reward, "revision", "") for reward in rewards}}
    if isinstance(plan.against, Path):
        check_comparable(plan, read_evaluation(plan.against), setup["revisions"])
    decide(lambda: folder.begin(setup))
    sides = _Sides(plan, rewards, folder, watch)
    reference = None
    if isinstance(plan.against, Overlay):
        reference = sides.score("reference", plan.against, "--against")
    elif plan.against is not None:
        reference = Evaluation.from_json(read_evaluation(plan.against)["evaluated"])
    evaluated = sides.score("evaluated", plan.evaluated, "--lora")
    return decide(lambda: folder.finish(_result(plan, setup, rewards, evaluated, reference)))


def _rewards(plan: Plan) -> list[Reward]:
    """Those of the config, ready, and the closed-form diversity if none is called so and there are images to differ."""
    rewards = load_rewards(plan.uses)
    prepare_rewards(rewards)
    if len(plan.seeds) > 1 and Distance.name not in [reward.name for reward in rewards]:
        rewards.append(Distance())
    return rewards


def _result(
    plan: Plan, setup: dict[str, Any], rewards: Sequence[Reward], evaluated: Evaluation, reference: Evaluation | None
) -> dict[str, Any]:
    found = {reward.name: getattr(reward, "accuracy_above", None) for reward in rewards}
    summary = summarise(evaluated, reference, {name: above for name, above in found.items() if above is not None})
    kinds = setup["kinds"] + ["held-out"] * (len(rewards) - len(setup["kinds"]))  # the closed-form diversity
    return {
        "setup": setup,
        "rewards": {
            name: {"kind": kind} | asdict(each) for (name, each), kind in zip(summary.items(), kinds, strict=True)
        },
        "evaluated": evaluated.to_json(),
        "reference": None if reference is None else reference.to_json(),
    }


class _Sides:
    """Scores one side after the other; the base model, once loaded, is what a LoRA is laid over next."""

    def __init__(self, plan: Plan, rewards: Sequence[Reward], folder: Folder, watch: Watch) -> None:
        self.plan, self.rewards, self.folder, self.watch = plan, rewards, folder, watch
        self.names = [reward.name for reward in rewards]
        self.cache = ScoreCache.default() if any(ScoreCache.holds(reward) for reward in rewards) else None
        self.total = len(plan.portions) * (2 if isinstance(plan.against, Overlay) else 1)
        self.done = 0
        self._base: Policy | None = None

    def score(self, side: str, overlay: Overlay, field: str) -> Evaluation:
        """What is left of one side, and then all of it."""
        pending = decide(lambda: [i for i in range(len(self.plan.portions)) if self._known(side, i) is None])
        self._advance(len(self.plan.portions) - len(pending))
        policy = self._load(overlay, field) if pending else None
        for start in range(0, len(pending), world()):
            assert policy is not None
            numbers = pending[start : start + world()]
            self._round(side, policy, numbers)
            self._advance(len(numbers))
        return Evaluation.from_json(decide(lambda: self._whole(side).to_json()))

    def _load(self, overlay: Overlay, field: str) -> Policy:
        policy, self._base = self._base or load_policy(self.plan.config), None
        overlay.lay_over(policy, field)
        if overlay.empty:
            self._base = policy
        return policy

    def _round(self, side: str, policy: Policy, numbers: Sequence[int]) -> None:
        """A portion in each process; the main one writes those on which no reward failed altogether.

        One that answers without a number has judged: its scores are missing, and would be again.

        Raises:
            MarbleError: a reward raised or was away, and gave no score for a portion; in all processes.
        """
        portions, each = [self.plan.portions[i] for i in numbers], len(self.plan.seeds)
        mine = portions[rank()] if rank() < len(portions) else range(0)
        evaluation = self.plan.config.evaluation
        table, images, failed = make_and_judge(
            policy,
            self.rewards,
            self.plan.prompts[mine.start : mine.stop],
            seeds=self.plan.seeds,
            steps=evaluation.steps,
            adapter=None,
            batch=self.plan.config.rollout.batch,
            guidance=evaluation.guidance,
            scheduler=evaluation.scheduler,
            frames=self.plan.config.rollout.judged_frames,
            cache=self.cache,
        )
        failures = gather_rows(
            torch.tensor([[name in failed for name in self.names]]), range(rank(), rank() + 1), world()
        )
        lengths = [len(portion) * each for portion in portions]
        tables = _cut(gather_table(table, _own(lengths), sum(lengths)), lengths)
        shown = [len(portion) if portion.start < SHOWN_PROMPTS else 0 for portion in portions]
        samples = _samples(images, each)[: len(_own(shown))]
        samples = gather_rows(samples, _own(shown), sum(shown)) if sum(shown) else samples
        lost: dict[str, None] = {}
        for i, (number, portion, part, some) in enumerate(
            zip(numbers, portions, tables, samples.split(shown), strict=True)
        ):
            absent = [name for name in part.silent if failures[i, self.names.index(name)]]
            lost |= dict.fromkeys(absent)
            if is_main() and not absent:
                self.folder.write(side, number, part, portion.start, some)
        if lost:
            raise MarbleError(
                f"rewards: no score of {', '.join(lost)} for any picture of a portion (the warnings above say why); "
                "it is not kept, and the same command goes on from there"
            )

    def _known(self, side: str, number: int) -> RewardTable | None:
        return self.folder.read(side, number, len(self.plan.portions[number]) * len(self.plan.seeds), self.names)

    def _whole(self, side: str) -> Evaluation:
        """All portions of a side, in the main process."""
        parts = [part for i in range(len(self.plan.portions)) if (part := self._known(side, i)) is not None]
        table = RewardTable.of(
            self.names, torch.cat([part.scores for part in parts]), torch.cat([part.wanted for part in parts])
        )
        texts, missing = [record.text for record in self.plan.prompts], table.metrics().get("missing", {})
        return Evaluation(table.names, table.scores, texts, torch.empty(0), missing)

    def _advance(self, count: int) -> None:
        self.done += count
        if is_main():
            self.watch(self.done, self.total)


def _own(lengths: Sequence[int]) -> range:
    """The rows of this process, if process i has `lengths[i]` of them."""
    start = sum(lengths[: rank()])
    return range(start, start + lengths[rank()]) if rank() < len(lengths) else range(0)


def _cut(table: RewardTable, lengths: Sequence[int]) -> list[RewardTable]:
    parts = zip(table.scores.split(list(lengths)), table.wanted.split(list(lengths)), strict=True)
    return [RewardTable.of(table.names, scores, wanted) for scores, wanted in parts]


def _samples(images: Tensor, each: int) -> Tensor:
    """`[prompts, images, 3, H, W]` uint8: the first few of every prompt's `each`, of `[prompts · each, …]`."""
    if not len(images):
        return torch.empty(0, dtype=torch.uint8)
    chosen = [sample_of(image) for i, image in enumerate(images) if i % each < SHOWN_IMAGES]
    pixels = to_bytes(torch.stack(chosen))
    return pixels.view(-1, min(each, SHOWN_IMAGES), *pixels.shape[1:])
