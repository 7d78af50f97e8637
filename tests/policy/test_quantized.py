"""What of bitsandbytes runs without a GPU: layers of four bits under a LoRA, and Adam with a state of eight bits."""

import json

import pytest
import torch
from torch import nn

from marble import PerRewardGradients, Policy, Reward, Run, reference_gradients, train
from marble.config import make_config
from marble.policy import loading

from .. import tiny
from ..pipelines import build, call_of

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Bright(Reward):
    name = "bright"

    def score(self, images, records):
        return (images.float() / 255).mean((1, 2, 3))


def quantize(module, names):
    """Layers of the given names in four bits, as `model.quantize: 4bit` loads them on a GPU."""
    for name, layer in list(module.named_children()):
        if isinstance(layer, nn.Linear) and name in names:
            four = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            four.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
            setattr(module, name, four.to("cpu"))
        else:
            quantize(layer, names)


@pytest.mark.parametrize("name", ["sd3", "flux", "unet"])
def test_gradients_of_every_reward_over_four_bits_are_exact_and_fast(name):
    model = tiny.build(name)
    quantize(model, ("to_q", "to_k", "to_v"))
    tiny.add_lora(model, ["to_q", "to_k", "to_v"])
    assert sum(isinstance(layer, bnb.nn.Linear4bit) for layer in model.modules()) >= 6
    inputs, advantages = tiny.inputs_of(name, 4), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with PerRewardGradients(model) as engine:
        found = engine.compute(tiny.loss_of(tiny.predict(model, inputs)), advantages)
    true = reference_gradients(tiny.loss_of(tiny.predict(model, inputs)), advantages, engine.parameters)
    assert (found - true).norm() < 1e-5 * true.norm()
    assert engine.fast_share == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("sd3", tmp_path_factory.mktemp("sd3"))


def config_of(folder, tmp_path, updates):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\na boat\na tree\n")
    return make_config(
        {
            "model": {"id": str(folder), "call": call_of("sd3"), "device": "cpu"},
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"{__name__}:Bright"}],
            "rollout": {"prompts": 2, "group_size": 3, "steps": 3},
            "objective": {"timesteps": 2, "kl": 0.0},
            "optimizer": {"name": "adamw-8bit", "lr": 1e-3},
            "budget": {"updates": updates},
            "evaluation": {"prompts": 1 + 1, "images": 2, "steps": 2},
            "checkpoint_every": 2,
            "diagnose_every": 0,
        }
    )


def test_adam_of_eight_bits_trains_and_resumes_bit_for_bit(folder, tmp_path, monkeypatch):
    prompts = "a cat\na dog\na house\na boat\na tree\na man\na hill\na stone\n"
    whole = config_of(folder, tmp_path, 4)
    (tmp_path / "prompts.txt").write_text(prompts)
    straight = train(whole, tmp_path / "straight")
    first = whole.model_copy(deep=True)
    first.budget.updates = 2
    train(first, tmp_path / "parts")
    parts = train(whole, tmp_path / "parts", resume=True)
    rows = [
        [{k: r[k] for k in ("update", "loss", "gradient_norm")} for r in x.metrics()[1:]] for x in (straight, parts)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    state = Run(tmp_path / "parts").load_checkpoint()["updater"]["optimizer"]
    moments = [v for entry in state["state"].values() for v in _tensors(entry)]
    assert any(v.dtype == torch.uint8 for v in moments) or all(v.numel() < 4096 for v in moments)
    assert json.loads((tmp_path / "parts" / "evaluation.json").read_text())["gains"]


def _tensors(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_quantised_weights_want_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(loading.MarbleError, match=r"model\.quantize: 4bit needs a GPU"):
        Policy.from_pretrained(str(folder), quantize="4bit", device="cpu")


def test_without_bitsandbytes_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(loading.MarbleError, match=r'pip install "marble-diffusion\[quantize\]"'):
        Policy.from_pretrained(str(folder), quantize="8bit", device="cpu")
