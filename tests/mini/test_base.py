"""The shipped model: mediocre at everything, hopeless at nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("world", ["mini", "mini-b"])
def test_it_is_a_stock_pipeline_of_the_size_promised(world):
    from marble.mini import weights_folder

    folder = weights_folder(world) / "model"
    total = sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file())
    assert total < 12 * 2**20
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
assert type(pipe) is StableDiffusion3Pipeline
assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
assert "marble" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "least"), [("mini", 0.20), ("mini-b", 0.05)])
def test_every_reward_stands_well_between_noise_and_perfect(world, least):
    sys.path.insert(0, str(ROOT / "bench"))
    from mini_base import standing

    for name, (noise, base, perfect) in standing(world).items():
        assert least <= (base - noise) / (perfect - noise) <= 0.75, name


@pytest.mark.slow
def test_pretraining_runs_resumes_and_refuses_another_recipe(tmp_path):
    command = [sys.executable, "-m", "marble", "mini", "pretrain", "--out", str(tmp_path / "m"), "--scale", "0.002"]
    for _ in range(2):  # the second finds every stage done
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "model" / "model_index.json").exists()
    assert (tmp_path / "m" / "judges" / "second.safetensors").exists()
    other = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "another world, seed, scale or recipe" in other.stderr
