"""What is trained, in its versions: a LoRA, fresh or gone on from, or all of the denoiser."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from marble import MarbleError, Policy, Reward, train
from marble.config import make_config
from marble.memory import GIB
from marble.policy.weights import copy, find_targets

from ..pipelines import call_of

TEXTS = ["a cat", "two dogs on a mat"]
NAMES = ("sd3", "sd15", "sana", "pixart_sigma")  # the last has no LoRA loader in Diffusers


def stir(policy, version, size=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy._slots[version]:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def loras(folders, tmp_path_factory):
    """A LoRA of rank 3 and alpha 7 that does something, and what it makes."""
    made = {}

    def lora(name):
        if name not in made:
            policy = Policy.from_pretrained(str(folders(name)), call=call_of(name), device="cpu")
            policy.add_adapters(rank=3, alpha=7, seed=0)
            stir(policy, "ema")
            saved = policy.save(tmp_path_factory.mktemp(f"lora-{name}"))
            made[name] = saved, policy.images(TEXTS, [1, 2], steps=3, adapter="ema"), policy
        return made[name]

    return lora


# ---- which layers ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(2, 2) for name in names}) for _ in range(2)])
        self.norm = nn.LayerNorm(2)


def test_layers_by_the_endings_of_their_names():
    net = Net("to_q", "my_to_q", "to_v", "mlp")
    assert find_targets(net, "unet", None) == ["to_q", "to_v"]  # attention's, whichever of them there are
    assert find_targets(net, "unet", ["mlp", "my_to_q"]) == ["mlp", "my_to_q"]
    assert find_targets(net, "unet", ["blocks.0.mlp", "1.to_q"]) == ["blocks.0.mlp", "1.to_q"]


@pytest.mark.parametrize("target", ["o_q", "q", "blocks", "norm", "MLP", ""])
def test_targets_that_are_no_layers_ending(target):
    """Not a part of a word, nor a module that is not linear."""
    with pytest.raises(MarbleError) as caught:
        find_targets(Net("to_q", "mlp"), "unet", ["to_q", target])
    assert f"model.lora.targets: no layer of unet matches {target}; its linear layers end in" in str(caught.value)
    assert {"to_q", "mlp"} <= set(str(caught.value).split("end in ")[1].split(", "))


def test_a_model_without_attention_by_its_usual_names():
    with pytest.raises(MarbleError, match=r"no layer of unet is named like attention .* such as (mlp, gate|gate, mlp)"):
        find_targets(Net("mlp", "gate"), "unet", None)


def test_copy_by_hand():
    old, new = [torch.tensor([1.0, 2.0])], [torch.tensor([5.0, 4.0])]
    copy(new, old, keep=0.75)
    assert old[0].tolist() == [2.0, 2.5]
    copy(new, old)
    assert old[0].tolist() == [5.0, 4.0]
    half = [torch.zeros(2, dtype=torch.float16)]
    copy(new, half, keep=0.5)
    assert half[0].tolist() == [2.5, 2.0]
    assert half[0].dtype == torch.float16


# ---- a LoRA to go on from -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_lora(name, load, loras):
    """Its own rank, scale and layers hold, and at first it makes what it made."""
    saved, images, first = loras(name)
    policy = load(name)
    policy.add_adapters(rank=16, alpha=1, targets=["nowhere"], seed=5, start=str(saved))
    for version in ("default", "old", "ema"):
        assert torch.equal(policy.images(TEXTS, [1, 2], steps=3, adapter=version), images)
        assert (policy.denoiser.peft_config[version].r, policy.denoiser.peft_config[version].lora_alpha) == (3, 7)
    assert [p.shape for p in policy.parameters] == [p.shape for p in first.parameters]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters)
    trainable = {id(p) for p in policy.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in policy.parameters}
    assert not torch.allclose(policy.images(TEXTS, [1, 2], steps=3, adapter=None), images, atol=1e-3)
    stir(policy, "default", seed=1)  # the versions are not one and the same
    assert torch.equal(policy.images(TEXTS, [1, 2], steps=3, adapter="old"), images)
    assert not torch.allclose(policy.images(TEXTS, [1, 2], steps=3, adapter="default"), images, atol=1e-3)


def test_going_on_from_a_lora_in_half_precision(load, loras, folders):
    saved, _, first = loras("sd3")
    policy = load("sd3", dtype="bfloat16")
    policy.add_adapters(rank=1, alpha=1, seed=0, start=str(saved))
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    for ours, theirs in zip(policy.parameters, first._slots["ema"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", 'model.lora.start: "./nowhere" is neither a file, a folder nor a hub id (owner/name)'),
        ("nowhere", 'model.lora.start: "nowhere" is neither a file, a folder nor a hub id (owner/name)'),
        ("a/b/c", "neither a file, a folder nor a hub id"),
        ("EMPTY", "holds no .safetensors file (pytorch_lora_weights.safetensors, say)"),
        ("sd15", "belongs to a StableDiffusion3Pipeline"),
    ],
)
def test_what_cannot_be_gone_on_from(source, message, load, loras, tmp_path):
    source = {"EMPTY": str(tmp_path)}.get(source) or (str(loras(source)[0]) if source in NAMES else source)
    policy = load("sd3")
    with pytest.raises(MarbleError) as caught:
        policy.add_adapters(rank=1, alpha=1, seed=0, start=source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
@pytest.mark.parametrize("other", ["sana", "flux"])
def test_another_models_lora_with_some_names_in_common(other, load, loras):
    """Of what Diffusers only warns: layers that the file has and the model has not, and the other way round."""
    saved, *_ = loras(other)
    with pytest.raises(MarbleError, match=r"model\.lora\.start: "):
        load("sd3").add_adapters(rank=1, alpha=1, seed=0, start=str(saved))
    with pytest.raises(MarbleError, match=r"model\.merge: "):
        load("sd3", merge=[str(saved)])


def test_a_lora_for_a_text_encoder_too(load, tmp_path):
    """Half of it would be lost in training."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    policy = load("sd15")
    policy.add_adapters(rank=2, alpha=2, seed=0)
    encoder = policy.pipe.text_encoder
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    policy.pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=policy.adapter_state("default"),
        text_encoder_lora_layers=get_peft_model_state_dict(encoder),
    )
    with pytest.raises(MarbleError, match=r"has weights for the text_encoder too, which is not trained; merge it"):
        load("sd15").add_adapters(rank=1, alpha=1, seed=0, start=str(tmp_path))
    assert load("sd15", merge=[str(tmp_path)]).images(TEXTS, [1, 2], steps=2).isfinite().all()


def test_nothing_to_train_yet(load):
    policy = load("sd3")
    assert policy.parameters == []
    with pytest.raises(MarbleError, match="nothing to train: call add_adapters first"):
        policy.copy_adapter("default", "old")


# ---- merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_adding_for_good(name, load, loras):
    saved, images, _ = loras(name)
    policy = load(name, merge=[str(saved)])
    torch.testing.assert_close(policy.images(TEXTS, [1, 2], steps=3), images, atol=1e-4, rtol=0)
    assert not getattr(policy.denoiser, "peft_config", None)
    policy.add_adapters(rank=2, alpha=2, seed=0)
    torch.testing.assert_close(policy.images(TEXTS, [1, 2], steps=3, adapter=None), images, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.images(TEXTS, [1, 2], steps=3, adapter="default"), images, atol=1e-4, rtol=0)


def test_merging_twice_adds_twice(load, loras):
    saved, _, first = loras("sd3")
    weights = [
        load("sd3", merge=[str(saved)] * times).denoiser.transformer_blocks[0].attn.to_q.weight for times in (0, 1, 2)
    ]
    torch.testing.assert_close(weights[2] - weights[0], 2 * (weights[1] - weights[0]), atol=1e-5, rtol=1e-4)
    a, b = (first.adapter_state("ema")[f"transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(weights[1] - weights[0], 7 / 3 * b @ a, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_merged(load, loras, tmp_path):
    with pytest.raises(MarbleError, match=r"model\.merge: .* holds no \.safetensors file"):
        load("sd3", merge=[str(tmp_path)])
    with pytest.raises(MarbleError, match=r"model\.merge: .* is neither a file, a folder nor a hub id"):
        load("sd3", merge=["./nowhere"])


# ---- all of the denoiser --------------------------------------------------------------------------------


@pytest.fixture
def whole(load):
    policy = load("sd3")
    policy.train_whole()
    return policy


def images(policy, version):
    return policy.images(TEXTS, [1, 2], steps=2, adapter=version)


def test_versions_of_all_weights(whole, load):
    base = images(load("sd3"), None)
    for version in ("default", "old", "ema", None):
        assert torch.equal(images(whole, version), base)
    stir(whole, "default", 0.05)
    trained = images(whole, "default")
    assert not torch.allclose(trained, base, atol=1e-3)
    for version in ("old", "ema", None):
        assert torch.equal(images(whole, version), base)
    whole.copy_adapter("default", "old")
    assert torch.equal(images(whole, "old"), trained)
    before = [p.clone() for p in whole.parameters]
    whole.copy_adapter("default", "ema", keep=0.25)
    with whole.using("ema"):
        mixed = [p.clone() for p in whole.denoiser.parameters()]
    with whole.using(None):
        first = [p.clone() for p in whole.denoiser.parameters()]
    for mean, old, new in zip(mixed, first, before, strict=True):
        torch.testing.assert_close(mean, 0.25 * old + 0.75 * new)
    assert all(torch.equal(p, was) for p, was in zip(whole.parameters, before, strict=True))


def test_an_error_on_the_way_leaves_the_trained_version_in_place(whole):
    stir(whole, "default", 0.05)
    before = [p.clone() for p in whole.denoiser.parameters()]
    with pytest.raises(KeyError), whole.using(None):
        raise KeyError
    assert all(torch.equal(p, was) for p, was in zip(whole.denoiser.parameters(), before, strict=True))


def test_an_optimiser_moves_the_trained_version_alone(whole):
    optimiser = torch.optim.SGD(whole.parameters, lr=0.1)
    with whole.using("old"):
        pass  # there and back
    before = {name: [p.clone() for p in whole.adapter_state(name).values()] for name in ("default", "old", "ema")}
    for p in whole.parameters:
        p.grad = torch.ones_like(p)
    optimiser.step()
    for one, was in zip(whole.adapter_state("default").values(), before["default"], strict=True):
        torch.testing.assert_close(one, was - 0.1)
    for name in ("old", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole.adapter_state(name).values(), before[name], strict=True))


def test_state_of_all_weights_goes_and_comes_back(whole):
    stir(whole, "ema", 0.05)
    made = images(whole, "ema")
    state = {name: value.clone() for name, value in whole.adapter_state("ema").items()}
    assert state.keys() == dict(whole.denoiser.named_parameters()).keys()
    stir(whole, "ema", 0.05, seed=1)
    assert not torch.equal(images(whole, "ema"), made)
    whole.load_adapter_state("ema", state)
    assert torch.equal(images(whole, "ema"), made)


def test_stock_diffusers_loads_what_was_saved(whole, folders, tmp_path):
    stir(whole, "ema", 0.05)
    saved = whole.save(tmp_path)
    assert saved == tmp_path / "transformer"
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters, whole.denoiser.parameters(), strict=True))
    stock = DiffusionPipeline.from_pretrained(folders("sd3"))
    stock.set_progress_bar_config(disable=True)
    stock.transformer = type(stock.transformer).from_pretrained(saved)
    call = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0, **call_of("sd3")}
    found = stock(prompt=TEXTS[0], generator=torch.Generator().manual_seed(1), **call).images
    assert torch.equal(found.float(), whole.images(TEXTS[:1], [1], steps=2, adapter="ema"))


class Bright(Reward):
    name = "bright"

    def score(self, images, records):
        return images.float().mean((1, 2, 3))


def config_for(folder, name, tmp_path, **model):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nthe house\ntwo birds\na tree\na boat\nhills\na man\nstones\na door\n")
    return make_config(
        {
            "model": {"id": str(folder), "device": "cpu", "call": call_of(name), "train": "full", **model},
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"{__name__}:Bright"}],
            "rollout": {"prompts": 2, "group_size": 4, "steps": 3},
            "objective": {"kl": 0.1, "timesteps": 2},
            "balance": {"refresh": 2},
            "optimizer": {"lr": 1e-4},
            "budget": {"updates": 2},
            "evaluation": {"prompts": 2, "images": 1, "steps": 2},
        }
    )


@pytest.mark.parametrize(("name", "dtype"), [("sd3", "float32"), ("sd15", "float32"), ("sana", "bfloat16")])
def test_two_updates_of_all_weights(name, dtype, folders, tmp_path, caplog):
    """An exact and an amortised one; the exported component is not the base's, and its numbers are single."""
    with caplog.at_level(logging.WARNING, logger="marble"):
        run = train(config_for(folders(name), name, tmp_path, dtype=dtype), tmp_path / "run")
    part = "unet" if name == "sd15" else "transformer"
    base = getattr(DiffusionPipeline.from_pretrained(folders(name)), part)
    rows = [row for row in run.metrics() if "loss" in row]
    assert [row["update"] for row in rows] == [1, 2]
    assert all(row["gradient_norm"] > 0 for row in rows)
    found = type(base).from_pretrained(run.path / part)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    moved = [(a - b).abs().max().item() for a, b in zip(found.parameters(), base.parameters(), strict=True)]
    assert sum(change > 0 for change in moved) > 0.8 * len(moved)
    assert max(moved) < 1e-3
    count = sum(p.numel() for p in base.parameters())
    needed = (4 + 12 + 4 + 8 + 2 * 4) * count  # one reward's gradient and the common one
    assert f"full fine-tuning of {count / 1e6:.1f} million parameters takes {needed / GIB:.2f} GiB" in caplog.text


def test_all_weights_where_memory_is_short(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("marble.setup.free_bytes", lambda device: 1000)
    with pytest.raises(MarbleError) as caught:
        train(config_for(folders("sd3"), "sd3", tmp_path), tmp_path / "run")
    text = str(caught.value)
    assert text.startswith("model.train: full fine-tuning of")
    assert "GiB more on cpu, where 0.0 GiB are free" in text
    assert text.endswith("use model.train: lora")
