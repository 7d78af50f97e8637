"""Learns a pipeline's manner from two short calls with different numbers of images.

What has an entry for every image is what grows with them; what the timestep is, is what changes from step to step;
the latents are what is proportional to the scheduler's sample. At the end a recorded call is made again and must
give what the scheduler was given: if it does, training may rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.noise import levels_of
from marble.watch.conditioning import Conditioning, repeated
from marble.watch.manner import Manner, as_sample
from marble.watch.tree import Path, children, leaves, name_of, same
from marble.watch.watch import Watch

_PROMPTS = ("a red hat", "one blue dog at sea")
"""Short, of different lengths, and of more than two words: a text's length must not pass for a number of images."""
_IMAGES = 2  # of every prompt; the first call has one prompt, the second two

_OFF = 0.25
"""Most distance of the last clean latents from the scheduler's, of their length: 0.02 at most in 44 pipelines."""

_PARALLEL = 0.999  # cosine of the denoiser's latents with the scheduler's sample


class PromptsMixedUpError(MarbleError):
    """Several images of several prompts get each other's masks, as in some pipelines of Diffusers 0.42."""


def learn(pipe: Any, part: str, call: Callable[[Sequence[str], int, int], Any]) -> Manner:
    """Watch two calls of `pipe`.

    Args:
        pipe: the pipeline.
        part: its component that denoises.
        call: `call(prompts, images per prompt, steps)` runs the pipeline.

    Raises:
        PromptsMixedUpError: `call` must give the pipeline every prompt as often as it wants images of it.
        MarbleError: what was seen, what was expected.
    """
    watches = []
    for prompts in (_PROMPTS[:1], _PROMPTS):
        with Watch(pipe, part, whole=True) as watch:
            call(prompts, _IMAGES, 2)
        watch.check_calls()
        watches.append(watch)
    watch, name = watches[0], f"{type(pipe).__name__} cannot be watched"
    if any(len(each.calls) < 2 for each in watches):
        raise MarbleError(f"{name}: expected two steps when asked for two, saw {len(watch.calls)}")
    first, second = watch.calls[:2]
    sample, output = watch.tensors(0)
    if len(sample) != _IMAGES:
        raise MarbleError(f"{name}: expected latents of {_IMAGES} images, saw {list(sample.shape)}")

    broken = [path for path, value in leaves(first) if isinstance(value, Tensor) and not value.isfinite().all()]
    if broken or not output.isfinite().all():
        what = ", ".join(map(name_of, broken)) or "what it answers"
        raise MarbleError(
            f"{name}: of {part}, {what} is not finite; model.dtype: bfloat16 or float32 usually helps (text encoders "
            "and denoiser calculate in it)"
        )
    latent = _latent(first, sample, name, part)
    given = first[latent]
    listed = isinstance(given, (list, tuple))
    stacked = torch.stack(list(given)) if listed else given
    timestep = _timestep(first, second, latent, name, part)
    changing = [
        name_of(path)
        for path, value in leaves({k: v for k, v in first.items() if k not in (latent, timestep)})
        if not same(value, _at(second, path))
    ]
    if changing:
        raise MarbleError(f"{name}: {part}'s {', '.join(changing)} changes from step to step, like no timestep")
    others = [{k: v for k, v in w.calls[0].items() if k not in (latent, timestep)} for w in watches]
    told = first[timestep]
    found = _per_image(others[0], others[1])
    manner = Manner(
        latent=latent,
        listed=listed,
        ones=_ones(stacked.shape, sample.shape),
        latent_dtype=stacked.dtype,
        timestep=timestep,
        timestep_dims=told.ndim,
        timestep_dtype=told.dtype,
        per_image=frozenset(path for path, _ in found),
        sign=_sign(watch.outputs[0], output, stacked.dtype, name, part),
        dims={path: dim for path, dim in found if dim},
    )
    for watch in watches:
        _check(manner, watch, name)
    if not all(_same_for_one_prompt(_at(watches[1].calls[0], path), path, dim) for path, dim in found):
        raise PromptsMixedUpError(f"{name}: images of one prompt are given different texts or masks")
    _check(manner, watches[1], name, torch.tensor([2 * _IMAGES - 1]))
    _check_levels(manner, watches[1], name)
    return manner


def _latent(call: dict[str, Any], sample: Tensor, name: str, part: str) -> str:
    """The argument that is the scheduler's sample, up to scale, dtype and dims of length 1."""
    found, doubled = [], []
    for key, value in call.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
            if any(item.shape != value[0].shape for item in value):
                continue
            value = torch.stack(list(value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.numel() == sample.numel() and len(value) == len(sample):
            a, b = value.flatten().float(), sample.flatten().float()
            if torch.nn.functional.cosine_similarity(a, b, dim=0) > _PARALLEL:
                found.append(key)
        elif value.numel() == 2 * sample.numel() and len(value) == 2 * len(sample):
            doubled.append(key)
    if len(found) == 1:
        return found[0]
    saw = ", ".join(f"{key} {_describe(value)}" for key, value in call.items())
    guidance = (
        f" ({', '.join(doubled)} holds every image twice: is that classifier-free guidance? Training goes without; "
        "set rollout.guidance to 1)"
        if doubled
        else ""
    )
    raise MarbleError(
        f"{name}: expected one argument of {part} that is the scheduler's sample {list(sample.shape)}, "
        f"found {', '.join(found) or 'none'} among {saw}{guidance}"
    )


def _timestep(first: dict[str, Any], second: dict[str, Any], latent: str, name: str, part: str) -> str:
    """The argument that is one number for all images and another in the next step."""
    found = [
        key
        for key, value in first.items()
        if key != latent and isinstance(value, Tensor) and value.ndim <= 2 and value.numel()
        if (value == value.flatten()[0]).all() and not torch.equal(value, second[key])
    ]
    if len(found) != 1:
        raise MarbleError(
            f"{name}: expected one tensor among {part}'s arguments that is the same for all images and changes from "
            f"step to step, the timestep; found {', '.join(found) or 'none'} among {', '.join(first)}"
        )
    return found[0]


def _ones(given: Sequence[int], sample: Sequence[int]) -> tuple[int, ...]:
    """Dims of length 1 in `given` that `sample` has not; put in one after the other they make it."""
    ones, at = [], 0
    for dim, length in enumerate(given):
        if at < len(sample) and sample[at] == length:
            at += 1
        else:
            ones.append(dim)
    return tuple(ones)


def _per_image(a: Any, b: Any, path: Path = ()) -> list[tuple[Path, int]]:
    """Where two calls' arguments have as many entries as images, or as prompts, and in which dim."""
    if a is None and isinstance(b, Tensor) and b.ndim and len(b) == 2 * _IMAGES:  # a mask, where one is needed
        return [(path, 0)]
    counts = ((_IMAGES, 2 * _IMAGES), (1, 2))
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim:
        return [(path, dim) for dim, both in enumerate(zip(a.shape, b.shape, strict=True)) if both in counts][:1]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and (len(a), len(b)) in counts:
        return [(path, 0)]
    found = []
    theirs = dict(children(b))
    for key, value in children(a):
        found += _per_image(value, theirs.get(key), (*path, key))
    return found


def _sign(answer: Any, output: Tensor, dtype: torch.dtype, name: str, part: str) -> int:
    """How the scheduler's model output follows from the denoiser's answer."""
    try:
        found = as_sample(answer, output).float()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise MarbleError(f"{name}: expected {part} to answer {list(output.shape)}, saw another ({error})") from error
    for sign in (1, -1):
        if _close(sign * found, output, dtype):
            return sign
    raise MarbleError(
        f"{name}: what scheduler.step is given is neither what {part} answers nor its negative. Is that "
        "classifier-free guidance? Training goes without; set rollout.guidance to 1. If it is 1, the pipeline turns "
        "answers into something else, which training does not know how to"
    )


def _check(manner: Manner, watch: Watch, name: str, images: Tensor | None = None) -> None:
    """Make a recorded call again, from what training keeps of it; for some of its images, for all if None."""
    sample, output = watch.tensors(1)
    call = watch.calls[1]
    conditioning, given = Conditioning.of_call(manner, watch.calls[0], len(sample)), manner.latents_of(call, sample)
    if images is not None:
        conditioning, given, output = conditioning[images], given[images], output[images]
    told = call[manner.timestep].flatten()[:1].expand(len(given))
    denoiser = getattr(watch.pipe, watch.part)
    with torch.no_grad():
        again = conditioning.call(denoiser, given, told)
    if not _close(again, output, manner.latent_dtype):
        off = (again - output.float()).norm() / output.float().norm()
        part = "" if images is None else " for one of its images alone"
        raise MarbleError(f"{name}: a recorded call made again{part} gives another answer (off by {off:.1e} of it)")


def _check_levels(manner: Manner, watch: Watch, name: str) -> None:
    """The clean latents that the last answer stands for must be about where the scheduler ends."""
    scheduler, (_, output), call = watch.pipe.scheduler, watch.tensors(1), watch.calls[1]
    if scheduler.config.get("thresholding"):  # it ends elsewhere on purpose
        return
    seen = watch.seen(manner)
    levels = levels_of(scheduler, seen.steps, seen.told)[torch.ones(len(output), dtype=torch.int64)]
    found = levels.clean(manner.latents_of(call, output).float(), output.float())
    off = (found - seen.x0.float()).norm() / seen.x0.float().norm()
    if not off < _OFF:
        raise MarbleError(
            f"{name}: with prediction_type {levels.prediction} the last answer stands for clean latents that are "
            f"{off:.2f} of their length from where {type(scheduler).__name__} ends; choose another rollout.scheduler"
        )


def _same_for_one_prompt(value: Any, path: Path, dim: int) -> bool:
    """Whether the two images of each of two prompts are given the same, up to how batches are calculated."""
    if value is None:
        return True
    each = repeated(value.movedim(dim, 0) if dim else value, 2 * _IMAGES, path)
    return all(_alike(each[first], each[first + 1]) for first in (0, _IMAGES))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape:
        return _close(a, b, a.dtype)
    return same(a, b)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two outputs of a network that calculates in `dtype` are the same."""
    tolerance = 1e-4 if dtype.itemsize >= 4 else 0.02
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


def _at(tree: Any, path: Path) -> Any:
    """What is at `path`; None if it is not there."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, dict)) else repr(value)[:20]
