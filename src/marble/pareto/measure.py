"""Scores of every point on the same held-out prompts: taken from the runs that have them, made where they lack.

A point is whole in `points/NAME.json` or absent, so that what was broken off goes on. Its first prompts' pictures lie
in `points/NAME/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from marble.config import Config
from marble.errors import MarbleError
from marble.evaluation import Evaluation, evaluate, fixed_seeds, sample_of, save_sample
from marble.pareto.points import Point
from marble.pareto.runs import Source, terms_of
from marble.policy.mixing import Stored, file_stamps, mixture_of, model_files
from marble.prompts import Record
from marble.rewards import Reward, check_rewards, load_rewards, prepare_rewards
from marble.rewards.cache import ScoreCache
from marble.setup import held_out_prompts, load_policy
from marble.storage import write_atomic

SHOWN = 6
"""How many prompts' first pictures are kept of each point."""


@dataclass(frozen=True)
class Measured:
    """A point with its scores."""

    point: Point
    evaluation: Evaluation  # without images
    revisions: dict[str, str]  # of the rewards that judged
    taken: str  # the file whose scores these are; empty if they were made for the front


class Measurer:
    """Judges points by the first run's terms."""

    def __init__(self, sources: Sequence[Source], out: Path, *, anew: bool = False) -> None:
        """Set up, loading nothing heavy.

        Args:
            sources: finished runs, judged alike.
            out: folder of the front.
            anew: make and judge all pictures, whatever is known; broken off, it starts over.

        Raises:
            MarbleError: the prompts or rewards cannot be had, or no server of one answers.
        """
        self.sources, self.folder, self.anew = sources, out / "points", anew
        self.config: Config = sources[0].config
        self.rewards: list[Reward] = load_rewards([*self.config.rewards, *self.config.held_out_rewards])
        check_rewards(self.rewards)  # a served one goes by the name that its server tells
        self.names = [reward.name for reward in self.rewards]
        self.prompts: list[Record] = held_out_prompts(self.config)
        self.seeds = fixed_seeds(self.config.evaluation.images)

    def measure(self, points: Sequence[Point], watch: Callable[[Point], None] = lambda point: None) -> list[Measured]:
        """The scores of all points, in order; `watch` is told of each when it has them.

        Raises:
            MarbleError: weights are not there or do not fit, or rewards judge otherwise than they did.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Measured] = {}
        for point in points:
            known = None if self.anew else self._known(point) or self._taken(point)
            if known is not None:
                found[point.name] = known
                watch(point)
        _refuse_revisions([*found.values()])
        pending = [point for point in points if point.name not in found]
        if absent := sorted({str(stored.path) for p in pending for stored in p.parts if not stored.files}):
            raise MarbleError(f"there are no weights in {', '.join(absent)}, which are needed to make pictures")
        if pending:
            self._make(pending, found, watch)
        return [found[point.name] for point in points]

    # ---- what is known --------------------------------------------------------------------------------

    def _stamp(self, point: Point) -> Any:
        """What a point's scores depend on; weights and the model by their files' sizes and times."""
        weights = [[_stamp_of(stored), weight] for stored, weight in point.parts.items()]
        stamp = {
            "marble": version("marble-diffusion"),
            "terms": terms_of(self.config),
            "prompts": [asdict(record) for record in self.prompts],
            "model": model_files(self.config.model),
            "weights": weights,
        }
        return json.loads(json.dumps(stamp))

    def _known(self, point: Point) -> Measured | None:
        """What an earlier call has measured, if it was the same."""
        try:
            content = json.loads(self._file(point).read_text(encoding="utf-8"))
            if content["stamp"] != self._stamp(point):
                return None
            evaluation = Evaluation.from_json(content["evaluation"])
            return Measured(point, evaluation, content["revisions"], content["taken"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _taken(self, point: Point) -> Measured | None:
        """What a run's own evaluation says of its model or of the base, if it was made by the same terms.

        Of a run that was judged on more prompts, those in common count.
        """
        which = "before" if point.kind == "base" else "after"
        for source in self.sources if point.kind == "base" else filter(None, [point.exported]):
            if which == "before" and source.config.model.lora.start is not None:
                continue  # it was judged with the LoRA that the run went on from
            content, original = source.run.evaluation(), terms_of(source.run.config)
            wanted = terms_of(self.config)
            count = original.pop("evaluation.prompts"), wanted.pop("evaluation.prompts")
            texts = content[which]["prompts"]
            rows = {text: i for i, text in enumerate(texts)}
            if original != wanted or count[0] < count[1] or content.get("seeds") != self.seeds:
                continue
            if any(p.text not in rows for p in self.prompts) or set(self.names) != set(content[which]["names"]):
                continue
            chosen = [rows[p.text] for p in self.prompts]
            evaluation = _part_of(Evaluation.from_json(content[which]), chosen, self.names)
            for p, i in enumerate(chosen[:SHOWN]):
                picture = source.run.path / "samples" / which / f"{i:03d}_0.png"
                if picture.is_file():
                    shutil.copyfile(picture, self._pictures(point) / f"{p:03d}_0.png")
            file = str(source.run.path / "evaluation.json")
            return self._write(Measured(point, evaluation, content.get("revisions", {}), file))
        return None

    # ---- what is made ---------------------------------------------------------------------------------

    def _make(self, points: Sequence[Point], found: dict[str, Measured], watch: Callable[[Point], None]) -> None:
        """Make and judge the pictures of `points`, and add them to `found`."""
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        prepare_rewards(self.rewards)
        revisions = {reward.name: getattr(reward, "revision", "") for reward in self.rewards}
        model = config.model.model_copy(update={"shard": False, "checkpointing": False})
        policy = load_policy(config.model_copy(update={"model": model}))
        mixture = mixture_of(policy, whole=model.train == "full", dtype=model.dtype)
        policy.learn(guidance=config.rollout.guidance, scheduler=config.rollout.scheduler)
        cache = ScoreCache.default() if any(ScoreCache.holds(reward) for reward in self.rewards) else None
        for point in points:
            mixture.put(point.parts)
            evaluation = evaluate(
                policy,
                self.rewards,
                self.prompts,
                seeds=self.seeds,
                steps=config.evaluation.steps,
                adapter="default",
                batch=config.rollout.batch,
                guidance=config.evaluation.guidance,
                scheduler=config.evaluation.scheduler,
                frames=config.rollout.judged_frames,
                shown=SHOWN,
                cache=cache,
            )
            if evaluation.silent:
                raise MarbleError(
                    f"rewards: no score of {', '.join(evaluation.silent)} for any of the pictures of {point.name} (the "
                    "warnings above say why); the same command goes on from there"
                )
            for p in range(min(SHOWN, len(self.prompts))):
                pixels = sample_of(evaluation.images[p * len(self.seeds)])
                save_sample(pixels, self._pictures(point), p, 0)
            measured = Measured(point, evaluation, revisions, "")
            _refuse_revisions([*found.values(), measured])
            found[point.name] = self._write(measured)
            watch(point)

    def _write(self, measured: Measured) -> Measured:
        content = {
            "name": measured.point.name,
            "stamp": self._stamp(measured.point),
            "taken": measured.taken,
            "revisions": measured.revisions,
            "evaluation": measured.evaluation.to_json(),
        }
        write_atomic(self._file(measured.point), json.dumps(content))
        return measured

    def _file(self, point: Point) -> Path:
        return self.folder / f"{point.file_name}.json"

    def _pictures(self, point: Point) -> Path:
        folder = self.folder / point.file_name
        folder.mkdir(exist_ok=True)
        return folder


def _stamp_of(stored: Stored) -> list[Any]:
    return [file_stamps(stored.files), stored.rank, stored.alpha, stored.start]


def _part_of(whole: Evaluation, prompts: Sequence[int], names: Sequence[str]) -> Evaluation:
    """Some prompts of an evaluation, its rewards in the order of `names`."""
    scores = whole.scores.view(len(whole.prompts), -1, len(whole.names))
    scores = scores[list(prompts)][:, :, [whole.names.index(name) for name in names]]
    texts = [whole.prompts[i] for i in prompts]
    return Evaluation([*names], scores.reshape(-1, len(names)), texts, whole.images[:0])


def _refuse_revisions(measured: Sequence[Measured]) -> None:
    """Raise unless every reward's revision is the same throughout."""
    for other in measured[1:]:
        for name, then in measured[0].revisions.items():
            now = other.revisions.get(name, then)
            if now != then:
                raise MarbleError(
                    f'reward {name}: "{then}" judged {measured[0].point.name} and "{now}" judged {other.point.name}: '
                    "what they say cannot be compared; --anew judges all points by the one at hand"
                )
