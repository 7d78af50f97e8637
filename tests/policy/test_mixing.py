"""Mixtures of trained weights against weights merged by hand."""

import pytest
import torch
from safetensors.torch import load_file

from marble import MarbleError
from marble.config import LoRA
from marble.policy.mixing import FullMixture, LoRAMixture, Stored
from marble.policy.weights import load_lora
from marble.storage import load_tree, save_tree

SHAPES = {  # rank, alpha and layers of two LoRA
    "other rank and scale": [(4, 8, None), (3, 12, None)],
    "other layers": [(4, 8, ["to_q", "to_v"]), (2, 3, ["to_v", "to_out.0"])],
}


def trained(load, family, folder, rank, alpha, targets, seed):
    """A LoRA that has learned something, as a run exports it; and the policy that has it."""
    policy = load(family)
    policy.add_adapters(rank=rank, alpha=alpha, targets=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy._slots["ema"]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Stored(policy.save(folder)), policy


def pictures(policy, adapter="default"):
    return policy.images(["abc", "de"], [1, 2], steps=2, adapter=adapter)


def add_by_hand(policy, stored, scale, weight):
    """`W += weight · scale · B A` in the denoiser itself."""
    state = load_file(next(stored.path.glob("*.safetensors")))
    for key in state:
        if ".lora_A." in key:
            name = key.split(".lora_A.")[0].removeprefix("base_model.model.").removeprefix(f"{policy.part}.")
            a, b = state[key].double(), state[key.replace("lora_A", "lora_B")].double()
            layer = policy.denoiser.get_submodule(name)
            layer.weight.data += (weight * scale * b.flatten(1) @ a.flatten(1)).view_as(layer.weight).float()


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("sd3", "other rank and scale"),
        ("sd3", "other layers"),
        ("sd15", "other layers"),
        ("pixart_sigma", "other layers"),
    ],
)
def test_a_mixture_is_the_sum_of_the_merged_deltas(load, tmp_path, family, shape):
    merged, policy = load(family), load(family)
    base = pictures(policy)
    parts = {}
    for i, ((rank, alpha, targets), weight) in enumerate(zip(SHAPES[shape], (0.75, 0.5), strict=True)):
        stored, _ = trained(load, family, tmp_path / str(i), rank, alpha, targets, seed=i + 1)
        parts[stored] = weight
        add_by_hand(merged, stored, alpha / rank, weight)
    LoRAMixture(policy).put(parts)
    torch.testing.assert_close(pictures(policy), pictures(merged), atol=2e-4, rtol=0)
    assert (pictures(policy) - base).abs().max() > 0.02


def test_at_1_it_is_the_lora_and_at_0_the_base_bit_for_bit(load, tmp_path):
    policy = load("sd3")
    base = pictures(policy)
    one, alone = trained(load, "sd3", tmp_path / "one", 4, 8, None, seed=1)
    two, _ = trained(load, "sd3", tmp_path / "two", 3, 5, None, seed=2)
    mixture = LoRAMixture(policy)
    for parts in ({one: 0.3, two: 0.7}, {one: 1.0}, {two: 1.5}, {one: 1.0, two: 0.0}):
        mixture.put(parts)
        assert torch.equal(pictures(policy), pictures(alone, "ema")) == (parts.get(one) == 1)
    for nothing in ({}, {one: 0.0}):
        mixture.put(nothing)
        assert torch.equal(pictures(policy), base)
    assert not policy.denoiser.peft_config  # nothing is held that is not needed


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_stock_diffusers_mixes_the_same(load, tmp_path):
    """As docs/guide.md says: nothing has to be exported."""
    one, _ = trained(load, "sd3", tmp_path / "one", 4, 8, None, seed=1)
    two, _ = trained(load, "sd3", tmp_path / "two", 3, 5, None, seed=2)
    ours, stock = load("sd3"), load("sd3")
    LoRAMixture(ours).put({one: 0.25, two: 0.75})
    for name, stored in (("a", one), ("b", two)):
        load_lora(stock.pipe, str(stored.path), "", adapter_name=name)
    stock.pipe.set_adapters(["a", "b"], [0.25, 0.75])
    assert torch.equal(pictures(ours), pictures(stock))


def checkpoint_of(policy, folder):
    folder.mkdir()
    state = {name: policy.adapter_state(name) for name in ("default", "old", "ema")}
    save_tree(folder / "state.safetensors", {"epoch": 3, "adapters": state, "updater": {"updates": 2}})
    return folder / "state.safetensors"


def test_a_checkpoint_s_average(load, tmp_path):
    _, alone = trained(load, "sd3", tmp_path / "lora", 3, 12, None, seed=1)
    stored = Stored.checkpoint(checkpoint_of(alone, tmp_path / "step"), LoRA(rank=3, alpha=12))
    policy = load("sd3")
    LoRAMixture(policy).put({stored: 1.0})
    assert torch.equal(pictures(policy), pictures(alone, "ema"))


def test_a_checkpoint_of_a_run_that_went_on_from_a_lora(load, tmp_path):
    start, _ = trained(load, "sd3", tmp_path / "start", 5, 3, ["to_q"], seed=1)
    on = load("sd3")
    on.add_adapters(rank=32, alpha=64, seed=0, start=str(start.path))
    with torch.no_grad():
        for parameter in on._slots["ema"]:
            parameter.mul_(1.5)
    stored = Stored.checkpoint(checkpoint_of(on, tmp_path / "step"), LoRA(start=str(start.path)))
    policy = load("sd3")
    LoRAMixture(policy).put({stored: 1.0})
    assert torch.equal(pictures(policy), pictures(on, "ema"))


def test_what_does_not_fit_is_named(load, tmp_path):
    _, alone = trained(load, "sd3", tmp_path / "lora", 3, 12, None, seed=1)
    file = checkpoint_of(alone, tmp_path / "step")
    with pytest.raises(MarbleError, match="of another model or another LoRA"):
        LoRAMixture(load("sd3")).put({Stored.checkpoint(file, LoRA(rank=4, alpha=8)): 1.0})
    other, _ = trained(load, "sd15", tmp_path / "other", 3, 12, None, seed=1)
    with pytest.raises(MarbleError, match=r"another model's|does not fit|nothing of the LoRA"):
        LoRAMixture(load("sd3")).put({other: 1.0})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MarbleError, match="cannot be read"):
        LoRAMixture(load("sd3")).put({Stored.checkpoint(file, LoRA()): 1.0})


def test_full_fine_tuning_mixes_weights(load, tmp_path):
    stored, finals = [], []
    for seed in (1, 2):
        policy = load("sd3", whole=True)
        policy.train_whole()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy._slots["ema"]:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02
        stored.append(Stored(policy.save(tmp_path / str(seed))))
        finals.append(policy)
    policy = load("sd3", whole=True)
    base = pictures(policy)
    mixture = FullMixture(policy)
    mixture.put({stored[0]: 1.0})
    assert torch.equal(pictures(policy), pictures(finals[0], "ema"))
    mixture.put({stored[0]: 0.25, stored[1]: 1.5})
    first, second = (p.adapter_state("ema") for p in finals)
    for name, weight in policy.denoiser.named_parameters():
        w0 = mixture._base[name]
        expected = w0 + 0.25 * (first[name] - w0) + 1.5 * (second[name] - w0)
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0)
    mixture.put({})
    assert torch.equal(pictures(policy), base)
    checkpoint = Stored.checkpoint(checkpoint_of(finals[1], tmp_path / "step"), LoRA())
    mixture.put({checkpoint: 1.0})
    assert torch.equal(pictures(policy), pictures(finals[1], "ema"))


def test_a_part_of_a_tree_is_read_alone(tmp_path):
    file = tmp_path / "tree.safetensors"
    save_tree(file, {"a": {"b": [torch.ones(2), 3]}, 4: "x"})
    part = load_tree(file, "a", "b")
    assert torch.equal(part[0], torch.ones(2))
    assert part[1] == 3
    assert load_tree(file, 4) == "x"
    with pytest.raises(KeyError):
        load_tree(file, "a", "c")
