"""What is to be evaluated, on what and against what: settled before a model loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marble.config import Config, RewardUse, demo_config_path, make_config, read_config
from marble.errors import MarbleError
from marble.evaluation import fixed_seeds
from marble.overrides import override
from marble.policy.mixing import model_files
from marble.prompts import Record
from marble.rewards.base import WHERE
from marble.rewards.load import COMMON
from marble.scoring.differences import differences
from marble.scoring.overlay import Overlay, digest, run_config
from marble.setup import check_config, held_out_prompts

_MODEL = ("id", "revision", "variant", "merge", "call", "dtype", "quantize")
"""Settings of a model that change its images; the others say where and how they are made."""
_SAME = ("prompts", "seeds", "steps", "guidance", "scheduler", "frames", "rewards")
"""What two evaluations that are compared must have in common, and the rewards' revisions."""


@dataclass(frozen=True)
class Plan:
    """An evaluation to be made."""

    config: Config
    evaluated: Overlay
    against: Overlay | Path | None
    """Over the same model; or the file of an earlier evaluation; or nothing."""
    prompts: list[Record]
    portion: int
    """Prompts made and judged at a time."""
    setup: dict[str, Any]
    """All that decides its scores, as plain JSON, but for the rewards' revisions."""

    @property
    def seeds(self) -> list[int]:
        """Of each prompt's images."""
        return self.setup["seeds"]

    @property
    def uses(self) -> list[RewardUse]:
        """The rewards, in the order of `setup`."""
        return [*self.config.rewards, *self.config.held_out_rewards]

    @property
    def portions(self) -> list[range]:
        """Which prompts are made and judged together."""
        count = len(self.prompts)
        return [range(start, min(start + self.portion, count)) for start in range(0, count, self.portion)]


def make_plan(
    model: str,
    *,
    lora: str | None = None,
    scale: float = 1.0,
    config: Path | None = None,
    against: str | None = None,
    portion: int = 8,
    changes: Sequence[str] = (),
) -> Plan:
    """Settle everything, and find whatever can be found wrong without loading a model.

    Args:
        model: hub id, folder, registered model, or a run folder (its model, with what the run learned).
        lora: a run folder, or a LoRA in any layout that Diffusers reads; in place of what a run folder learned.
        scale: of the LoRA's strength.
        config: whose prompts, rewards and evaluation count. If not given, that of the run that `model` or `lora` is of,
            or the demo's for the demo's model.
        against: `base`, `none`, a run folder, a LoRA, or the `evaluation.json` of an earlier evaluation; the base model
            if something lies over it, else nothing, if not given.
        portion: prompts made and judged at a time.
        changes: `--section.setting value` over the config.

    Raises:
        MarbleError: what is wrong.
    """
    if portion < 1:
        raise MarbleError(f"--portion: at least 1 prompt, got {portion}")
    if not 0 < scale < float("inf"):
        raise MarbleError(f"--scale: must be above 0, got {scale}")
    own = run_config(model) if Path(model, "config.yaml").is_file() else None
    learned = lora if lora is not None else model if own is not None else None
    trained = None if learned is None else run_config(learned)
    if scale != 1 and learned is None:
        raise MarbleError("--scale: there is no LoRA to scale; give --lora")
    chosen = _config(model, own, trained, config, changes)
    evaluated = (
        Overlay() if learned is None else Overlay.find(learned, "--lora" if lora is not None else "model", scale)
    )
    other = _against(against, evaluated)
    check_config(chosen)
    prompts = held_out_prompts(chosen)
    setup = _setup(chosen, evaluated, other, prompts, portion, trained)
    plan = Plan(chosen, evaluated, other, prompts, portion, setup)
    if isinstance(other, Path):
        check_comparable(plan, read_evaluation(other))
    return plan


def check_comparable(plan: Plan, earlier: dict[str, Any], revisions: dict[str, str] | None = None) -> None:
    """Check that an earlier evaluation was of the same prompts, seeds and judges, once known by the same `revisions`.

    Raises:
        MarbleError: names all differences.
    """
    here = plan.setup | ({} if revisions is None else {"revisions": revisions})
    unlike = differences(earlier["setup"], here, _SAME if revisions is None else (*_SAME, "revisions"))
    if unlike:
        raise MarbleError(f'--against: "{plan.against}" cannot be compared with:\n  ' + "\n  ".join(unlike))


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `marble evaluate` wrote.

    Raises:
        MarbleError: it is not there, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MarbleError(f'--against: "{path}" cannot be read: {error}') from error
    if not isinstance(content, dict) or not {"setup", "evaluated"} <= content.keys():
        raise MarbleError(f'--against: "{path}" is not what marble evaluate writes; give a run\'s folder for a run')
    return content


def _config(
    model: str, own: Config | None, trained: Config | None, given: Path | None, changes: Sequence[str]
) -> Config:
    """The configuration in which `model` stands for its model."""
    if any(change.partition("=")[0] == "--model.id" for change in changes):
        raise MarbleError("--model.id: the model is what marble evaluate is given first; leave it out")
    if given is not None:
        values, origin = read_config(given), str(given)
    elif (known := own or trained) is not None:
        values, origin = known.model_dump(mode="json"), "the run's config"
    elif model == make_config(read_config(demo_config_path())).model.id:
        values, origin = read_config(demo_config_path()), "config"
    else:
        raise MarbleError(
            f'--config: give one for "{model}": any training config, whose prompts, rewards and evaluation then count'
        )
    if own is not None:
        values["model"] = own.model.model_dump(mode="json")
    else:
        section = dict(values.get("model") or {})
        if section.get("id", Config.model_fields["model"].default.id) != model:
            section = {name: value for name, value in section.items() if name not in ("revision", "variant")}
        values["model"] = section | {"id": model}
    config = make_config(override(values, list(changes)), origin)
    if config.model.shard:
        raise MarbleError("model.shard: evaluation has the whole model in every process; use --model.shard false")
    return config.model_copy(update={"model": config.model.model_copy(update={"train": "lora"})})


def _against(against: str | None, evaluated: Overlay) -> Overlay | Path | None:
    if against is None:
        against = "none" if evaluated.empty else "base"
    if against == "none":
        return None
    if against == "base":
        if evaluated.empty:
            raise MarbleError("--against: the base model would be compared with itself; give --lora")
        return Overlay()
    path = Path(against)
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "evaluation.json").is_file() and not (path / "config.yaml").is_file():
        return path / "evaluation.json"
    if (path / "setup.json").is_file() and not (path / "config.yaml").is_file():
        raise MarbleError(f'--against: the evaluation in "{against}" is unfinished; its own command goes on with it')
    return Overlay.find(against, "--against")


def _setup(
    config: Config,
    evaluated: Overlay,
    against: Overlay | Path | None,
    prompts: list[Record],
    portion: int,
    trained: Config | None,
) -> dict[str, Any]:
    uses, learned = [*config.rewards, *config.held_out_rewards], [_judge(use) for use in (trained or config).rewards]
    model = config.model.model_dump(mode="json")
    other: Any = "none"
    if isinstance(against, Overlay):
        other = against.describe() or "base"
    elif against is not None:
        other = {"source": str(against), "scale": 1.0, "sha256": digest([against])}
    setup = {
        "marble": version("marble-diffusion"),
        "model": {name: model[name] for name in _MODEL},
        "files": model_files(config.model),
        "lora": evaluated.describe(),
        "against": other,
        "prompts": [asdict(record) for record in prompts],
        "seeds": fixed_seeds(config.evaluation.images),
        "steps": config.evaluation.steps,
        "guidance": config.evaluation.guidance,
        "scheduler": config.evaluation.scheduler,
        "frames": config.rollout.judged_frames,
        "portion": portion,
        "rewards": [
            {
                "reward": use.reward,
                "settings": {name: value for name, value in use.settings.items() if name not in WHERE},
            }
            for use in uses
        ],
        "kinds": ["training" if _judge(use) in learned else "held-out" for use in uses],
    }
    return json.loads(json.dumps(setup))


def _judge(use: RewardUse) -> tuple[str, dict[str, Any]]:
    """Who judges, whatever it is called and wherever it runs."""
    return use.reward, {name: value for name, value in use.settings.items() if name not in (*WHERE, *COMMON)}
