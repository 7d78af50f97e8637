import subprocess
import sys

import pytest
import torch

from marble import MarbleError, Policy
from marble.noise import NoiseLevels
from marble.policy import model_path

TEXTS = ["a red circle", 'the word "CAT" in blue']
CALL = {"max_sequence_length": 12}
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj"]


@pytest.fixture
def policy(untrained):
    made = Policy.from_pretrained(str(untrained), call=CALL)
    made.add_adapters(rank=4, alpha=8, targets=TARGETS, seed=0)
    return made


def stir(policy, adapter="default", seed=0):
    """Give an adapter an effect: a fresh LoRA's second factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy._slots[adapter]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def test_same_seed_same_image_whatever_is_sampled_beside_it(policy):
    both = policy.sample(TEXTS, [1, 2, 3, 4], steps=3)
    alone = policy.sample([TEXTS[1]], [4], steps=3)
    torch.testing.assert_close(both.images[3:], alone.images, atol=1e-5, rtol=0)
    again = policy.sample(TEXTS, [1, 2, 3, 4], steps=3)
    assert torch.equal(both.x0, again.x0)
    assert not torch.allclose(both.images[0], both.images[1], atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
def test_call_size_does_not_matter(policy, batch):
    whole = policy.sample(TEXTS, [1, 2, 3, 4], steps=2)
    parts = policy.sample(TEXTS, [1, 2, 3, 4], steps=2, batch=batch)
    torch.testing.assert_close(whole.x0, parts.x0, atol=1e-4, rtol=0)
    half = torch.full((4,), 0.5)
    at = NoiseLevels(half, half, half * 1000, "flow_prediction")
    noisy = at.noised(whole.x0, torch.randn(whole.x0.shape))
    a, b = (policy.predict(noisy, at, s.conditioning, "default").x0 for s in (whole, parts))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_text_is_kept_once_a_prompt(policy):
    samples = policy.sample(TEXTS, list(range(6)), steps=2)
    assert samples.conditioning.rows.tolist() == [0, 0, 0, 1, 1, 1]
    (table,) = samples.conditioning.tables
    assert all(len(value) == 2 for value in table.per_prompt.values())


def test_replaying_the_conditioning_retraces_the_rollout(policy):
    """Euler by hand with `predict` ends where the pipeline ended."""
    stir(policy)
    samples = policy.sample(TEXTS, [5, 6], steps=4, adapter="default")
    sigmas = torch.cat([samples.levels.sigmas, torch.zeros(1)])
    x = torch.cat([torch.randn(1, *samples.x0.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    with torch.no_grad():
        for i in range(4):
            at = samples.levels[torch.tensor([i, i])]
            found = policy.predict(x, at, samples.conditioning, "default")
            x = x + (sigmas[i + 1] - sigmas[i]) * found.output
    torch.testing.assert_close(x, samples.x0, atol=1e-5, rtol=1e-5)


def test_adapters_are_what_they_claim(policy, untrained):
    base = Policy.from_pretrained(str(untrained), call=CALL)
    plain = base.sample(TEXTS, [1, 2], steps=2).x0
    assert torch.equal(policy.sample(TEXTS, [1, 2], steps=2, adapter="default").x0, plain)  # fresh: no effect yet
    stir(policy)
    trained = policy.sample(TEXTS, [1, 2], steps=2, adapter="default").x0
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert torch.equal(policy.sample(TEXTS, [1, 2], steps=2, adapter=None).x0, plain)
    assert torch.equal(policy.sample(TEXTS, [1, 2], steps=2, adapter="old").x0, plain)
    policy.copy_adapter("default", "old")
    assert torch.equal(policy.sample(TEXTS, [1, 2], steps=2, adapter="old").x0, trained)


def test_only_the_default_adapter_is_trained(policy):
    trainable = {id(p) for p in policy.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in policy.parameters}
    policy.sample(TEXTS, [1, 2], steps=2, adapter="old")
    assert {id(p) for p in policy.denoiser.parameters() if p.requires_grad} == trainable


def test_copy_keeps_a_share(policy):
    stir(policy, "default", 1)
    stir(policy, "old", 2)
    before = [p.clone() for p in policy._slots["old"]]
    policy.copy_adapter("default", "old", keep=0.25)
    for old, was, new in zip(policy._slots["old"], before, policy._slots["default"], strict=True):
        torch.testing.assert_close(old, 0.25 * was + 0.75 * new)


def test_lora_in_stock_diffusers_without_marble_gives_the_same_pixels(policy, untrained, tmp_path):
    stir(policy, "ema")
    policy.save(tmp_path)
    own = Policy.from_pretrained(str(untrained))
    own.load_lora(tmp_path / "lora")
    picture = own.picture(TEXTS[0], 7, num_inference_steps=3, guidance_scale=1.0)
    stock = f"""
import sys, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(untrained)!r})
pipe.load_lora_weights({str(tmp_path / "lora")!r})
generator = torch.Generator().manual_seed(7)
image = pipe({TEXTS[0]!r}, num_inference_steps=3, guidance_scale=1.0, generator=generator).images[0]
image.save({str(tmp_path / "stock.png")!r})
assert not any(name == "marble" or name.startswith("marble.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", stock], check=True, capture_output=True)
    from PIL import Image, ImageChops

    difference = ImageChops.difference(picture, Image.open(tmp_path / "stock.png"))
    assert difference.getbbox() is None
    base = Policy.from_pretrained(str(untrained)).picture(TEXTS[0], 7, num_inference_steps=3, guidance_scale=1.0)
    assert ImageChops.difference(picture, base).getbbox() is not None  # the LoRA does something


def test_state_round_trip(policy):
    stir(policy)
    state = {k: v.clone() for k, v in policy.adapter_state("default").items()}
    stir(policy, seed=5)
    policy.load_adapter_state("default", state)
    for key, value in policy.adapter_state("default").items():
        assert torch.equal(value, state[key])
    assert all(p.requires_grad for p in policy.parameters)


def test_clear_errors(tmp_path, untrained):
    with pytest.raises(MarbleError, match="does not exist"):
        model_path(str(tmp_path / "none"))
    with pytest.raises(MarbleError, match=r"no model_index.json"):
        model_path(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(MarbleError, match="names no class"):
        model_path(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(MarbleError, match="could not be loaded"):
        Policy.from_pretrained(str(tmp_path))
    policy = Policy.from_pretrained(str(untrained))
    with pytest.raises(MarbleError, match="no layer of transformer matches"):
        policy.add_adapters(rank=2, alpha=2, targets=["nothing_like_it"], seed=0)
    with pytest.raises(MarbleError, match=r"holds no \.safetensors"):
        policy.load_lora(tmp_path)
