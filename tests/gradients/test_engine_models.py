"""The engine on tiny denoisers of five families: every row equals one plain backward."""

import pytest
import torch

from marble import PerRewardGradients

from ..tiny import LINEARS, MODELS, add_lora, build, inputs_of, loss_of, predict
from .agreement import (
    assert_equal,
    assert_rows,
    distance,
    engine_rows,
    plain_rows,
    random_advantages,
    random_applies,
)

CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
COUNT = 4


def prepare(name, *, targets=None, checkpointing=False, count=COUNT, **options):
    """A tiny model in train mode with a LoRA on it, and its forward up to the loss."""
    model = add_lora(build(name), targets or LINEARS[name], **options)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    inputs = inputs_of(name, count)
    return model, lambda: loss_of(predict(model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_builders_are_small_and_keep_samples_apart(name):
    """What the tests below rest on: a sample's output does not depend on the others in its batch."""
    model, _ = prepare(name)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    inputs = inputs_of(name, COUNT)
    alone = {key: value[:1] if not key.endswith("_ids") else value for key, value in inputs.items()}
    with torch.no_grad():
        together = predict(model, inputs)
        torch.testing.assert_close(predict(model, alone), together[:1], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@CHECKPOINTING
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_linears(name, checkpointing):
    model, forward = prepare(name, checkpointing=checkpointing)
    assert assert_equal(model, forward, random_advantages(COUNT)) == 1.0


@CHECKPOINTING
@pytest.mark.parametrize("name", MODELS)
def test_mean_over_the_applicable_images(name, checkpointing):
    model, forward = prepare(name, checkpointing=checkpointing)
    assert assert_equal(model, forward, random_advantages(COUNT), random_applies(COUNT)) == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_share_is_known_before_the_forward(name):
    model, _ = prepare(name)
    assert PerRewardGradients(model).fast_share == 1.0


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_rank_stabilised_lora(name):
    model, forward = prepare(name, use_rslora=True)
    assert assert_equal(model, forward, random_advantages(COUNT)) == 1.0


@CHECKPOINTING
@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_weight_decomposed_lora(name, checkpointing):
    model, forward = prepare(name, use_dora=True, checkpointing=checkpointing)
    assert 0 <= assert_equal(model, forward, random_advantages(COUNT)) <= 1


def test_lora_with_dropout():
    model, forward = prepare("sd3", lora_dropout=0.3, checkpointing=True)

    def seeded():
        torch.manual_seed(6)
        return forward()

    assert assert_equal(model, seeded, random_advantages(COUNT)) == 1.0


@CHECKPOINTING
def test_lora_on_convolutions(checkpointing):
    targets = [*LINEARS["unet"], "conv1", "conv2", "proj_in", "conv_in"]
    model, forward = prepare("unet", targets=targets, checkpointing=checkpointing)
    assert 0 < assert_equal(model, forward, random_advantages(COUNT)) <= 1


def test_two_adapters_of_which_one_is_trained():
    """As the policy keeps them: the old policy's forward runs inside the block too."""
    from peft import LoraConfig

    model, forward = prepare("sd3")
    inputs = inputs_of("sd3", COUNT)
    settings = LoraConfig(r=2, target_modules=LINEARS["sd3"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="peft_config"):
        model.add_adapter(settings, adapter_name="old")
    model.set_adapter("default")

    def both():
        model.set_adapter("old")
        with torch.no_grad():
            predict(model, inputs)
        model.set_adapter("default")
        return forward()

    assert assert_equal(model, both, random_advantages(COUNT)) == 1.0


def test_whole_weights_of_a_model():
    """No adapter: convolutions, norms, embeddings and bare parameters are trained beside the linears."""
    model = build("sana").requires_grad_(True).train()
    inputs = inputs_of("sana", COUNT)
    share = assert_equal(model, lambda: loss_of(predict(model, inputs)), random_advantages(COUNT))
    assert 0 < share <= 1


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@CHECKPOINTING
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast(name, checkpointing):
    """Close to the reference under the same autocast, and no further from full precision than that is."""
    model, forward = prepare(name, checkpointing=checkpointing)

    def rounded():
        with torch.autocast("cpu", torch.bfloat16):
            return forward()

    advantages = random_advantages(COUNT)
    exact = plain_rows(model, forward, advantages)
    plain = plain_rows(model, rounded, advantages)
    rows, share = engine_rows(model, rounded, advantages)
    assert share == 1.0
    assert rows.dtype == torch.float32
    assert_rows(model, rows, plain, tolerance=2e-2)
    assert (distance(rows, exact) <= 1.5 * distance(plain, exact)).all()


@pytest.mark.parametrize(("count", "rewards"), [(1, 1), (1, 3), (3, 20), (6, 1)])
def test_any_number_of_samples_and_rewards(count, rewards):
    model, forward = prepare("sd3", count=count)
    advantages = random_advantages(count, rewards)
    advantages[0] = 1.5
    assert assert_equal(model, forward, advantages) == 1.0


@pytest.mark.parametrize("rewards", [1, 5, 20])
def test_two_backward_passes_whatever_the_number_of_rewards(rewards):
    """Once the first compute has looked for samples that mix."""
    model, _ = prepare("sd3")
    inputs, passes = inputs_of("sd3", COUNT), []
    with PerRewardGradients(model) as engine:
        for update in range(3):
            output = predict(model, inputs)
            output.register_hook(lambda _, update=update: passes.append(update))
            engine.compute(loss_of(output), random_advantages(COUNT, rewards))
    assert passes.count(1) == passes.count(2) == 2
    assert passes.count(0) <= 5
