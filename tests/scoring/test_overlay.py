import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from marble import MarbleError, Policy
from marble.scoring import Overlay


def picture(policy):
    return policy.images(["a beach at noon"], [1], steps=2, max_sequence_length=12)


def test_a_loras_strength(untrained, small_lora, tmp_path):
    file = next(small_lora.glob("*.safetensors"))
    twice = {name: value * (2 if ".lora_B." in name else 1) for name, value in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        save_file(twice, tmp_path / file.name, metadata=opened.metadata())
    pictures = []
    for folder, scale in ((small_lora, 1.0), (small_lora, 2.0), (tmp_path, 1.0)):
        policy = Policy.from_pretrained(str(untrained))
        Overlay.find(str(folder), "--lora", scale).lay_over(policy, "--lora")
        pictures.append(picture(policy))
    assert torch.equal(pictures[1], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


def test_a_lora_is_known_by_its_content(small_lora, tmp_path):
    copy = shutil.copytree(small_lora, tmp_path / "copy")
    found, same = (Overlay.find(str(path), "--lora").describe() for path in (small_lora, copy))
    assert found["sha256"] == same["sha256"]
    file = next(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert Overlay.find(str(copy), "--lora").describe()["sha256"] != found["sha256"]
    assert Overlay.find("owner/name", "--lora").describe() == {"source": "owner/name", "scale": 1.0, "sha256": None}
    assert Overlay().describe() is None


def test_what_a_run_exported(small_lora, small_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small_config, run / "config.yaml")
    with pytest.raises(MarbleError, match="has exported nothing yet: it has no lora/"):
        Overlay.find(str(run), "--lora")
    shutil.copytree(small_lora, run / "lora")
    assert Overlay.find(str(run), "--lora") == Overlay(lora=str(run / "lora"))


def test_a_whole_denoiser(untrained, small_config, tmp_path):
    run = tmp_path / "run"
    (run / "transformer").mkdir(parents=True)
    text = small_config.read_text().replace("model:", "model:\n  train: full")
    (run / "config.yaml").write_text(text)
    policy = Policy.from_pretrained(str(untrained))
    base = picture(policy)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.mul_(1.1)
    changed = picture(policy)
    policy.denoiser.save_pretrained(run / "transformer")
    overlay, fresh = Overlay.find(str(run), "--lora"), Policy.from_pretrained(str(untrained))
    overlay.lay_over(fresh, "--lora")
    assert torch.equal(picture(fresh), changed)
    assert not torch.equal(changed, base)
    assert overlay.describe()["sha256"]
    with pytest.raises(MarbleError, match=r"--scale: .* no LoRA to scale"):
        Overlay.find(str(run), "--lora", 0.5)
