"""Makes rewards of what a config says: registered names, dotted paths, functions, URLs, and their settings."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from marble.config import RewardUse
from marble.errors import MarbleError, nearest
from marble.prompts import Record
from marble.registry import is_url, resolve
from marble.rewards.base import Facts, Reward

COMMON: dict[str, Any] = {"name": str, "batch": int, "workers": int, "timeout": float}
"""Settings that every reward has, and their types."""
ATTRIBUTES = ("groupwise", "judges_videos", "wants_floats", "revision", "accuracy_above", "cached", "applies")
"""What a function may say of itself as a class does."""
MOST = {"batch": 100_000, "workers": 64, "timeout": 1_000_000}
"""Of the common settings that are numbers."""


class FunctionReward(Reward):
    """A plain function as a reward: `f(images)` or `f(images, records)`.

    The function's own attributes of the contract's names (`f.groupwise = True`, `f.applies = …`) count as a class's.
    """

    def __init__(self, function: Callable[..., Any], name: str, given: int) -> None:
        """Of a function that takes `given` positional arguments."""
        self.name, self._function, self._given = name, function, given
        self.needs_prompt = given == 2
        inner = getattr(function, "func", function)
        self.about = (inspect.getdoc(inner) or "").split("\n")[0]
        for attribute in (*ATTRIBUTES, *COMMON):
            if hasattr(inner, attribute):
                setattr(self, attribute, getattr(inner, attribute))

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """What the function says."""
        return self._function(*(images, records)[: self._given])


def load_rewards(uses: Sequence[str | RewardUse]) -> list[Reward]:
    """Make the rewards of a config, or of registered names, `package.module:attribute` paths and URLs alone.

    Raises:
        MarbleError: names are unknown, settings do not fit, or two rewards call themselves the same; all at once.
    """
    rewards, problems = [], []
    for use in uses:
        try:
            rewards.append(make_reward(RewardUse(reward=use) if isinstance(use, str) else use))
        except MarbleError as error:
            problems.append(str(error))
    problems += _twice(rewards)
    if problems:
        raise MarbleError("\n".join(problems))
    return rewards


def _twice(rewards: Sequence[Reward]) -> list[str]:
    own = [reward.name for reward in rewards]
    twice = sorted({name for name in own if own.count(name) > 1})
    return [f"rewards: {', '.join(twice)} given more than once; settings: {{name: …}} tells them apart"] * bool(twice)


def make_reward(use: RewardUse) -> Reward:
    """The reward that `use` stands for; nothing heavy is loaded.

    Raises:
        MarbleError: it cannot be found, is no reward, or does not take the settings; all that is wrong with them.
    """
    own = {name: value for name, value in use.settings.items() if name not in COMMON}
    common, problems = {}, []
    for name, value in use.settings.items():
        if name in COMMON:
            common[name], problem = _converted(name, COMMON[name], value)
            problems += [problem or _limited(name, common[name])]
    problems = [problem for problem in problems if problem]
    if use.url or is_url(use.reward):
        from marble.rewards.remote import Remote  # here: most runs talk to no server

        reward: Any = _made(Remote, own, use.reward, problems, given=(use.reward, use.url))
    else:
        reward = _local(resolve("reward", use.reward), own, use.reward, problems)
    if not hasattr(reward, "name") and hasattr(reward, "score"):
        reward.name = type(reward).__name__
    missing = [part for part in ("name", "applies", "score") if not hasattr(reward, part)]
    if missing:
        raise MarbleError(
            f'reward "{use.reward}" is no reward: it has no {", ".join(missing)}; derive it from marble.Reward'
        )
    reward.origin, reward.settings = use.reward, dict(use.settings)
    for name, value in common.items():
        setattr(reward, name, value)
    return reward


def facts_of(target: Any) -> dict[str, str]:
    """What a reward's class or function states of itself, by `about`, the names of `Facts`, and `settings`."""
    about = getattr(target, "about", "") or (inspect.getdoc(target) or "").split("\n")[0]
    facts: Facts | None = getattr(target, "facts", None)
    row = {"about": about, **({} if facts is None else asdict(facts))}
    if callable(target):
        parameters = inspect.signature(target).parameters.values()
        row["settings"] = ", ".join(_with_default(p) for p in parameters if p.kind is p.KEYWORD_ONLY)
    return row


def _with_default(setting: inspect.Parameter) -> str:
    if setting.default is setting.empty:
        return f"{setting.name} (required)"
    shown = json.dumps(setting.default, ensure_ascii=False, default=str).strip('"')
    return f"{setting.name}: {shown if len(shown) <= 60 else shown[:59] + '…'}"


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Let every reward find out cheaply whether it could score.

    Raises:
        MarbleError: lists all that cannot.
    """
    _ask_all(rewards, "check")


def prepare_rewards(rewards: Sequence[Reward]) -> None:
    """Let every reward load what scoring needs, once, and those on the same weights together.

    Raises:
        MarbleError: lists all that cannot.
    """
    _ask_all([reward for reward in rewards if not getattr(reward, "prepared", False)], "prepare")
    for reward in rewards:
        reward.prepared = True


def _ask_all(rewards: Sequence[Reward], method: str) -> None:
    problems = []
    for reward in rewards:
        try:
            getattr(reward, method, lambda: None)()
        except MarbleError as error:
            problems.append(f"  reward {reward.name}: {error}")
        except Exception as error:  # somebody else's code
            problems.append(f"  reward {reward.name}: {method}() fails: {type(error).__name__}: {error}")
    problems = problems or [f"  {problem}" for problem in _twice(rewards)]  # a served one is known by its own name now
    if problems:
        raise MarbleError("rewards that cannot be used:\n" + "\n".join(problems))


def _local(target: Any, settings: dict[str, Any], what: str, problems: list[str]) -> Any:
    if isinstance(target, type):
        return _made(target, settings, what, problems)
    if inspect.isfunction(target):
        parameters = inspect.signature(target).parameters.values()
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = sum(p.default is p.empty or p.name == "records" for p in places)
        if given not in (1, 2):
            raise MarbleError(
                f'reward "{what}" is no reward: a function takes (images) or (images, records), and settings with '
                f"defaults; this one takes {given} arguments"
            )
        settings = _checked(target, settings, problems, skip=given)
        if not problems:
            return FunctionReward(functools.partial(target, **settings), target.__name__, given)
    elif settings:
        problems = [*problems, f"it is made already, so it takes no settings; got {', '.join(settings)}"]
    if problems:
        raise MarbleError(f'reward "{what}": {"; ".join(problems)}')
    return target


def _made(kind: type, settings: dict[str, Any], what: str, problems: list[str], given: tuple[Any, ...] = ()) -> Any:
    """An object of a reward's class, if nothing is wrong with its settings."""
    settings = _checked(kind, settings, problems, skip=len(given))
    if problems:
        problems += ["the settings of a served reward are given to marble serve"] if given else []
        raise MarbleError(f'reward "{what}": {"; ".join(problems)}')
    try:
        return kind(*given, **settings)
    except MarbleError as error:
        own = str(error)
        raise MarbleError(own if own.startswith("reward ") else f'reward "{what}": {own}') from error
    except Exception as error:  # somebody else's code
        raise MarbleError(f'reward "{what}" cannot be made: {type(error).__name__}: {error}') from error


def _checked(target: Any, settings: dict[str, Any], problems: list[str], *, skip: int = 0) -> dict[str, Any]:
    """`settings` as keyword arguments of a constructor or function, of the types that its annotations say.

    What does not fit is added to `problems`.
    """
    known = {
        name: parameter
        for name, parameter in list(inspect.signature(target).parameters.items())[skip:]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    try:
        hints = typing.get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
    except (NameError, TypeError):  # annotations that only a type checker sees
        hints = {}
    converted = {}
    for name, value in settings.items():
        if name not in known:
            names = [*known, *COMMON]
            problems.append(f'unknown setting "{name}".{nearest(name, names)} Known: {", ".join(names)}')
            continue
        converted[name], problem = _converted(name, hints.get(name, Any), value)
        problems += [problem] if problem else []
    needed = [name for name, p in known.items() if p.default is p.empty and name not in settings]
    problems += [f"settings.{name} is required" for name in needed]
    return converted


def _converted(name: str, kind: Any, value: Any) -> tuple[Any, str]:
    """A setting as its annotation has it, or what is wrong with it."""
    if isinstance(value, bool) and kind in (int, float):
        return None, f"settings.{name}: input should be a number, got {value}"
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value), ""
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        return None, f"settings.{name}: {reason[0].lower()}{reason[1:]}, got {value!r}"


def _limited(name: str, value: Any) -> str:
    """What is wrong with the size of a common setting."""
    if name == "name":
        return "" if value else "settings.name must not be empty"
    if 0 < value <= MOST[name] or (value == 0 and name == "workers"):
        return ""
    return f"settings.{name} must be positive and at most {MOST[name]}, got {value}"
