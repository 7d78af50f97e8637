"""What the engine refuses, and what it leaves behind: nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from marble import AffineLoss, PerRewardGradients

from ..tiny import LINEARS, add_lora, build, inputs_of, loss_of, predict
from .agreement import assert_equal_or_refused, assert_rows, plain_rows, random_advantages

pytestmark = pytest.mark.filterwarnings("ignore:.*they take the slow way")

COUNT, WIDTH = 4, 6


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))


@pytest.fixture
def x():
    return torch.randn(COUNT, 3, WIDTH, generator=torch.Generator().manual_seed(7))


def rows_of(module, x, advantages=None):
    with PerRewardGradients(module) as engine:
        return engine.compute(loss_of(module(x)), random_advantages(len(x)) if advantages is None else advantages)


# ---- modules ----------------------------------------------------------------------------------------------


class WithoutMean(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0, keepdim=True)


class FromFirst(nn.Module):
    """Every sample looks at the first one, as a shared style reference would."""

    def forward(self, x):
        return x + 0.1 * x[:1].tanh()


class Cyclic(nn.Module):
    """The first sample is left alone."""

    def forward(self, x):
        return torch.cat([x[:1], x[1:] + x[1:].roll(1, 0).tanh()])


class AcrossSamples(nn.Module):
    """Attention over the batch."""

    def forward(self, x):
        y = x.transpose(0, 1)
        return F.scaled_dot_product_attention(y, y, y).transpose(0, 1)


@pytest.mark.parametrize("mixing", [WithoutMean, FromFirst, Cyclic, AcrossSamples])
@pytest.mark.parametrize("place", [1, 2, 3], ids=["before the layers", "between the layers", "after the layers"])
def test_samples_that_mix(mixing, place, x):
    """Whatever mixes after a layer makes that layer's gradient one that no sample owns."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    layers.insert(place, mixing())
    module = nn.Sequential(*layers)
    if place == 1 or mixing in (FromFirst, Cyclic):  # the fast path may be right, or the slow one may have been taken
        assert_equal_or_refused(module, lambda: loss_of(module(x)), random_advantages(COUNT))
    else:
        with pytest.raises(ValueError, match=r"(?i)sample|batch|mix"):
            rows_of(module, x)


def test_batch_norm_in_train_mode(x):
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).train()
    before = module[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"(?i)batch ?norm"):
        rows_of(module, x[:, 0])
    rows_of(module.eval(), x[:, 0])
    assert before.shape == module[1].running_mean.shape


@pytest.mark.parametrize("how", ["whole", "layer", "in place"])
def test_compiled_modules(how, module, x):
    if how == "whole":
        module = torch.compile(module, backend="eager")
    elif how == "layer":
        module[0] = torch.compile(module[0], backend="eager")
    else:
        module.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compile"):
        rows_of(module, x)


def test_nothing_to_train(module):
    with pytest.raises(ValueError, match=r"trainable|requires_grad|frozen"):
        PerRewardGradients(module.requires_grad_(False))


# ---- losses and advantages ----------------------------------------------------------------------------------


def test_loss_that_does_not_come_from_the_module(module, x):
    advantages = random_advantages(COUNT)
    other = nn.Linear(WIDTH, WIDTH)
    with PerRewardGradients(module) as engine:
        output = module(x)
        with pytest.raises(ValueError, match=r"graph|detach|depend|grad"):
            engine.compute(loss_of(output.detach()), advantages)
        with pytest.raises(ValueError, match=r"graph|detach|depend|grad|block"):
            engine.compute(loss_of(other(x)), advantages)
        with torch.no_grad():
            output = module(x)
        with pytest.raises(ValueError, match=r"graph|detach|depend|grad"):
            engine.compute(loss_of(output), advantages)


def test_forward_outside_the_block_is_refused_or_right(module, x):
    advantages = random_advantages(COUNT)
    loss = loss_of(module(x))
    with PerRewardGradients(module) as engine:
        try:
            rows = engine.compute(loss, advantages)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = "block"
            assert_rows(module, rows, plain_rows(module, lambda: loss_of(module(x)), advantages))
    assert "with" in refusal or "block" in refusal


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compute_after_the_block_is_refused_or_right(checkpointing):
    model = add_lora(build("wan"), LINEARS["wan"]).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs, advantages = inputs_of("wan", COUNT), random_advantages(COUNT)
    with PerRewardGradients(model) as engine:
        loss = loss_of(predict(model, inputs))
    try:
        rows = engine.compute(loss, advantages)
    except (ValueError, RuntimeError) as error:  # torch's own, when it recomputes other layers than it saw
        refusal = str(error)
    else:
        refusal = "block"
        assert_rows(model, rows, plain_rows(model, lambda: loss_of(predict(model, inputs)), advantages))
    assert "checkpoint" in refusal or "block" in refusal


@pytest.mark.parametrize(
    "advantages",
    [
        torch.ones(COUNT),
        torch.ones(COUNT + 1, 2),
        torch.ones(2, COUNT),
        torch.ones(COUNT, 2, 1),
        torch.full((COUNT, 2), torch.nan),
        torch.full((COUNT, 2), torch.inf),
    ],
    ids=["rank 1", "too many", "transposed", "rank 3", "nan", "inf"],
)
def test_advantages(module, x, advantages):
    with pytest.raises(ValueError, match=r"advantages"):
        rows_of(module, x, advantages)


def test_applies_of_another_shape(module, x):
    with PerRewardGradients(module) as engine, pytest.raises(ValueError, match=r"applies"):
        engine.compute(loss_of(module(x)), torch.ones(COUNT, 2), torch.ones(COUNT, 3, dtype=torch.bool))


@pytest.mark.parametrize("per", ["token", "two samples", "two tokens in turn"])
def test_loss_of_another_length(per, module, x):
    """Not one number a sample, as the layers see them."""

    def forward():
        each = module(torch.cat([x, x[:, :1]], dim=1)).square().mean(dim=2)
        if per == "two samples":
            each = each.view(2, 2, 4).sum(dim=(1, 2))
        elif per == "two tokens in turn":
            each = each.flatten().view(-1, 2).sum(dim=0)
        each = each.flatten()
        return AffineLoss(each, each.sin())

    assert_equal_or_refused(module, forward, random_advantages(len(forward().const)))


def test_can_go_on_after_a_refusal(module, x):
    advantages = random_advantages(COUNT)
    with PerRewardGradients(module) as engine:
        loss = loss_of(module(x))
        with pytest.raises(ValueError, match=r"advantages"):
            engine.compute(loss, advantages[1:])
        rows = engine.compute(loss, advantages)
    assert_rows(module, rows, plain_rows(module, lambda: loss_of(module(x)), advantages))


# ---- nothing is left behind ---------------------------------------------------------------------------------


def state_of(module):
    """All that hooks and patches would change: attributes, hooks of modules and parameters, gradients."""
    state = {}
    for name, part in module.named_modules():
        state[name] = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(part).items()}
        state[name]["class"] = (type(part), type(part).forward, type(part).__call__)
    for name, parameter in module.named_parameters():
        hooks = (parameter._backward_hooks or {}, getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
        state["parameter " + name] = (id(parameter), parameter.requires_grad, parameter.grad, *map(dict, hooks))
    state["torch"] = (
        F.linear,
        torch.nn.functional.linear,
        torch._C._nn.linear,
        nn.Linear.forward,
        torch.Tensor.backward,
    )
    return state


@pytest.mark.parametrize("interrupted", [None, "before the forward", "in the forward", "before compute", "in compute"])
def test_nothing_stays(interrupted):
    model = add_lora(build("sd3"), LINEARS["sd3"]).train()
    model.enable_gradient_checkpointing()
    inputs = inputs_of("sd3", COUNT)
    own = model.register_forward_hook(lambda *_: None)  # the user's hook stays
    before, output = state_of(model), predict(model, inputs)

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    def walk():
        with PerRewardGradients(model) as engine:
            if interrupted == "before the forward":
                raise Stopped
            if interrupted == "in the forward":
                handle = model.transformer_blocks[1].register_forward_pre_hook(stop)
                try:
                    predict(model, inputs)
                finally:
                    handle.remove()
            inside = predict(model, inputs)
            torch.testing.assert_close(inside, output, atol=1e-6, rtol=1e-6)
            if interrupted == "before compute":
                raise Stopped
            if interrupted == "in compute":
                inside.register_hook(stop)
            engine.compute(loss_of(inside), random_advantages(COUNT))

    if interrupted is None:
        walk()
    else:
        with pytest.raises(Stopped):
            walk()
    assert state_of(model) == before
    assert all("forward" not in vars(part) for part in model.modules())
    assert own.id in model._forward_hooks
    torch.testing.assert_close(predict(model, inputs), output, atol=0, rtol=0)
    loss_of(predict(model, inputs)).const.sum().backward()


def test_a_forward_that_somebody_else_patched_stays(module, x):
    """As accelerate does for mixed precision and offloading."""
    plain = module[0].forward
    module[0].forward = lambda z: 2 * plain(z)
    patched = module[0].forward
    rows = rows_of(module, x)
    assert module[0].forward is patched
    assert_rows(module, rows, plain_rows(module, lambda: loss_of(module(x)), random_advantages(COUNT)))


def test_blocks_do_not_nest_or_are_right(module, x):
    advantages = random_advantages(COUNT)
    reference = plain_rows(module, lambda: loss_of(module(x)), advantages)
    with PerRewardGradients(module) as outer:
        try:
            with PerRewardGradients(module) as inner:
                rows = inner.compute(loss_of(module(x)), advantages)
        except ValueError:
            pass
        else:
            assert_rows(module, rows, reference)
        assert_rows(module, outer.compute(loss_of(module(x)), advantages), reference)
    assert all("forward" not in vars(part) for part in module.modules())


def test_memory_is_let_go(module, x):
    """After a compute the engine keeps no activation alive."""
    import gc
    import weakref

    with PerRewardGradients(module) as engine:
        output = module(x)
        kept = weakref.ref(output)
        engine.compute(loss_of(output), random_advantages(COUNT))
        del output
    gc.collect()
    assert kept() is None
