import pytest
import torch
from torch import nn

from marble import MarbleError, Policy
from marble.config import Objective
from marble.objectives.visit import plan_epoch, visit_loss, where_broken
from marble.prompts import PromptBatch, Record
from marble.rollout import collect
from marble.watch import first_broken


class Spoils(nn.Module):
    def forward(self, x):
        return x / torch.zeros_like(x)


def test_the_innermost_first_layer_is_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), Spoils()), Spoils())
    assert first_broken(network, lambda: network(torch.ones(1, 2))) == "1.1"
    assert not any(module._forward_hooks for module in network.modules())


def test_a_layer_that_was_given_what_is_not_finite_is_not_blamed():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert first_broken(network, lambda: network(torch.full((1, 2), torch.nan))) is None
    assert first_broken(network, lambda: network(torch.ones(1, 2))) is None


@pytest.fixture
def policy(untrained):
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12}, device="cpu")
    policy.add_adapters(rank=2, alpha=2, targets=["attn.to_q"], seed=0)
    return policy


def spoil(policy, version):
    layer = policy.denoiser.transformer_blocks[1].attn.to_q
    with torch.no_grad():
        layer.lora_B[version].weight.fill_(torch.nan)


BATCH = PromptBatch([Record("a red circle", "x")], 3, [1, 2, 3])


def test_a_rollout_that_is_not_finite_names_the_layer(policy):
    spoil(policy, "old")
    with pytest.raises(MarbleError, match=r"latents are not finite: layer transformer_blocks\.1\.attn\.to_q\S* of"):
        collect(policy, BATCH, steps=3, images_per_call=8)


def test_a_loss_that_is_not_finite_names_layer_and_weights(policy):
    rollout = collect(policy, BATCH, steps=3, images_per_call=8)
    spoil(policy, "default")
    visits = plan_epoch(3, 3, timesteps=1, updates=1, micro_batch=3, seed=0, epoch=0)[0][0]
    loss, _ = visit_loss(policy, rollout, visits, Objective(kl=0.0, timesteps=1))
    assert not loss.const.isfinite().any()
    where = where_broken(policy, rollout, visits, Objective(kl=0.0, timesteps=1))
    assert where.startswith("first in what layer transformer_blocks.1.attn.to_q")
    assert where.endswith("with the default weights")
