"""The configuration: typed, checked as a whole before anything heavy is imported, complete when written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from marble.catalogue import METHODS, OBJECTIVES, SCHEDULERS
from marble.errors import MarbleError, nearest
from marble.registry import check, is_data_set, is_file, is_url
from marble.rules import check_rules


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LoRA(_Section):
    """The trained adapter."""

    rank: int = Field(32, ge=1, description="rank of the two factors")
    alpha: int = Field(64, ge=1, description="scale of the adapter, times 1/rank")
    targets: list[str] | None = Field(
        None, min_length=1, description="endings of the layers' names; all of attention, if not given"
    )
    start: str | None = Field(
        None, description="folder, file or hub id of a LoRA to go on from; its own rank, scale and layers hold"
    )


class Model(_Section):
    """What is fine-tuned, and how it fits the machine."""

    id: str = Field("mini", description="hub id, folder of a Diffusers pipeline, or a registered model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    variant: str | None = Field(None, description="of the files on the hub, such as fp16")
    train: Literal["lora", "full"] = Field("lora", description="an adapter, or all of the denoiser (small models)")
    lora: LoRA = LoRA()
    merge: list[str] = Field([], description="LoRA to add to the weights for good before training")
    call: dict[str, Any] = Field({}, description="extra arguments of every call of the pipeline while training")
    device: str = Field("auto", description="auto: this process's GPU or, without one, the CPU; cpu, cuda, cuda:1")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen weights; what is trained is kept in single precision"
    )
    quantize: Literal["8bit", "4bit"] | None = Field(None, description="frozen weights by bitsandbytes (an extra)")
    shard: bool = Field(False, description="frozen weights in shards over the processes: for models beyond one GPU")
    checkpointing: bool = Field(False, description="make activations again on the way back: less memory, more time")
    offload: Literal["text", "all"] | None = Field(
        None, description="keep idle text encoders, or all but the denoiser, in the CPU's memory"
    )
    vae_tiling: bool = Field(False, description="decode images in tiles")
    vae_slicing: bool = Field(False, description="decode images one by one")
    trust_remote_code: bool = Field(False, description="let the model's own code run")


class PromptSource(_Section):
    """One source of prompts in the mixture."""

    source: str = Field(
        description="registered name, .txt or .jsonl file, hf:owner/name of a data set, or package.module:function"
    )
    share: float = Field(1.0, gt=0, description="share of an epoch's prompts, relative to the other sources'")
    safe: bool = Field(True, description="leave out loaded prompts that the safety filter objects to")
    subset: str | None = Field(None, description="hf: configuration of the data set")
    column: str | None = Field(None, description="hf: column of the texts; prompt, text or caption, if not given")
    split: str = Field("train", description="hf: split to train on")
    held_out_split: str | None = Field(None, description="hf: split to hold out; every fifth prompt, if not given")


class RewardUse(_Section):
    """One reward, and how it is to judge."""

    reward: str = Field(description="registered name, package.module:attribute, or URL/NAME of a served one")
    url: list[str] = Field([], description="marble servers that judge in place of this process; one or several")
    settings: dict[str, Any] = Field({}, description="of the reward; batch, workers and timeout are every reward's")

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"reward": values}
        if isinstance(values, dict) and isinstance(values.get("url"), str):
            return {**values, "url": [values["url"]]}
        return values

    @field_validator("settings")
    @classmethod
    def _plain(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            plain = json.loads(json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"must be plain numbers, words, lists and mappings ({error}), got {settings!r}") from error
        if plain != settings:
            raise ValueError(f"must be plain numbers, words, lists and mappings with words for keys, got {settings!r}")
        return settings

    @property
    def label(self) -> str:
        """What tells it apart in the config: `settings.name`, or else what it is."""
        return str(self.settings.get("name", self.reward))


class RewardTerm(RewardUse):
    """One training reward."""

    weight: float = Field(1.0, gt=0, description="weight in the weighted sum; balancing methods do not use it")
    priority: float = Field(1.0, gt=0, description="progress asked for, relative to the other rewards'")
    floor: bool = Field(False, description="never traded away: no solved direction opposes this reward's gradient")


def _known(names: dict[str, str]) -> AfterValidator:
    def check_known(name: str) -> str:
        if name not in names:
            raise ValueError(f'"{name}" is not one of {", ".join(names)}.{nearest(name, names)}')
        return name

    return AfterValidator(check_known)


class Rollout(_Section):
    """How an epoch's images are sampled."""

    prompts: int = Field(48, ge=1, description="prompts an epoch, over all sources")
    group_size: int = Field(24, ge=2, description="images per prompt, G")
    steps: int = Field(10, ge=2, description="denoising steps, T")
    batch: int = Field(256, ge=1, description="images sampled in one call of the pipeline; halved if memory is short")
    guidance: float = Field(
        1.0, ge=0, description="1 for none; the scale that a guidance-distilled model (FLUX.1-dev) is told"
    )
    scheduler: Annotated[str, _known(SCHEDULERS)] = Field(
        "own", description="see marble list schedulers; ppo samples with sde"
    )
    noise: float = Field(0.7, gt=0, description="sde: level of the noise between a flow model's steps")
    judged_frames: int | None = Field(
        None, ge=1, description="of a video, evenly spaced: those that rewards for images judge; all, if not given"
    )


class Decay(_Section):
    """`min(slope · max(0, u − start), limit)` after u updates."""

    start: int = Field(0, ge=0)
    slope: float = Field(0.001, ge=0)
    limit: float = Field(0.5, ge=0, lt=1)

    def at(self, update: int) -> float:
        """The decay after `update` updates."""
        return min(self.slope * max(0, update - self.start), self.limit)


class Objective(_Section):
    """The loss and where it is taken."""

    name: Annotated[str, _known(OBJECTIVES)] = Field("nft", description="see marble list objectives")
    beta: float = Field(0.1, gt=0, description="nft: distance of its implicit policies from the old one")
    clip: float = Field(1.0, gt=0, description="awm, ppo (there 1e-4): the ratio is clipped to 1 ± this")
    pull: float = Field(5.0, ge=0, description="awm: weight of the pull to the old policy")
    amax: float = Field(5.0, gt=0, description="advantages are clipped to ± this")
    kl: float = Field(
        1e-4,
        ge=0,
        description="weight of mean (v_theta − v_ref)², of the steps' divergence for ppo (there 0.04); 0 saves the "
        "reference's forward",
    )
    timesteps: int = Field(9, ge=1, description="of the sampler's steps (the last left out), trained per image")
    std: Literal["batch", "group"] = Field("batch", description="whose standard deviation divides an advantage")
    old: Decay = Decay()

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "ppo":
            return {"clip": 1e-4, "kl": 0.04, "old": {"slope": 0.0, "limit": 0.0}, **values}
        return values


class Stage(_Section):
    """One stage of `sequential`."""

    rewards: list[str] = Field(min_length=1, description="names of the training rewards whose raw sum it follows")
    share: float = Field(1.0, gt=0, description="of the updates, relative to the other stages'")


class Balance(_Section):
    """How several rewards become one direction."""

    method: Annotated[str, _known(METHODS)] = Field("marble", description="see marble list methods")
    refresh: int = Field(10, ge=1, description="updates from one exact solve to the next; 1: every update is exact")
    solve_share: float = Field(1.0, gt=0, le=1, description="of an update's micro-batches that a solve looks at")
    smooth: Literal["weights", "gram"] = Field("weights", description="what is averaged over solves")
    decay: float = Field(0.7, ge=0, lt=1, description="of that moving average")
    gradients: Literal["whole", "advantage"] = Field(
        "whole", description="what is balanced: whole gradients, or without their advantage-free part"
    )
    estimate: Literal["batch", "halves"] = Field(
        "batch", description="halves: products of gradients of two halves of the batch, which noise does not bias"
    )
    finish: int = Field(0, ge=0, description="last updates at uniform weights")
    advantage_scale: Literal["match", "published"] = Field(
        "match", description="match: the combined advantage has unit spread; published: as it comes"
    )
    norms: Literal["folded", "raw"] = Field(
        "folded", description="folded: amortised updates divide by each gradient's norm, as the solve did"
    )
    visits: Literal["importance", "even"] = Field(
        "importance",
        description="even: all images and timesteps alike (preset of all methods but marble); importance: more visits "
        "where the rewards' gradients are large",
    )
    guard: bool = Field(True, description="marble: while rewards truly oppose each other, solve by upgrad")
    dropout: float = Field(0.5, gt=0, lt=1, description="reward-dropout: probability that a reward is left out")
    stages: list[Stage] = Field(
        [], description="sequential: which rewards are trained on one after another; each by itself, if not given"
    )
    rate: float = Field(1.0, gt=0, description="closed-loop: priority falls by exp(−rate · progress ahead of the mean)")
    limit: float = Field(4.0, gt=1, description="closed-loop: priorities stay between 1/limit and limit")

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("method", "marble") == "marble":
            return values
        if values["method"] == "published":
            return {"advantage_scale": "published", "norms": "raw", "visits": "even", **values}
        return {"visits": "even", **values}


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(_Section):
    """AdamW on what is trained."""

    name: Literal["adamw", "adamw-8bit"] = Field("adamw", description="adamw-8bit: bitsandbytes' (an extra)")
    lr: float = Field(3e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    updates_per_epoch: int = Field(1, ge=1, description="optimiser updates made from one epoch's images")
    micro_batch: int = Field(64, ge=1, description="images in one forward and backward; halved if memory is short")


class Budget(_Section):
    """When to stop: at whichever comes first of those given."""

    updates: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, description="of training and evaluation; makes a run depend on speed")


class Evaluation(_Section):
    """Held-out prompts with fixed seeds, before, during and after."""

    prompts: int = Field(48, ge=2, description="held-out prompts over all sources")
    mixture: Literal["shares", "even"] = Field("shares", description="of sources: as in training, or even")
    images: int = Field(4, ge=1, description="images per prompt")
    steps: int = Field(40, ge=1, description="denoising steps")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1 for none")
    scheduler: Annotated[str, _known(SCHEDULERS)] = Field("own", description="see marble list schedulers")
    every: int = Field(0, ge=0, description="updates between evaluations on the way; 0: only before and after")
    track: float = Field(0.5, gt=0, le=1, description="share of the prompts used on the way")
    early_stop: str | None = Field(None, description="name of a held-out reward that must not fall significantly")
    patience: int = Field(2, ge=1, description="evaluations in a row below the start before stopping early")


class Config(_Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**31)
    model: Model = Model()
    prompts: list[PromptSource] = Field(min_length=1)
    rewards: list[RewardTerm] = Field(min_length=1)
    held_out_rewards: list[RewardUse] = Field([], description="evaluated, never trained on")
    missing_limit: int = Field(
        10, ge=1, description="updates in a row without any score of a reward after which the run stops, saved"
    )
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    balance: Balance = Balance()
    optimizer: Optimizer = Optimizer()
    ema: float = Field(0.9, ge=0, lt=1, description="limit of the decay of the exported average of the adapter")
    budget: Budget = Budget(updates=300)
    evaluation: Evaluation = Evaluation()
    diagnose_every: int = Field(
        7, ge=0, description="updates between measurements of the directions' cosines; 0: never"
    )
    checkpoint_every: int = Field(50, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="older ones are deleted")
    threads: int | None = Field(None, ge=1, description="CPU threads; as torch chooses, if not given")

    @model_validator(mode="after")
    def _whole(self) -> Config:
        if self.objective.name == "ppo" and self.rollout.scheduler == "own":
            self.rollout = self.rollout.model_copy(update={"scheduler": "sde"})
        check_rules(self)
        return self


def demo_config_path() -> Path:
    """The packaged config of `marble demo`."""
    return Path(__file__).parent / "configs" / "demo.yaml"


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, unchecked.

    Raises:
        MarbleError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise MarbleError(f'config "{path}" does not exist')
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MarbleError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise MarbleError(f"{path} must be a mapping of settings, got {type(values).__name__}")
    return values


def make_config(values: dict[str, Any], origin: str = "config") -> Config:
    """Check a mapping whole.

    Raises:
        MarbleError: lists every error found, each with its field, the rule and the value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise MarbleError(f"{origin} is not valid:\n" + "\n".join(_lines(error))) from error


def check_names(config: Config) -> None:
    """Check that every reward and prompt source named can be found, importing none of them.

    Raises:
        MarbleError: lists all that cannot.
    """
    problems = []
    sources = [(f"prompts.{i}.source", "prompt source", p.source) for i, p in enumerate(config.prompts)]
    rewards = [
        (f"{section}.{i}.reward", "reward", use.reward)
        for section in ("rewards", "held_out_rewards")
        for i, use in enumerate(getattr(config, section))
        if not use.url and not is_url(use.reward)
    ]
    for where, kind, name in sources + rewards:
        if kind == "prompt source" and is_file(name):
            if not Path(name).is_file():
                problems.append(f'  {where}: prompt file "{name}" does not exist')
            continue
        if kind == "prompt source" and is_data_set(name):
            continue
        try:
            check(kind, name)
        except MarbleError as error:
            problems.append(f"  {where}: {error}")
    if problems:
        raise MarbleError("config is not valid:\n" + "\n".join(problems))


def dump_config(config: Config) -> str:
    """The complete configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            fields = _fields_at(item["loc"][:-1])
            lines.append(
                f"  {where}: unknown setting.{nearest(str(item['loc'][-1]), fields)} Known here: {', '.join(fields)}"
            )
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")  # rules on the whole config name their fields
            lines.append(f"  {where}: {message}" if item["loc"] else f"  {message}")
        elif item["type"] == "missing":
            lines.append(f"  {where}: is required")
        else:
            lines.append(f"  {where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return lines


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The settings known in the section that an error's location points into."""
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        inner = getattr(annotation, "__args__", (annotation,))[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            section = inner
    return list(section.model_fields)
