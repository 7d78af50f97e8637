import pytest
import torch

from marble import MarbleError, Policy
from marble.config import demo_config_path, make_config, read_config
from marble.update import Updater


@pytest.fixture
def updater(untrained):
    policy = Policy.from_pretrained(str(untrained))
    policy.add_adapters(rank=2, alpha=2, targets=["attn.to_q"], seed=0)
    values = read_config(demo_config_path())
    values["optimizer"] |= {"lr": 0.01, "clip": 1.0}
    values["objective"]["old"] = {"slope": 0.25, "limit": 0.5}
    return Updater(policy, make_config(values))


def flat(updater, name):
    return torch.cat([p.detach().flatten() for p in updater.policy._slots[name]])


def apply(updater, direction):
    return updater.apply(direction.split([p.numel() for p in updater.policy.parameters]))


def test_a_direction_is_a_gradient_in_the_order_of_the_parameters(updater):
    start = flat(updater, "default").clone()
    direction = torch.linspace(-1, 1, len(start))
    norm = apply(updater, direction.clone())  # clipping happens in place
    assert norm == pytest.approx(direction.norm().item(), rel=1e-5)
    moved = flat(updater, "default") - start
    # Adam's first step is lr against the sign, whatever the scale
    inner = direction.abs() > 1e-3
    torch.testing.assert_close(moved[inner], -0.01 * direction[inner].sign(), atol=2e-5, rtol=0)


def test_averages_follow(updater):
    start = flat(updater, "default").clone()
    apply(updater, torch.ones_like(start))
    keep = 2 / 11  # (1 + u) / (10 + u) after one update, below the limit of 0.9
    expected = keep * start + (1 - keep) * flat(updater, "default")
    torch.testing.assert_close(flat(updater, "ema"), expected)
    assert torch.equal(flat(updater, "old"), start)
    assert updater.end_epoch() == 0.25
    torch.testing.assert_close(flat(updater, "old"), 0.25 * start + 0.75 * flat(updater, "default"))


def test_a_gradient_that_is_not_finite_changes_nothing(updater):
    start = flat(updater, "default").clone()
    with pytest.raises(MarbleError, match="gradient of update 1 is not finite"):
        apply(updater, torch.full_like(start, torch.nan))
    assert torch.equal(flat(updater, "default"), start)


def test_goes_on_from_its_state(updater):
    size = len(flat(updater, "default"))
    apply(updater, torch.ones(size))
    state = updater.state_dict()
    other = Updater(updater.policy, updater.config)
    other.load_state_dict(state)
    assert other.updates == 1
    assert other.optimizer.state_dict()["state"][0]["step"] == 1
