"""The tiny pipelines of the tests: they load as any folder does, and their pictures follow prompt, latents and LoRA."""

from __future__ import annotations

import pytest
import torch

from .pipelines import FAMILIES, FURTHER, build, call_of

PROMPTS = ["a red cat on a mat", "two blue dogs under a tree"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Diffusers' Euler and DPM schedulers hand tensors to numpy 2, which minds.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A pipeline's folder by its name, built once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = build(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def load(folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline, name, prompts, seeds, guidance=1.0):
    """`[N, 3, H, W]`, or `[N, F, 3, H, W]` of Wan."""
    if name == "qwenimage":
        options = {"true_cfg_scale": guidance, **({"negative_prompt": [""] * len(prompts)} if guidance > 1 else {})}
    else:
        options = {"guidance_scale": guidance}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    out = pipeline(
        prompt=list(prompts),  # ZImage writes into the list it is given
        generator=generators,
        num_inference_steps=4,
        output_type="pt",
        **call_of(name),
        **options,
    )
    return out[0]


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER, "sd15-v"])
def test_pictures_follow_prompt_and_seed_and_nothing_else(name, folder_of):
    pipeline = load(folder_of(name))
    images = pictures(pipeline, name, PROMPTS, [1, 2])
    assert images.isfinite().all()
    assert 0.1 < images.std() < 0.4
    assert ((images == 0) | (images == 1)).float().mean() < 0.25
    assert torch.equal(images, pictures(pipeline, name, PROMPTS, [1, 2]))

    other = pictures(pipeline, name, PROMPTS[::-1], [1, 3])
    assert (images[0] - other[0]).abs().mean() > 0.005  # same seed, another prompt
    assert (images[1] - other[1]).abs().mean() > 0.05  # another seed as well
    same = pictures(pipeline, name, [PROMPTS[0]] * 2, [1, 3])
    torch.testing.assert_close(same[0], images[0], atol=1e-4, rtol=0)  # whatever stands beside it
    assert (same[0] - same[1]).abs().mean() > 0.05  # another seed, same prompt


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_guidance_shows(name, folder_of):
    pipeline = load(folder_of(name))
    guided = pictures(pipeline, name, PROMPTS, [1, 2], guidance=4.0)
    assert guided.isfinite().all()
    assert (guided - pictures(pipeline, name, PROMPTS, [1, 2])).abs().mean() > 0.005


@pytest.mark.parametrize("name", ["qwenimage", "zimage"])
def test_text_is_as_long_as_the_prompt(name, folder_of):
    pipeline = load(folder_of(name))
    lengths = [len(pipeline.encode_prompt([prompt])[0][0]) for prompt in PROMPTS]
    assert lengths[1] - lengths[0] == len(PROMPTS[1]) - len(PROMPTS[0])
    assert lengths[0] == len(PROMPTS[0]) + {"qwenimage": 5, "zimage": 8}[name]  # the chat's own tokens


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_a_lora_on_attention_gets_gradients_everywhere(name, folder_of):
    from peft import LoraConfig, inject_adapter_in_model

    pipeline = load(folder_of(name))
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # PixArt's and HunyuanDiT's denoisers lack `add_adapter`.
        inject_adapter_in_model(LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False), denoiser)
    inputs = []
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    pictures(pipeline, name, PROMPTS, [1, 2])
    args, kwargs = inputs[1]
    output = denoiser(*args, **kwargs)[0]
    (torch.stack(output) if isinstance(output, list) else output).square().mean().backward()
    norms = {key: value.grad.norm() for key, value in denoiser.named_parameters() if value.requires_grad}
    silent = [key for key, norm in norms.items() if not 1e-8 < norm < 1e4]
    assert len(norms) >= 14  # of each layer's two factors
    assert not silent


def test_weights_depend_on_the_seed_alone(tmp_path):
    before = torch.get_rng_state()
    first = load(build("flux", tmp_path / "a", seed=1)).transformer.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)  # moves torch's own generator on
    again = load(build("flux", tmp_path / "b", seed=1)).transformer.state_dict()
    other = load(build("flux", tmp_path / "c", seed=2)).transformer.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])
