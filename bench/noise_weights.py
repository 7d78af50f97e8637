"""What a visit should weigh where a network predicts noise: ten updates on closed-form rewards, three weightings.

    python -m bench.noise_weights            # minutes on a core; from the repository's root

The model is the tests' tiny Stable Diffusion 1.5, settled for a few seconds (`tests/pipelines/settled.py`). Gains
are of held-out prompts, in standard deviations of the first evaluation's pictures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tests.pipelines import build, call_of
from tests.pipelines.settled import settle
from torch import Tensor

from marble import Reward, train
from marble.config import make_config
from marble.noise import NoiseLevels

PROMPTS = "a cat\na dog on a mat\nthe house\ntwo red birds\none tall tree\na boat\ngreen hills\na man\nstones\na door\n"


class Red(Reward):
    """Redness."""

    name = "red"

    def score(self, images: Tensor, records: object) -> Tensor:
        """Of the first channel over the others."""
        pixels = images.float() / 255
        return pixels[:, 0].mean((1, 2)) - pixels[:, 1:].mean((1, 2, 3))


class Bright(Reward):
    """Brightness."""

    name = "bright"

    def score(self, images: Tensor, records: object) -> Tensor:
        """Mean of all channels."""
        return (images.float() / 255).mean((1, 2, 3))


class Contrast(Reward):
    """Contrast."""

    name = "contrast"

    def score(self, images: Tensor, records: object) -> Tensor:
        """Standard deviation."""
        return (images.float() / 255).std((1, 2, 3))


class Left(Reward):
    """A bright left half."""

    name = "left"

    def score(self, images: Tensor, records: object) -> Tensor:
        """Of the left half over the right one."""
        pixels, middle = images.float() / 255, images.shape[-1] // 2
        return pixels[..., :middle].mean((1, 2, 3)) - pixels[..., middle:].mean((1, 2, 3))


WEIGHTS: dict[str, Callable[[NoiseLevels], Tensor]] = {
    "none": lambda levels: torch.ones_like(levels.sigmas),
    "alpha": lambda levels: levels.sigmas / levels.gains,
    "min(1, alpha²/sigma²)": lambda levels: levels.gains.clamp(min=1) ** -2,
}


def gain(folder: Path, reward: type[Reward], weights: Callable[[NoiseLevels], Tensor], out: Path, seed: int) -> float:
    """Of ten updates."""
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPTS)
    config = make_config(
        {
            "seed": seed,
            "model": {"id": str(folder), "device": "cpu", "call": call_of("sd15"), "lora": {"rank": 4, "alpha": 8}},
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"bench.noise_weights:{reward.__name__}"}],
            "rollout": {"prompts": 4, "group_size": 32, "steps": 5},
            "objective": {"beta": 1.0, "kl": 0.0, "timesteps": 4},
            "optimizer": {"lr": 3e-3, "micro_batch": 128},
            "balance": {"refresh": 5},
            "ema": 0.0,
            "budget": {"updates": 10},
            "evaluation": {"prompts": 2, "images": 32, "steps": 5},
            "diagnose_every": 0,
        }
    )
    plain = NoiseLevels.weights
    NoiseLevels.weights = property(weights)  # type: ignore[method-assign,assignment]
    try:
        found = train(config, out).evaluation()["gains"][reward.name]
    finally:
        NoiseLevels.weights = plain  # type: ignore[method-assign]
    return found["gain"] / found["spread"]


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = build("sd15", Path(place) / "sd15")
        settle(folder, call_of("sd15"))
        for name, weights in WEIGHTS.items():
            for reward in (Red, Bright, Contrast, Left):
                gains = [
                    gain(folder, reward, weights, Path(place) / f"{name[:3]}{reward.name}{s}", s) for s in (0, 1, 2)
                ]
                print(f"{name:22s} {reward.name:9s}", " ".join(f"{g:+.2f}" for g in gains), flush=True)


if __name__ == "__main__":
    main()
