"""CLIP for rewards: published weights and their preprocessing, loaded once, and unit features of images and texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from marble.errors import MarbleError, first_line
from marble.rewards.checkpoint import fetch, is_local, weights_revision
from marble.rewards.images import Method, center_crop, normalise, resize, resize_shortest
from marble.rewards.model import Dtype, ModelReward

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of red, green and blue in [0, 1], as in `normalise`."""
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_METHODS: dict[Any, Method] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    """What a `preprocessor_config.json` says is done to an image."""

    size: int | tuple[int, int]
    """Of the shorter side, or height and width."""
    crop: tuple[int, int] | None
    method: Method
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, method: Method | None = None) -> Tensor:
        """`[N, 3, h, w]` float32 of `[N, 3, H, W]` uint8, as the image processors of transformers make it with PIL."""
        change = resize_shortest if isinstance(self.size, int) else resize
        images = change(images, self.size, method or self.method)  # type: ignore[arg-type]
        return normalise(images if self.crop is None else center_crop(images, self.crop), self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen CLIP; features are `[N, D]` float32 of length 1, whatever the network's precision."""

    network: Any
    revision: str
    preprocessing: Callable[..., Tensor]
    """`[N, 3, h, w]` float32 of `[N, 3, H, W]` uint8."""
    tokenizer: Any = None

    @property
    def scale(self) -> Tensor:
        """What cosines were multiplied by in training, about 100."""
        return self.network.logit_scale.float().exp()

    def images(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed images `[N, 3, h, w]`."""
        precision = self.network.visual_projection.weight.dtype
        return _unit(self.network.get_image_features(pixel_values=pixels.to(precision)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, equal ones encoded once; what is longer than the network takes is cut."""
        unique = list(dict.fromkeys(texts))
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = (tokens[each].to(self.network.device) for each in ("input_ids", "attention_mask"))
        features = _unit(self.network.get_text_features(input_ids=ids, attention_mask=mask))
        return features[[unique.index(text) for text in texts]]


class ClipReward(ModelReward):
    """A reward by a published CLIP: a subclass sets the defaults and writes `judge`."""

    reads: bool = True
    """Whether it needs texts encoded."""

    def __init__(
        self, *, source: str, revision: str | None, processor: str | None, device: str = "auto", dtype: Dtype
    ) -> None:
        """From the hub repository or folder `source`, preprocessed as `processor` (another; or the same) says."""
        super().__init__(device=device, dtype=dtype)
        self.source, self.processor, self.asked = source, processor or source, revision
        self.revision = f"{source}@{revision or 'main'}"

    def load(self) -> Any:
        """The network, a `Clip`; `revision` then says which commit, or the hash of local weights.

        Raises:
            MarbleError: it cannot be had.
        """
        clip = load_clip(
            self.source,
            self.asked,
            self.device,
            self.dtype,
            processor_source=self.processor,
            texts=self.reads,
            name="settings.source",
            processor_name="settings.processor",
        )
        self.revision = clip.revision
        return clip

    def cosines(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """`[N]` float32, each preprocessed image with its own text."""
        return (self.parts.images(pixels) * self.parts.texts(texts)).sum(dim=1)


def load_clip(
    source: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    processor_source: str | None = None,
    texts: bool = True,
    name: str = "settings.source",
    processor_name: str = "settings.processor",
) -> Clip:
    """A CLIP in the format of transformers; those of one source, revision, device and precision share their network.

    Args:
        source: hub repository or folder.
        revision: branch, tag or commit on the hub, of `source`.
        device: where it runs.
        dtype: its precision.
        processor_source: where the tokenizer and `preprocessor_config.json` are, if elsewhere.
        texts: whether a tokenizer is needed.
        name: what messages call `source`.
        processor_name: what they call `processor_source`.

    Raises:
        MarbleError: something cannot be had, or does not fit.
    """
    network, version = named(name, load_network, "CLIPModel", source, revision, device, dtype)
    if processor_source not in (None, source):
        name, revision = processor_name, None
    processor_source = processor_source or source
    preprocessing = named(name, load_preprocessing, processor_source, revision)
    size = network.config.vision_config.image_size
    if preprocessing.crop not in (None, (size, size)):
        given = "×".join(map(str, preprocessing.crop))
        raise MarbleError(
            f'{name}: "{processor_source}" makes images of {given} pixels, "{source}" takes {size}×{size}'
        )
    tokenizer = named(name, load_tokenizer, processor_source, revision) if texts else None
    if texts:
        check_tokenizer(tokenizer, network, f'{name}: the tokenizer of "{processor_source}"')
    return Clip(network, version, preprocessing, tokenizer)


@functools.cache
def load_network(
    kind: str, source: str, revision: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, str]:
    """A frozen network of a class of transformers, and which weights it has.

    Raises:
        MarbleError: it cannot be had, or the weights are not those of such a network.
    """
    import transformers

    config = fetch(source, "config.json", revision)
    try:
        network, found = getattr(transformers, kind).from_pretrained(
            source if not is_local(source) else config.parent,
            revision=revision,
            local_files_only=is_local(source),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # to be listed with the others
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers makes of a folder that is not what it should be
        raise MarbleError(f'cannot load "{source}": {first_line(error)}') from error
    surplus = [key for key in found["unexpected_keys"] if not key.endswith("position_ids")]  # of older versions
    wrong = [str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]]
    named = (("missing", found["missing_keys"]), ("unexpected", surplus), ("of another shape", wrong))
    problems = [f"{len(keys)} {how}: {', '.join(sorted(keys)[:8])}" for how, keys in named if keys]
    if problems:
        raise MarbleError(f'"{source}" does not fit its model: {"; ".join(problems)}')
    weights = [config]
    if is_local(source):
        weights = sorted(config.parent.glob("*.safetensors")) or sorted(config.parent.glob("*.bin"))
    return settle(network, device, dtype), weights_revision(source, *weights)


@functools.cache
def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub repository or folder.

    Raises:
        MarbleError: it cannot be had.
    """
    from transformers import AutoTokenizer

    local = is_local(source)
    try:
        return AutoTokenizer.from_pretrained(
            Path(source).expanduser() if local else source, revision=revision, local_files_only=local
        )
    except Exception as error:  # see load_network
        raise MarbleError(f'cannot load the tokenizer of "{source}": {first_line(error)}') from error


@functools.cache
def load_preprocessing(source: str, revision: str | None = None) -> Preprocessing:
    """What `preprocessor_config.json` of a hub repository or folder says, or `processor_config.json` in later ones.

    Raises:
        MarbleError: it cannot be had, or asks for what is not done here.
    """
    try:
        file = fetch(source, "preprocessor_config.json", revision)
    except MarbleError as error:
        try:
            file = fetch(source, "processor_config.json", revision)
        except MarbleError:
            raise error from None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("image_processor", config)
        size, crop = config["size"], config.get("crop_size")
        if not all(config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize")):
            raise ValueError("it leaves a step out")
        if isinstance(size, Mapping):
            size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        if not isinstance(size, int | tuple):
            raise ValueError(f"size is {size!r}")
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        return Preprocessing(
            size=size,
            crop=(crop["height"], crop["width"]) if config.get("do_center_crop", True) and crop else None,
            method=_METHODS[config.get("resample", 3)],
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MarbleError(
            f'"{file}" does not say what a CLIP needs (size, crop_size, bilinear or bicubic resample, image_mean and '
            f"image_std): {type(error).__name__}: {error}"
        ) from error


def check_tokenizer(tokenizer: Any, network: Any, what: str) -> None:
    """See that a tokenizer speaks a CLIP's language: features are taken where a text ends.

    Raises:
        MarbleError: it does not.
    """
    config = network.config.text_config
    if len(tokenizer) > config.vocab_size:
        raise MarbleError(f"{what} has {len(tokenizer)} tokens, the network knows {config.vocab_size}")
    if config.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: older configs, for which the highest is the end
        raise MarbleError(f"{what} ends texts with {tokenizer.eos_token_id}, the network with {config.eos_token_id}")


def named(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; its errors begin with the setting that they come from."""
    try:
        return function(*arguments)
    except MarbleError as error:
        raise MarbleError(f"{name}: {error}") from error


def settle(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network as rewards use it; its scale stays in single precision, since bfloat16 would be 1% off."""
    scale = getattr(network, "logit_scale", None)
    exact = None if scale is None else scale.detach().float().clone()
    network.to(device, dtype).eval().requires_grad_(False)
    if scale is not None:
        network.logit_scale.data = exact.to(device)  # type: ignore[union-attr]
    return network


def _unit(output: Any) -> Tensor:
    """`[N, D]` float32 of length 1; transformers before 5 return the tensor, later ones an object."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)
