"""Objective `ppo` as a whole: its settings, its updates under every method, and runs of `marble train`."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from marble import MarbleError, Reward, Run, train
from marble.config import Decay, demo_config_path, dump_config, make_config, read_config
from marble.overrides import override

from .pipelines import build, call_of
from .pipelines.settled import settle
from .small import GROUP, IMAGES, Trial, config_of

# ---- settings ---------------------------------------------------------------------------------------------


def settings(objective=None, **sections):
    values = {"prompts": [{"source": "x"}], "rewards": [{"reward": "r"}], **sections}
    return make_config(values | {"objective": {"name": "ppo", **(objective or {})}})


def test_defaults_are_the_authors():
    config = settings()
    objective, rollout = config.objective, config.rollout
    assert (objective.clip, objective.amax, objective.kl, objective.timesteps) == (1e-4, 5.0, 0.04, 9)
    assert [objective.old.at(update) for update in (0, 1, 1000)] == [0, 0, 0]
    assert (rollout.scheduler, rollout.noise, rollout.guidance, rollout.steps) == ("sde", 0.7, 1.0, 10)


def test_what_is_given_stands():
    objective = settings({"clip": 0.01, "kl": 0.0, "old": {"limit": 0.0}}).objective
    assert (objective.clip, objective.kl, objective.old) == (0.01, 0.0, Decay(limit=0.0))


def test_other_objectives_keep_theirs():
    for name in ("nft", "awm"):
        config = settings({"name": name})
        assert (config.objective.clip, config.objective.kl, config.objective.old) == (1.0, 1e-4, Decay())
        assert config.rollout.scheduler == "own"


def test_one_word_on_the_command_line_suffices():
    config = make_config(override(read_config(demo_config_path()), ["--objective.name", "ppo"]))
    assert (config.objective.clip, config.objective.old.limit, config.rollout.scheduler) == (1e-4, 0.0, "sde")
    assert config.objective.kl == 0.0  # as the demo has it


@pytest.mark.parametrize("objective", [{}, {"clip": 0.5, "kl": 0.0}])
def test_what_is_written_down_is_complete_and_reads_back_the_same(objective):
    config = settings(objective, balance={"method": "weighted-sum"})
    written = yaml.safe_load(dump_config(config))
    assert written["rollout"]["scheduler"] == "sde"
    assert written["objective"]["old"] == {"start": 0, "slope": 0.0, "limit": 0.0}
    assert make_config(written) == config


def test_refuses_samplers_without_log_probabilities_and_the_last_step():
    for scheduler in ("euler", "dpm++", "ddim"):
        with pytest.raises(MarbleError, match=r"rollout\.scheduler: ppo needs the log-probabilities .*; use sde"):
            settings(rollout={"scheduler": scheduler})
    with pytest.raises(MarbleError, match=r"objective\.timesteps: at most rollout.steps − 1"):
        settings({"timesteps": 6}, rollout={"steps": 6})
    with pytest.raises(MarbleError, match=r"rollout\.noise: input should be greater than 0"):
        settings(rollout={"noise": 0})


# ---- updates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(untrained):
    """Its trained weights are away from those that sampled: ratios of 1 ± 0.02."""
    return Trial.of(untrained, "sde")


def ppo(**sections):
    objective = {"name": "ppo", "clip": 0.02, "timesteps": 3} | sections.pop("objective", {})
    return config_of(objective=objective, rollout={"scheduler": "sde"}, **sections)


METHODS = ["marble", "published", "upgrad", "cagrad", "closed-loop", "uniform", "gdpo", "weighted-sum"]


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_weights_without_an_advantage_free_part(trial, method, kl):
    config = ppo(balance={"method": method, "refresh": 2}, objective={"kl": kl}, diagnose_every=2)
    found, metrics, _ = trial.run(config, epochs=3)
    assert found.isfinite().all()
    assert (found - trial.origin).norm() > 0
    for row in metrics:
        assert row["gradient_norm"] > 0
        assert (row["kl"] > 0) == (kl > 0)


@pytest.mark.parametrize("refresh", [1, 5])
def test_micro_batches_change_nothing(trial, refresh):
    wanted, _, _ = trial.run(ppo(balance={"refresh": refresh}), epochs=2)
    for size in (3, 100):
        found, _, _ = trial.run(ppo(balance={"refresh": refresh}, optimizer={"micro_batch": size}), epochs=2)
        assert (found - wanted).norm() < 1e-3 * (wanted - trial.origin).norm()


def test_processes_gather_what_one_does(trial):
    """Each visits its own images' steps; their gradients add up to those of one process."""
    config = ppo(balance={"method": "weighted-sum"}, optimizer={"lr": 10.0})
    whole, _, _ = trial.run(config)
    parts = [trial.run(config, own=own)[0] - trial.origin for own in (range(GROUP), range(GROUP, IMAGES))]
    counts = torch.tensor([GROUP, IMAGES - GROUP]) / IMAGES  # alone, each divides by its own visits
    wanted = whole - trial.origin  # Adam's first step, with eps as large as here, is proportional to the gradient
    assert wanted.norm() > 1e-3
    assert (counts[0] * parts[0] + counts[1] * parts[1] - wanted).norm() < 0.01 * wanted.norm()


# ---- runs -------------------------------------------------------------------------------------------------


def tiny(**sections):
    values = read_config(demo_config_path())
    values["rollout"] = {"prompts": 3, "group_size": 4, "steps": 4, "batch": 12}
    values["objective"] = {"name": "ppo", "timesteps": 3}
    values["optimizer"] |= {"updates_per_epoch": 1, "micro_batch": 12}
    values["budget"] = {"updates": 2}
    values["evaluation"] = {"prompts": 3, "images": 2, "steps": 3}
    values |= {"diagnose_every": 0, "checkpoint_every": 1, "threads": 1}
    return make_config(values | sections)


def weights(run):
    return load_file(run.path / "lora" / "pytorch_lora_weights.safetensors")


def lines(run):
    return [{k: v for k, v in row.items() if k not in ("time", "update_seconds")} for row in run.metrics()]


def test_a_run_of_the_command_line_and_its_resumption(tmp_path):
    """Two updates in one go, and one and then the other in another process: the same, to the last bit."""
    (tmp_path / "ppo.yaml").write_text(dump_config(tiny()))
    command = [sys.executable, "-m", "marble", "train", tmp_path / "ppo.yaml", "--out", tmp_path / "run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "aesthetic" in json.loads(done.stdout.splitlines()[-1])["gains"]
    run = Run(tmp_path / "run")
    assert [row["update"] for row in run.metrics()[1:]] == [1, 2]
    assert run.metrics()[2]["kl"] > 0  # the second epoch's policy is off the base model
    assert all(row["gradient_norm"] > 0 for row in run.metrics()[1:])

    half = train(tiny(), tmp_path / "half", watch=lambda metrics: metrics["update"] == 1)
    assert len(half.metrics()) == 2
    whole = train(half.config, half.path, resume=True)
    assert lines(whole) == lines(run)
    for key, value in weights(run).items():
        assert torch.equal(weights(whole)[key], value)


class Bright(Reward):
    """How light a picture is."""

    name = "bright"

    def score(self, images, records):
        return images.float().flatten(1).mean(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sd15", "sd15-v"])
def test_it_raises_a_reward_whatever_the_network_predicts(name, tmp_path):
    folder = build(name, tmp_path / "model")
    if name == "sd15":
        settle(folder, call_of(name))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nthe house\ntwo birds\na tree\na boat at sea\nhills\na man\nstones\na door\n")
    config = make_config(
        {
            "model": {"id": str(folder), "device": "cpu", "call": call_of(name), "lora": {"rank": 4, "alpha": 8}},
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"{__name__}:Bright"}],
            "rollout": {"prompts": 4, "group_size": 12, "steps": 6},
            "objective": {"name": "ppo", "timesteps": 5},
            "balance": {"method": "weighted-sum"},
            "optimizer": {"lr": 1e-2},
            "ema": 0.0,
            "budget": {"updates": 20},
            "evaluation": {"prompts": 2, "images": 24, "steps": 6, "scheduler": "sde"},
            "diagnose_every": 0,
            "threads": 1,
        }
    )
    gain = train(config, tmp_path / "run").evaluation()["gains"]["bright"]
    assert gain["low"] > 0
    assert gain["gain"] > 0.1 * gain["spread"]
