"""float16: losses are scaled up on the way back, and an update that overflows is left out with a lower scale."""

import math

import pytest
import torch

from marble import MarbleError, Reward, train
from marble.config import make_config
from marble.step import make_update
from marble.update import Updater

from .pipelines import build, call_of
from .small import Trial, config_of, flat, signals_for

HIGHEST = 2.0**14


@pytest.fixture(scope="module")
def trial(untrained):
    return Trial.of(untrained)


def half(**sections):
    """A config whose losses are scaled; the trial's own network stays in single precision, so that sums compare."""
    return config_of(model={"dtype": "float16"}, **sections)


def overflow_above(trial, monkeypatch, limit):
    """Gradients at the denoiser's answers become infinite above `limit`, as they do in float16 above 65504."""
    forward = trial.policy.denoiser.forward

    def limited(*args, **kwargs):
        result = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            result[0].register_hook(lambda g: torch.where(g.abs() > limit, torch.inf * g.sign(), g))
        return result

    monkeypatch.setattr(trial.policy.denoiser, "forward", limited)


def largest_gradient(trial, config, monkeypatch):
    """At the denoiser's answers in one update at the highest scale, divided by it."""
    found, forward = [], trial.policy.denoiser.forward

    def measured(*args, **kwargs):
        result = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            result[0].register_hook(lambda g: found.append(g.abs().max().item()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trial.policy.denoiser, "forward", measured)
        trial.run(config)
    return max(found) / HIGHEST


UPDATES = {
    "exact": {"objective": {"kl": 0.3}},
    "published": {"balance": {"method": "published"}, "objective": {"kl": 2.0}},
    "published, a share": {"balance": {"method": "published", "solve_share": 0.5}, "objective": {"kl": 0.1}},
    "advantages alone": {"balance": {"method": "weighted-sum"}, "objective": {"kl": 0.3}},
    "diagnosed": {"balance": {"method": "gdpo"}, "diagnose_every": 1, "objective": {"kl": 0.1}},
}


@pytest.mark.parametrize("sections", UPDATES.values(), ids=UPDATES)
def test_the_scale_changes_no_update(trial, sections):
    """16384 is a power of two: in exact arithmetic it goes out as it came in."""
    expected, plain, _ = trial.run(config_of(**sections))
    found, metrics, parts = trial.run(half(**sections))
    assert parts.updater.scale == HIGHEST
    assert parts.engine.scale == HIGHEST
    assert (found - expected).norm() <= 1e-5 * (expected - trial.origin).norm()
    for key in ("loss", "kl", "gradient_norm"):
        assert metrics[0][key] == pytest.approx(plain[0][key], rel=1e-4), key


@pytest.mark.parametrize("sections", UPDATES.values(), ids=UPDATES)
def test_an_overflow_lowers_the_scale_until_the_update_is_the_plain_one(trial, sections, monkeypatch):
    expected, _, _ = trial.run(config_of(**sections))
    largest = largest_gradient(trial, half(**sections), monkeypatch)
    overflow_above(trial, monkeypatch, 2.0**11 * largest)  # fits at 2^10, not at 2^14 or 2^12
    config = half(**sections)
    parts, signals, plan = trial.parts(config), signals_for(), trial.plan(config)[0]
    versions = {name: flat(trial.policy._slots[name]) for name in ("default", "old", "ema")}
    for made, scale in ((1, 2.0**12), (2, 2.0**10)):
        metrics = make_update(config, parts, trial.rollout, signals, plan)
        assert metrics["update"] == parts.updater.updates == made
        assert metrics["skipped"]
        assert metrics["scale"] == parts.updater.scale == scale
        assert not metrics.keys() & {"loss", "gradient_norm"}
        for name, value in versions.items():
            assert torch.equal(flat(trial.policy._slots[name]), value)
        assert all(p.grad is None for p in trial.policy.parameters)
        assert not parts.updater.optimizer.state
    metrics = make_update(config, parts, trial.rollout, signals, plan)
    assert "skipped" not in metrics
    assert metrics["update"] == 3
    assert parts.updater.scale == 2.0**10
    assert parts.engine.fast_share == 1  # what overflowed says nothing of the layers
    found = flat(trial.policy.parameters)
    assert (found - expected).norm() <= 1e-5 * (expected - trial.origin).norm()


def test_what_was_skipped_is_named(trial, monkeypatch):
    overflow_above(trial, monkeypatch, 0.0)
    _, metrics, _ = trial.run(half())
    assert metrics[0]["skipped"] == "that of r0, r1, r2"
    _, metrics, _ = trial.run(half(balance={"method": "weighted-sum"}))
    assert metrics[0]["skipped"] == "the gradient as a whole"


@pytest.mark.parametrize("method", ["marble", "weighted-sum", "published"])
def test_at_the_lowest_scale_it_is_an_error_that_names_rewards_and_layers(trial, method, monkeypatch):
    """16384 / 4^7 = 1: seven updates are left out, the eighth cannot be mended."""
    overflow_above(trial, monkeypatch, 0.0)
    config = half(balance={"method": method})
    parts, signals, plan = trial.parts(config), signals_for(), trial.plan(config)[0]
    scales = [make_update(config, parts, trial.rollout, signals, plan)["scale"] for _ in range(7)]
    assert scales == [2.0**power for power in (12, 10, 8, 6, 4, 2, 0)]
    with pytest.raises(MarbleError) as caught:
        make_update(config, parts, trial.rollout, signals, plan)
    text = str(caught.value)
    assert "the gradient of update 8 is not finite" in text
    assert "model.dtype: bfloat16 or float32" in text
    assert "lora_" in text
    assert ("that of r0, r1, r2" in text) == (method != "weighted-sum")
    assert torch.equal(flat(trial.policy.parameters), trial.origin)


def test_in_single_precision_the_first_overflow_is_an_error(trial, monkeypatch):
    overflow_above(trial, monkeypatch, 0.0)
    with pytest.raises(MarbleError, match=r"update 1 is not finite .*a lower optimizer\.lr usually helps"):
        trial.run(config_of())


# ---- the scale on its own -------------------------------------------------------------------------------


@pytest.fixture
def updater(trial):
    return trial.parts(half()).updater


def apply(updater, value=0.0):
    for parameter in updater.policy.parameters:
        parameter.grad = torch.full_like(parameter, value)
    return updater.apply()


def test_gradients_are_divided_by_the_scale(updater, trial):
    norm = apply(updater, HIGHEST)
    assert norm == pytest.approx(len(trial.origin) ** 0.5, rel=1e-5)
    for parameter in updater.policy.parameters:
        parameter.grad = torch.full_like(parameter, HIGHEST)
    ones = [torch.ones(p.numel()) for p in updater.policy.parameters]  # a direction is to scale already
    assert updater.apply(ones) == pytest.approx(2 * len(trial.origin) ** 0.5, rel=1e-5)


def test_the_scale_grows_again_after_so_many_fine_updates_and_no_higher_than_it_was(updater):
    assert math.isnan(apply(updater, torch.inf))
    assert (updater.scale, updater.fine, updater.updates) == (2.0**12, 0, 1)
    scales = []
    for _ in range(650):
        apply(updater)
        scales.append(updater.scale)
    assert scales == [2.0**12] * 199 + [2.0**13] * 200 + [2.0**14] * 251
    assert updater.updates == 651


def test_an_overflow_starts_the_count_anew(updater):
    updater.scale, updater.fine = 2.0**10, 199
    apply(updater, torch.nan)
    assert (updater.scale, updater.fine) == (2.0**8, 0)
    apply(updater)
    assert (updater.scale, updater.fine) == (2.0**8, 1)


def test_a_scale_that_went_down_to_one_comes_back(updater):
    """Spread over a long run seven overflows are nothing unusual, and small gradients underflow without a scale."""
    for _ in range(7):
        apply(updater, torch.inf)
    assert updater.scale == 1
    for _ in range(200):
        apply(updater)
    assert updater.scale > 1


def test_a_skipped_update_counts_but_moves_no_average(updater, trial):
    apply(updater, 1.0)
    before = {name: flat(updater.policy._slots[name]) for name in ("default", "ema")}
    state = [each["exp_avg"].clone() for each in updater.optimizer.state.values()]
    apply(updater, torch.inf)
    assert updater.updates == 2
    for name, value in before.items():
        assert torch.equal(flat(updater.policy._slots[name]), value)
    for one, each in zip(state, updater.optimizer.state.values(), strict=True):
        assert torch.equal(one, each["exp_avg"])


def test_goes_on_from_its_state(updater, trial):
    apply(updater, torch.inf)
    apply(updater, 1.0)
    state = updater.state_dict()
    other = Updater(updater.policy, updater.config)
    other.load_state_dict(state)
    assert (other.updates, other.fine, other.scale) == (2, 1, 2.0**12)
    assert other.state_dict().keys() == state.keys()
    assert {"updates", "fine", "scale"} <= state.keys()


# ---- a pipeline in half precision -----------------------------------------------------------------------


class Bright(Reward):
    name = "bright"

    def score(self, images, records):
        return images.float().mean((1, 2, 3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_pipeline_in_half_precision_learns(name, dtype, tmp_path):
    """What is trained stays in single precision, and the steps are finite and not nothing."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nthe house\ntwo birds\na tree\na boat\nhills\na man\nstones\na door\n")
    config = make_config(
        {
            "model": {
                "id": str(build(name, tmp_path / "model")),
                "device": "cpu",
                "dtype": dtype,
                "call": call_of(name),
                "lora": {"rank": 2, "alpha": 4},
            },
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"{__name__}:Bright"}],
            "rollout": {"prompts": 2, "group_size": 4, "steps": 3},
            "objective": {"kl": 0.1, "timesteps": 2},
            "balance": {"refresh": 2},
            "optimizer": {"lr": 1e-3},
            "budget": {"updates": 2},
            "evaluation": {"prompts": 2, "images": 1, "steps": 2},
        }
    )
    run = train(config, tmp_path / "run")
    rows = [row for row in run.metrics() if "loss" in row or "skipped" in row]
    assert [row["update"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows if "loss" in row)
    assert any("loss" in row for row in rows)
    state = run.load_checkpoint()
    found = [value for value in tensors(state) if value.is_floating_point()]
    assert {value.dtype for value in found} <= {torch.float32, torch.float64}
    assert all(value.isfinite().all() for value in found)


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [value for each in inner for value in tensors(each)]
