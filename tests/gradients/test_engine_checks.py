"""What the engine finds out about a module on the way, and what it makes of a bad batch."""

import pytest
import torch
from torch import nn

from marble import AffineLoss, Balancer, PerRewardGradients, reference_gradients

from .. import tiny

COUNT, TOKENS = 8, 4
ADVANTAGES = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Routed(nn.Module):
    """A layer that sees some tokens only, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.expert, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, mask):
        h = self.first(x)
        y = h.clone()
        y[mask] = self.expert(h[mask])
        return self.last(torch.tanh(y))


def mask_of(tokens, seed):
    mask = torch.zeros(COUNT * TOKENS, dtype=torch.bool)
    mask[torch.randperm(COUNT * TOKENS, generator=torch.Generator().manual_seed(seed))[:tokens]] = True
    return mask.view(COUNT, TOKENS)


def error(rows, reference):
    return ((rows - reference).norm(dim=1) / reference.norm(dim=1)).max()


@pytest.mark.filterwarnings("ignore:.*they take the slow way")
@pytest.mark.parametrize("tokens", [(15, 16, 16), (32, 16), (16, 16, 32)], ids=str)
def test_a_layer_whose_tokens_come_and_go_is_checked_again(tokens):
    """16 tokens of 8 samples are two a sample by number, and not by place."""
    module = Routed()
    engine = PerRewardGradients(module)
    for seed, number in enumerate(tokens):
        with engine:
            out = module(torch.randn(COUNT, TOKENS, 6), mask_of(number, seed)).flatten(1)
            loss = AffineLoss(out.square().mean(dim=1), out.sin().mean(dim=1))
            rows = engine.compute(loss, ADVANTAGES)
            assert error(rows, reference_gradients(loss, ADVANTAGES, engine.parameters)) < 1e-5
    assert engine.fast_share < 1


def test_the_slow_way_is_named_in_a_warning():
    module = Routed()
    with PerRewardGradients(module) as engine:
        out = module(torch.randn(COUNT, TOKENS, 6), mask_of(16, 0)).flatten(1)
        loss = AffineLoss(out.square().mean(dim=1), out.sin().mean(dim=1))
        with pytest.warns(UserWarning, match=r"slow way.*expert\.weight"):
            engine.compute(loss, ADVANTAGES)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_base_in_bfloat16_with_factors_in_single_precision_stays_fast(name):
    """What PEFT makes of a half-precision model, without autocast."""
    module = tiny.add_lora(tiny.build(name), TARGETS).bfloat16()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.inputs_of(name, COUNT).items()}
    with PerRewardGradients(module) as engine:
        loss = tiny.loss_of(tiny.predict(module, inputs).float())
        rows = engine.compute(loss, ADVANTAGES)
        assert error(rows, reference_gradients(loss, ADVANTAGES, engine.parameters)) < 0.03
    assert engine.fast_share == 1


@pytest.mark.parametrize("where", ["latents", "loss"])
def test_a_bad_first_batch_does_not_accuse_the_module(where):
    module = tiny.add_lora(tiny.build("sd3"), TARGETS)
    inputs, engine = tiny.inputs_of("sd3", COUNT), PerRewardGradients(module)
    for bad in (True, False):
        given = {k: v.clone() for k, v in inputs.items()}
        if bad and where == "latents":
            given["hidden_states"][3] = torch.nan
        with engine:
            loss = tiny.loss_of(tiny.predict(module, given))
            if bad and where == "loss":
                scale = torch.ones(COUNT)
                scale[2] = torch.inf
                loss = AffineLoss(loss.const * scale, loss.slope)
            rows = engine.compute(loss, ADVANTAGES)
        assert rows.isfinite().all() != bad
        assert engine.fast_share == 1
    with engine:
        loss = tiny.loss_of(tiny.predict(module, inputs))
        rows = engine.compute(loss, ADVANTAGES)
        assert error(rows, reference_gradients(loss, ADVANTAGES, engine.parameters)) < 1e-5


def test_scale_serves_the_check_too():
    """In float16, losses so small that their unscaled gradients vanish."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).half()
    x = torch.randn(COUNT, 6).half()
    with PerRewardGradients(module, scale=65536.0) as engine:
        out = module(x).float() * 1e-4
        engine.compute(AffineLoss(out.square().mean(dim=1), out.sin().mean(dim=1)), ADVANTAGES)
    assert engine.fast_share == 1


def test_a_forward_that_another_tool_replaced_is_left_alone():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine = PerRewardGradients(module)
    plain = module[1].forward
    module[1].forward = lambda x: 2 * plain(x)
    with pytest.raises(ValueError, match=r"forward of 1 was replaced"), engine:
        pass
    x = torch.randn(3, 4)
    torch.testing.assert_close(module[1](x), 2 * plain(x))
    del module[1].forward
    with engine, pytest.raises(ValueError, match="another engine's open block"):
        PerRewardGradients.__enter__(engine)


@pytest.mark.parametrize("shape", [(3, 1), (0,), ()])
def test_a_loss_is_one_number_a_sample(shape):
    with pytest.raises(ValueError, match=r"const and slope must both be \[N\]"):
        AffineLoss(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"const and slope must both be \[N\]"):
        AffineLoss(torch.zeros(4), torch.zeros(3))


def test_the_loop_of_the_guide_survives_a_reward_whose_gradient_overflows():
    gradients = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    balancer = Balancer(3, refresh=1, fold=True)
    balancer.step(gradients @ gradients.T)
    gradients[1, 4] = torch.inf
    balancer.step(gradients @ gradients.T)
    assert balancer.missing.tolist() == [False, True, False]
    direction = balancer.direction(gradients)
    torch.testing.assert_close(direction, balancer.coefficients[[0, 2]].float() @ gradients[[0, 2]])
