"""The engine under losses of all shapes, low and high precision, and accumulation."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from marble import AffineLoss, PerRewardGradients

from ..tiny import loss_of
from .agreement import (
    assert_equal,
    assert_equal_or_refused,
    assert_rows,
    distance,
    engine_rows,
    plain_rows,
    random_advantages,
    random_applies,
    trainable,
)
from .toys import COUNT, WIDTH, data, linear, network, on, two_linears

pytestmark = pytest.mark.filterwarnings("ignore:.*they take the slow way")


@dataclass(frozen=True)
class Clipped(AffineLoss):
    """PPO's shape: no advantage-free part, and a mask by the advantage's sign."""

    ratio: Tensor

    def effective(self, advantages):
        ratio = self.ratio[:, None]
        return torch.where(((advantages > 0) & (ratio > 1.1)) | ((advantages < 0) & (ratio < 0.9)), 0.0, advantages)


def test_loss_without_an_advantage_free_part():
    module = two_linears()
    x = data(COUNT, 3, WIDTH)

    def forward():
        ratio = (0.3 * module(x).mean(dim=(1, 2))).exp()
        return Clipped(torch.zeros(COUNT), -ratio, ratio.detach())

    for applies in (None, random_applies(COUNT)):
        assert assert_equal(module, forward, random_advantages(COUNT), applies) == 1.0


def test_loss_whose_slope_has_no_graph():
    module = two_linears()
    x = data(COUNT, 3, WIDTH)
    assert_equal(
        module, lambda: AffineLoss(module(x).square().mean(dim=(1, 2)), torch.ones(COUNT)), random_advantages(COUNT)
    )


def test_const_and_slope_with_graphs_of_their_own():
    module = two_linears()
    x, y = data(COUNT, 3, WIDTH, seed=8), data(COUNT, 3, WIDTH, seed=9)

    def forward():
        return AffineLoss(module(x).square().mean(dim=(1, 2)), module(y).mean(dim=(1, 2)))

    assert_equal(module, forward, random_advantages(COUNT))


def test_zero_advantages_leave_the_advantage_free_part():
    module = two_linears()
    advantages = torch.zeros(COUNT, 2)
    assert_equal(module, on(module), advantages)


@pytest.mark.parametrize("only", ["const", "slope"])
def test_weight_that_one_part_of_the_loss_uses_outside_the_module(only):
    module = two_linears()
    forward = on(module)

    def decayed():
        loss = forward()
        extra = {"const": loss.const, "slope": loss.slope}
        extra[only] = extra[only] + 0.1 * module[0].weight.square().sum()
        return AffineLoss(**extra)

    assert_equal_or_refused(module, decayed, random_advantages(COUNT))


def test_samples_that_mix_in_one_part_of_the_loss():
    module = two_linears()
    forward = on(module)

    def coupled():
        loss = forward()
        return AffineLoss(loss.const * loss.const.flip(0), loss.slope)

    for applies in (None, random_applies(COUNT)):
        assert_equal_or_refused(module, coupled, random_advantages(COUNT), applies)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_the_loss(scale):
    module = two_linears()
    forward = on(module)

    def scaled():
        loss = forward()
        return AffineLoss(scale * loss.const, scale * loss.slope)

    assert_equal(module, scaled, random_advantages(COUNT))


def test_rewards_of_very_different_scales():
    module = two_linears()
    x = data(COUNT, 3, WIDTH)
    advantages = random_advantages(COUNT) * torch.tensor([1e-4, 1.0, 1e4, 1e-2, 1e2])

    def forward():
        return AffineLoss(torch.zeros(COUNT), module(x).square().mean(dim=(1, 2)))

    assert_equal(module, forward, advantages)


def test_double_network():
    module = two_linears().double()
    x = data(COUNT, 3, WIDTH).double()
    advantages = random_advantages(COUNT).double()
    reference = plain_rows(module, lambda: loss_of(module(x)), advantages)
    rows, _ = engine_rows(module, lambda: loss_of(module(x)), advantages)
    assert rows.dtype == torch.float32
    assert distance(rows, reference).max() < 1e-6
    rows, _ = engine_rows(module, lambda: loss_of(module(x)), advantages, dtype=torch.float64)
    assert rows.dtype == torch.float64
    assert distance(rows, reference).max() < 1e-12


def test_bfloat16_network():
    """Rows are float32 and no further from full precision than the plain reference's, give or take rounding."""
    module = two_linears().bfloat16()
    x = data(COUNT, 30, WIDTH).bfloat16()
    advantages = random_advantages(COUNT)
    plain = plain_rows(module, lambda: loss_of(module(x)), advantages)
    rows, _ = engine_rows(module, lambda: loss_of(module(x)), advantages)
    exact = plain_rows(module.float(), lambda: loss_of(module(x.float())), advantages)
    assert rows.dtype == torch.float32
    assert (distance(rows, exact) <= 1.5 * distance(plain, exact)).all()


@pytest.mark.parametrize("inside", [False, True], ids=["compute outside autocast", "compute inside"])
def test_autocast(inside):
    module = network(linear(), nn.LayerNorm(WIDTH), nn.GELU(), linear())
    forward, advantages = on(module, 20, WIDTH), random_advantages(COUNT)
    exact = plain_rows(module, forward, advantages)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_rows(module, forward, advantages)
    with PerRewardGradients(module) as engine:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward()
            rows = engine.compute(loss, advantages) if inside else None
        rows = rows if inside else engine.compute(loss, advantages)
    assert_rows(module, rows, plain, tolerance=2e-2)
    assert (distance(rows, exact) <= 1.5 * distance(plain, exact)).all()


@pytest.mark.parametrize("blocks", ["one block", "a block each"])
@pytest.mark.parametrize("norm", [False, True], ids=["linears", "with norm"])
def test_micro_batches_add_up(blocks, norm):
    module = network(linear(), nn.LayerNorm(WIDTH) if norm else nn.Tanh(), linear())
    count = 7
    x, advantages = data(count, 3, WIDTH), random_advantages(count)
    goal = data(count, 3, WIDTH, seed=11)

    def forward(part):
        error = (module(x[part]) - goal[part]).square().mean(dim=(1, 2))
        return AffineLoss(error, error.sin())

    def share(engine, part):
        return engine.compute(forward(part), advantages[part]) * (len(x[part]) / count)

    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    if blocks == "one block":
        with PerRewardGradients(module) as engine:
            rows = sum(share(engine, part) for part in parts)
    else:
        rows = 0
        for part in parts:
            with PerRewardGradients(module) as engine:
                rows = rows + share(engine, part)
    assert_rows(module, rows, plain_rows(module, lambda: forward(slice(None)), advantages))


@pytest.mark.parametrize("norm", [False, True], ids=["linears", "with norm"])
def test_accumulate_adds_up_parts_over_micro_batches(norm):
    module = network(linear(), nn.LayerNorm(WIDTH) if norm else nn.Tanh(), linear())
    x, advantages, count = data(7, 3, WIDTH), random_advantages(7), 7

    def losses(part):
        each = module(x[part]).square().mean(dim=(1, 2))
        return AffineLoss(each, each.sin())

    with PerRewardGradients(module) as engine:
        gathered = engine.rows(5, 1)
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            engine.accumulate(
                gathered, losses(part), advantages[part] / count, torch.full((len(x[part]), 1), 1 / count)
            )
        with pytest.raises(ValueError, match="rows"):
            engine.accumulate(engine.rows(4, 1), losses(slice(None)), advantages, torch.ones(7, 1))
        with pytest.raises(ValueError, match="for_const"):
            engine.accumulate(gathered, losses(slice(None)), advantages, torch.ones(6, 1))
    rows = gathered.matrix()
    whole = torch.cat([advantages, torch.zeros(7, 1)], dim=1)
    reference = plain_rows(module, lambda: losses(slice(None)), whole)
    torch.testing.assert_close(gathered.gram(), rows.double() @ rows.double().T)
    mixture = torch.tensor([0.5, -1.0, 0.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(gathered.mix(mixture)), mixture.float() @ rows)
    gathered.block(0, 0)[2] = torch.nan  # a row that the mixture leaves out
    torch.testing.assert_close(torch.cat(gathered.mix(mixture)), mixture.float() @ rows)
    rows[:5] += rows[5:]
    assert_rows(module, rows, reference)


def test_scaled_losses_and_chosen_parameters():
    module = two_linears()
    forward, advantages = on(module), random_advantages(COUNT)
    reference = plain_rows(module, forward, advantages)
    assert_rows(module, engine_rows(module, forward, advantages, scale=1024.0)[0], reference)
    with PerRewardGradients(module, parameters=list(module[2].parameters())) as engine:
        rows = engine.compute(forward(), advantages)
    assert rows.shape[1] == sum(p.numel() for p in module[2].parameters())
    assert distance(rows, reference[:, -rows.shape[1] :]).max() < 1e-5
    with pytest.raises(ValueError, match="scale"):
        PerRewardGradients(module, scale=0.0)
    with pytest.raises(ValueError, match="parameters"):
        PerRewardGradients(module, parameters=[nn.Parameter(torch.ones(2))])


def test_graph_is_freed_when_asked():
    for norm in (nn.Tanh(), nn.LayerNorm(WIDTH)):
        module = network(linear(), norm, linear())
        advantages = random_advantages(COUNT)
        reference = plain_rows(module, on(module), advantages)
        with PerRewardGradients(module) as engine:
            loss = on(module)()
            assert_rows(module, engine.compute(loss, advantages, retain_graph=False), reference)
            with pytest.raises(RuntimeError, match="second time"):
                loss.const.sum().backward()
            loss = on(module)()
            assert_rows(module, engine.compute(loss, advantages), reference)
            loss.const.sum().backward()


def test_used_again_after_a_step_and_with_other_trainable_parameters():
    module = two_linears()
    forward, advantages = on(module), random_advantages(COUNT)
    engine = PerRewardGradients(module)
    for _ in range(2):
        with engine:
            rows = engine.compute(forward(), advantages)
        assert_rows(module, rows, plain_rows(module, forward, advantages))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.9)
    module[0].requires_grad_(False)
    assert_equal(module, forward, advantages)
    assert len(trainable(module)) == 2


def test_batch_norm_in_eval_mode():
    module = network(linear(), nn.BatchNorm1d(WIDTH), nn.GELU(), linear()).eval()
    assert_equal(module, on(module, WIDTH), random_advantages(COUNT))
