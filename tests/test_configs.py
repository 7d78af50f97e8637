"""The configs for published models: valid, commented, and run for two updates on tiny pipelines of the same classes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marble import Reward, train
from marble.config import Config, make_config, read_config
from marble.registry import known
from marble.setup import check_config

from .pipelines import build, call_of

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
PAPER = "sd35-medium-paper"
# `model.id` → the tiny pipeline of the same class, and that class.
TINY = {
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", "StableDiffusion3Pipeline"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", "StableDiffusionPipeline"),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", "StableDiffusionXLPipeline"),
    "black-forest-labs/FLUX.1-dev": ("flux", "FluxPipeline"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", "WanPipeline"),
}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


class Brightness(Reward):
    name = "brightness"

    def score(self, images, records):
        return images.float().mean(dim=(1, 2, 3))


class Redness(Reward):
    name = "redness"

    def score(self, images, records):
        return images[:, 0].float().mean(dim=(1, 2)) - images[:, 1:].float().mean(dim=(1, 2, 3))


class Sharpness(Reward):
    name = "sharpness"

    def score(self, images, records):
        grey = images.float().mean(dim=1)
        return (grey[:, 1:] - grey[:, :-1]).abs().mean(dim=(1, 2))


class Contrast(Reward):
    name = "contrast"

    def score(self, images, records):
        return images.float().flatten(1).std(dim=1)


TRAINED, KEPT = ("Brightness", "Redness", "Sharpness"), "Contrast"


def test_every_model_has_a_tiny_one():
    assert len(FILES) >= 6
    assert {read_config(path)["model"]["id"] for path in FILES} == set(TINY)


@every_file
def test_is_valid_without_a_download(path, monkeypatch):
    """All but the prompts that have to be fetched: names, settings, what is installed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_config(read_config(path))
    uses = [*config.rewards, *config.held_out_rewards]
    assert {use.reward for use in uses} <= set(known("reward"))
    assert {source.source for source in config.prompts} <= set(known("prompt source"))
    missing = [source.source for source in config.prompts if source.source == "pickscore"]
    assert check_config(config, fetch=False) == missing


@every_file
def test_sections_are_known_and_choices_have_comments(path):
    assert set(read_config(path)) <= set(Config.model_fields)
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert 'pip install "marble-diffusion[rewards]"' in head
    assert "not measured" in head or "no memory measured" in head
    assert "Memory" in head or "memory" in head
    explained = [i for i, line in enumerate(lines) if " # " in line or line.lstrip().startswith("#")]
    for setting in ("dtype:", "checkpointing:", "batch:", "micro_batch:"):
        at = next(i for i, line in enumerate(lines) if line.strip().lstrip("{").startswith(setting))
        assert {at - 2, at - 1, at} & set(explained), f"{setting} has no reason"
    assert all(len(line) <= 120 for line in lines)


# arXiv 2605.06507, its authors' code (aim-uofa/MARBLE at 1bf9543) and DiffusionNFT's under it, by hand.
PUBLISHED = {
    "model.id": "stabilityai/stable-diffusion-3.5-medium",
    "model.train": "lora",
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "model.call": {"height": 512, "width": 512},
    "model.dtype": "float16",
    "rollout.prompts": 48,
    "rollout.group_size": 24,
    "rollout.steps": 25,
    "rollout.scheduler": "dpm++",
    "rollout.guidance": 1.0,
    "objective.name": "nft",
    "objective.beta": 0.1,
    "objective.amax": 5.0,
    "objective.kl": 1e-4,
    "objective.timesteps": 24,
    "objective.std": "batch",
    "objective.old.start": 0,
    "objective.old.slope": 0.001,
    "objective.old.limit": 0.95,
    "balance.method": "published",
    "balance.refresh": 10,
    "balance.decay": 0.7,
    "balance.smooth": "weights",
    "balance.advantage_scale": "published",
    "balance.norms": "raw",
    "optimizer.name": "adamw",
    "optimizer.lr": 3e-4,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 1e-4,
    "optimizer.eps": 1e-8,
    "optimizer.clip": 1.0,
    "optimizer.updates_per_epoch": 1,
    "optimizer.micro_batch": 9,
    "rollout.batch": 9,
    "seed": 42,
    "evaluation.every": 10,
    "checkpoint_every": 30,
    "ema": 0.9,
    "evaluation.steps": 40,
    "evaluation.scheduler": "euler",
    "evaluation.guidance": 1.0,
}


def paper():
    return next(path for path in FILES if path.stem == PAPER)


@pytest.mark.parametrize(("field", "value"), PUBLISHED.items(), ids=PUBLISHED)
def test_the_papers_config_has_its_numbers(field, value):
    found, written = make_config(read_config(paper())), read_config(paper())
    for name in field.split("."):
        found, written = getattr(found, name), written[name]  # spelled out, not left to defaults
    assert found == value


def test_the_papers_rewards_prompts_and_layers():
    config = make_config(read_config(paper()))
    assert [term.reward for term in config.rewards] == ["pickscore", "hpsv21", "clipscore", "ocr", "geneval"]
    assert [use.reward for use in config.held_out_rewards] == ["aesthetic", "imagereward", "unifiedreward"]
    assert not any(use.settings or use.url for use in [*config.rewards, *config.held_out_rewards])
    assert {(term.weight, term.priority, term.floor) for term in config.rewards} == {(1.0, 1.0, False)}
    assert len(config.prompts) == 3
    assert len({source.share for source in config.prompts}) == 1
    assert sorted(config.model.lora.targets) == sorted(
        f"attn.{layer}"
        for layer in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    )
    assert [round(config.objective.old.at(u), 3) for u in (0, 100, 950, 5000)] == [0, 0.1, 0.95, 0.95]


def shrunk(path: Path, folder: Path, files: Path) -> Config:
    """The file's own settings at sizes for a CPU: 6 images of 3 steps, other rewards and prompts, two updates."""
    values = read_config(path)
    name, _ = TINY[values["model"]["id"]]
    values["model"] |= {"id": str(folder), "call": call_of(name), "device": "cpu", "quantize": None}
    values["model"].pop("variant", None)  # of the files on the hub
    for i, source in enumerate(values["prompts"]):
        source["source"] = str(files / f"{i}.txt")
    values["rewards"] = [{"reward": f"{__name__}:{kind}"} for kind in TRAINED]
    values["held_out_rewards"] = [f"{__name__}:{KEPT}"]
    sources = len(values["prompts"])
    values["rollout"] |= {"prompts": 3, "group_size": 2, "steps": 3, "batch": 4}
    values["objective"] |= {"timesteps": 2}
    values["optimizer"] |= {"micro_batch": 4}
    values["budget"] = {"updates": 2}
    values["evaluation"] |= {"prompts": max(2, sources), "images": 1, "steps": 2, "every": 0}
    values |= {"diagnose_every": 2, "threads": 1}
    return make_config(values)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A source of six prompts, two of them held out, for each of a config's."""
    folder = tmp_path_factory.mktemp("prompts")
    for i in range(3):
        text = "".join(f"a {color} thing, {i}\n" for color in ("red", "blue", "green", "pale", "dark", "golden"))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny pipeline's folder by its name, built once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = build(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@every_file
def test_two_updates_on_a_tiny_pipeline_of_the_same_class(path, folder_of, files, tmp_path):
    from diffusers import DiffusionPipeline

    name, kind = TINY[read_config(path)["model"]["id"]]
    config = shrunk(path, folder_of(name), files)
    run = train(config, tmp_path / "run")

    rows = run.metrics()
    assert [row["update"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert "skipped" not in row
        assert math.isfinite(row["loss"])
        assert 0 < row["gradient_norm"] < math.inf
    names = {"brightness", "redness", "sharpness", "contrast"}
    evaluation = run.evaluation()
    assert set(evaluation["gains"]) == names
    for part in ("before", "after"):
        assert set(evaluation[part]["means"]) == names
        assert all(math.isfinite(mean) for mean in evaluation[part]["means"].values())

    pipe = DiffusionPipeline.from_pretrained(folder_of(name))
    assert type(pipe).__name__ == kind
    pipe.load_lora_weights(run.path / "lora")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    loaded = {key: value for key, value in denoiser.state_dict().items() if ".lora_" in key}
    written = load_file(run.path / "lora" / "pytorch_lora_weights.safetensors")
    assert len(loaded) == len(written) > 0
    assert any(value.abs().max() > 0 for key, value in loaded.items() if "lora_B" in key)
    assert config.model.dtype in ("bfloat16", "float16")  # and it ran so
    assert all(value.dtype == torch.float32 for value in written.values())
