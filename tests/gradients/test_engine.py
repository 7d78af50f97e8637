"""The engine on toy networks, one unusual thing each: every row equals one plain backward, or it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marble import AffineLoss

from ..tiny import loss_of
from .agreement import (
    assert_equal,
    assert_equal_or_refused,
    assert_rows,
    engine_rows,
    plain_rows,
    random_advantages,
    random_applies,
)
from .toys import COUNT, WIDTH, Wrapped, data, linear, network, on, two_linears

pytestmark = pytest.mark.filterwarnings("ignore:.*they take the slow way")

# ---- layers that the fast path should take --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (3, 2, WIDTH)], ids=["rank2", "rank3", "rank4"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "applies"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linears(shape, masked, bias):
    module = network(linear(WIDTH, 8, bias=bias), nn.GELU(), linear(8, WIDTH, bias=bias))
    applies = random_applies(COUNT) if masked else None
    assert assert_equal(module, on(module, *shape), random_advantages(COUNT), applies) == 1.0


@pytest.mark.parametrize(("width", "out", "tokens"), [(2, 40, 3), (40, 2, 3), (8, 8, 1), (2, 3, 50)])
def test_thin_and_wide_layers(width, out, tokens):
    module = network(linear(WIDTH, width), linear(width, out), nn.Tanh(), linear(out, 5))
    assert assert_equal(module, on(module, tokens, WIDTH), random_advantages(COUNT)) == 1.0


def test_frozen_layers_and_biases_alone():
    module = network(linear(), nn.Tanh(), linear(), nn.Tanh(), linear())
    for layer, weight, bias in ((0, False, True), (2, False, False), (4, True, False)):
        module[layer].weight.requires_grad_(weight)
        module[layer].bias.requires_grad_(bias)
    assert_equal(module, on(module), random_advantages(COUNT))


def test_layer_called_twice():
    module = Wrapped(lambda m, x: m.last(m.body(F.gelu(m.body(x)))), body=linear(), last=linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_layer_called_twice_on_different_shapes():
    module = Wrapped(
        lambda m, x: m.body(x) + m.body(x.mean(1)).unsqueeze(1) + m.body(x[:, :2]).sum(1, True), body=linear()
    )
    assert_equal(module, on(module), random_advantages(COUNT))


def test_layer_that_sees_part_of_the_tokens():
    def run(m, x):
        x = m.first(x)
        return torch.cat([m.left(x[:, :2]), m.right(x[:, 2:]), x[:, :1] * m.right(x[:, 1])[:, None]], dim=1)

    module = Wrapped(run, first=linear(), left=linear(), right=linear())
    assert_equal(module, on(module, 5, WIDTH), random_advantages(COUNT))


def test_layer_with_transposed_tokens_and_features():
    module = Wrapped(lambda m, x: m.mix(x.transpose(1, 2)).transpose(1, 2) + m.last(x), mix=linear(3, 3), last=linear())
    assert assert_equal(module, on(module), random_advantages(COUNT)) == 1.0


def test_input_given_by_name():
    module = Wrapped(lambda m, x: m.last(input=m.first(input=x)), first=linear(), last=linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_results_changed_in_place():
    def run(m, x):
        hidden = m.first(x)
        hidden += x
        hidden = F.relu_(hidden)
        return m.last(hidden).mul_(2)

    module = Wrapped(run, first=linear(), last=linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_input_changed_in_place_after_the_layer():
    """A frozen layer does not save its input for backward, so torch does not mind; a bias needs none either."""

    def run(m, x):
        x = x.clone()
        y = m.first(x)
        x.mul_(0)
        return m.last(y + x)

    module = Wrapped(run, first=linear(), last=linear())
    module.first.weight.requires_grad_(False)
    assert_equal(module, on(module), random_advantages(COUNT))


def test_layer_that_is_not_used_or_whose_result_is_thrown_away():
    module = Wrapped(lambda m, x: (m.thrown(x), m.used(x))[1], idle=linear(), thrown=linear(), used=linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_other_forwards_inside_the_block():
    """Without gradients, of another batch size, and one with a graph that the loss does not use."""
    module = two_linears()
    forward = on(module)

    def among_others():
        with torch.no_grad():
            module(data(COUNT, 3, WIDTH, seed=8))
        module(data(7, 3, WIDTH, seed=9))
        loss = forward()
        module(data(COUNT, 3, WIDTH, seed=10))
        return loss

    assert_equal(module, among_others, random_advantages(COUNT))


def test_loss_over_two_forwards():
    module = two_linears()
    x, y = data(COUNT, 3, WIDTH, seed=8), data(COUNT, 5, WIDTH, seed=9)
    assert_equal(module, lambda: loss_of(torch.cat([module(x), module(y)], dim=1)), random_advantages(COUNT))


def test_input_that_wants_gradients_keeps_its_own():
    module = two_linears()
    x = data(COUNT, 3, WIDTH).requires_grad_(True)
    assert_equal(module, lambda: loss_of(module(x)), random_advantages(COUNT))
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("depth", [1, 2])
def test_checkpointing_with_dropout(depth):
    inner = network(linear(), nn.Dropout(0.3), nn.GELU(), linear())
    last = linear()

    def run(m, x):
        if depth == 2:
            return m.last(checkpoint(lambda z: checkpoint(m.inner, z, use_reentrant=False), x, use_reentrant=False))
        return m.last(checkpoint(m.inner, x, use_reentrant=False))

    module = Wrapped(run, inner=inner, last=last)
    x = data(COUNT, 3, WIDTH)

    def forward():
        torch.manual_seed(6)
        return loss_of(module(x))

    assert assert_equal(module, forward, random_advantages(COUNT)) == 1.0


def test_reentrant_checkpointing_works_or_is_refused():
    """torch itself has no gradients by parameter through it, so the reference is without checkpointing."""
    module = Wrapped(
        lambda m, x: m.last(
            checkpoint(m.inner, m.first(x), use_reentrant=m.reentrant) if m.reentrant else m.inner(m.first(x))
        ),
        first=linear(),
        inner=two_linears(),
        last=linear(),
    )
    advantages = random_advantages(COUNT)
    module.reentrant = False
    reference = plain_rows(module, on(module), advantages)
    module.reentrant = True
    try:
        rows, _ = engine_rows(module, on(module), advantages)
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    else:
        refusal = "checkpoint"
        assert_rows(module, rows, reference)
    assert "checkpoint" in refusal.lower()


# ---- parameters that need the slow path -----------------------------------------------------------------


def test_norms_and_bare_parameters_beside_linears():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * self.scale

    module = network(linear(WIDTH, 8), nn.LayerNorm(8), Scale(), nn.GELU(), linear(8, WIDTH))
    share = assert_equal(module, on(module), random_advantages(COUNT), random_applies(COUNT))
    linears = sum(p.numel() for layer in (module[0], module[4]) for p in layer.parameters())
    assert linears / sum(p.numel() for p in module.parameters()) <= share <= 1


def test_convolutions_and_embeddings():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, WIDTH)

        def forward(self, x):
            return x + self.table(torch.arange(len(x)) % 5)[:, :, None, None]

    module = network(
        nn.Conv2d(4, WIDTH, 3), Table(), nn.GroupNorm(2, WIDTH), nn.Conv2d(WIDTH, 4, 1), nn.Flatten(1), linear(36, 3)
    )
    share = assert_equal(module, on(module, 4, 5, 5), random_advantages(COUNT))
    assert 0 < share <= 1


def test_no_linear_at_all():
    module = network(nn.Conv1d(3, 3, 1), nn.Tanh(), nn.Conv1d(3, 2, 3))
    assert assert_equal(module, on(module), random_advantages(COUNT), random_applies(COUNT)) in (0.0, 1.0)


def test_weight_used_in_a_linear_and_elsewhere():
    module = Wrapped(
        lambda m, x: F.linear(F.gelu(m.first(x)), m.first.weight.T) + m.last(x), first=linear(WIDTH, 8), last=linear()
    )
    assert_equal(module, on(module), random_advantages(COUNT))


def test_weight_used_elsewhere_only():
    module = Wrapped(lambda m, x: F.linear(x, m.first.weight, m.first.bias) + m.last(x), first=linear(), last=linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_weight_shared_by_two_linears():
    first, second = linear(), linear()
    second.weight = first.weight
    module = Wrapped(lambda m, x: m.second(F.gelu(m.first(x))), first=first, second=second)
    assert_equal(module, on(module), random_advantages(COUNT))


def test_weight_computed_from_another_parameter():
    module = network(nn.utils.parametrizations.weight_norm(linear()), nn.GELU(), linear())
    assert_equal(module, on(module), random_advantages(COUNT))


def test_weight_that_the_loss_uses_outside_the_module():
    module = two_linears()
    forward = on(module)

    def decayed():
        loss = forward()
        return AffineLoss(loss.const + 0.1 * module[0].weight.square().sum(), loss.slope + module[2].weight.mean())

    assert_equal_or_refused(module, decayed, random_advantages(COUNT))


def test_input_shared_by_all_samples():
    """A learned token, or a position: batch dimension 1, then broadcast."""

    def run(m, x):
        return m.last(x + m.token(m.query) + m.position(m.query[0]))

    module = Wrapped(run, token=linear(), position=linear(), last=linear())
    module.query = data(1, 3, WIDTH, seed=8)
    assert_equal(module, on(module), random_advantages(COUNT), random_applies(COUNT))


def test_attention_of_torch_itself():
    """`MultiheadAttention` holds a linear layer that it never calls, and passes its weight on."""

    def run(m, x):
        return m.last(x + m.attention(x, x, x, need_weights=False)[0])

    module = Wrapped(run, attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True), last=linear())
    share = assert_equal(module, on(module), random_advantages(COUNT))
    assert 0 < share < 1


def test_gradient_that_is_zero_but_for_rounding():
    """Softmax ignores what is added to all keys alike: nothing to hold against the fast path."""

    def run(m, x):
        return m.last(F.scaled_dot_product_attention(m.query(x), m.key(x), m.value(x)))

    module = Wrapped(run, query=linear(), key=linear(), value=linear(), last=linear())
    assert assert_equal(module, on(module, 9, WIDTH), random_advantages(COUNT)) == 1.0


def test_one_sample_only():
    module = two_linears()
    x = data(1, 3, WIDTH)
    assert assert_equal(module, lambda: loss_of(module(x)), torch.tensor([[1.0, -2.0, 0.0]])) == 1.0


# ---- layouts: equal or refused, never silently wrong ----------------------------------------------------

LAYOUTS = {
    "tokens first": lambda m, x: m.body(x.transpose(0, 1)).transpose(0, 1),
    "tokens folded into the batch": lambda m, x: m.body(x.flatten(0, 1)).view_as(x),
    "batch folded into the tokens": lambda m, x: (
        m.body(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), -1).transpose(0, 1)
    ),
    "samples in another order": lambda m, x: m.body(x.flip(0)).flip(0),
    "last samples swapped": lambda m, x: torch.cat([x[:2], m.body(x.flip(0))[:2]]),
    "all but the first swapped": lambda m, x: m.body(x[[0, 2, 3, 1]])[[0, 3, 1, 2]],
    "samples rolled in pairs": lambda m, x: m.body(torch.cat([x, x.roll(1, 0)], dim=1))[:, : x.shape[1]],
    "twice the batch": lambda m, x: m.body(torch.cat([x, -x])).unflatten(0, (2, len(x))).sum(0),
    "twice the batch, one half unused": lambda m, x: m.body(torch.cat([x, -x]))[: len(x)],
    "half of the batch": lambda m, x: torch.cat([m.body(x[: len(x) // 2]), x[len(x) // 2 :]]),
}


@pytest.mark.parametrize("tokens", [3, COUNT])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tokens):
    """With as many tokens as samples, shapes cannot tell the two apart."""
    module = Wrapped(
        lambda m, x: m.last(F.gelu(LAYOUTS[layout](m, m.first(x)))), first=linear(), body=linear(), last=linear()
    )
    assert_equal_or_refused(module, on(module, tokens, WIDTH), random_advantages(COUNT))
