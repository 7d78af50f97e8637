"""Runs that fail on the way: what is said, what is left, and how to go on."""

import json

import pytest
import torch

from marble import MarbleError, Policy, Reward, Run, train
from marble.cli import main
from marble.config import make_config
from marble.policy import sampling
from marble.rewards import RewardTable
from marble.rewards.absence import Absence
from marble.setup import check_config

from .pipelines import build, call_of


class Bright(Reward):
    name = "bright"

    def score(self, images, records):
        return (images.float() / 255).mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def config(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\na boat\na tree\na man\na hill\na stone\na door\na bird\n")
    return make_config(
        {
            "model": {"id": str(folder), "call": call_of("sd3"), "device": "cpu", "lora": {"rank": 2, "alpha": 4}},
            "prompts": [{"source": str(prompts)}],
            "rewards": [{"reward": f"{__name__}:Bright"}],
            "rollout": {"prompts": 2, "group_size": 3, "steps": 3},
            "objective": {"timesteps": 2, "kl": 0.0},
            "optimizer": {"lr": 1e-3},
            "budget": {"updates": 4},
            "evaluation": {"prompts": 2, "images": 2, "steps": 2},
            "checkpoint_every": 1,
            "diagnose_every": 0,
        }
    )


def test_pictures_that_are_not_finite_are_not_taken_for_black(config, tmp_path, monkeypatch):
    images_of = sampling.images_of
    monkeypatch.setattr("marble.policy.policy.images_of", lambda result: images_of(result) * torch.nan)
    with pytest.raises(MarbleError, match=r"4 of 4 pictures are not finite though their latents are: the VAE"):
        train(config, tmp_path / "run")


def spoiled_after(monkeypatch, updates):
    """From the given update on, the trained weights are not finite."""
    from marble.update import Updater

    apply = Updater.apply

    def spoiling(self, *arguments):
        norm = apply(self, *arguments)
        if self.updates == updates:
            with torch.no_grad():
                self.policy.parameters[1].fill_(torch.nan)
        return norm

    monkeypatch.setattr(Updater, "apply", spoiling)


def test_a_run_that_turns_not_finite_names_the_layer_exports_and_goes_on(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoiled_after(patch, 2)
        with pytest.raises(MarbleError, match=r"not finite.*layer transformer_blocks.*what was learned before is kept"):
            train(config, out)
    assert list((out / "lora").glob("*.safetensors"))
    assert [path.name for path in Run(out).checkpoints()] == ["step_000001", "step_000002"]
    (out / "checkpoints" / "step_000002" / "state.safetensors").write_bytes(b"half a file")
    assert main(["train", "--resume", str(out)]) == 2
    assert "cannot be read" in (error := capsys.readouterr().err)
    assert "delete it to go on from step_000001" in error
    (out / "checkpoints" / "step_000002" / "state.safetensors").unlink()
    assert main(["train", "--resume", str(out), "--optimizer.lr", "5e-4", "--budget.updates", "3"]) == 0
    run = Run(out)
    assert run.config.optimizer.lr == 5e-4
    assert [row["update"] for row in run.metrics()] == [0, 1, 2, 3]
    assert "after" in run.evaluation()


def test_memory_that_runs_out_in_an_update_leaves_what_was_learned(config, tmp_path, monkeypatch):
    from marble import step

    rows, calls = step._Update._no_rows, []

    def full(self):
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(self)

    monkeypatch.setattr(step._Update, "_no_rows", full)
    config.balance.refresh = 2
    with pytest.raises(torch.OutOfMemoryError):
        train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "lora").glob("*.safetensors"))


def test_what_would_make_another_run_of_it_cannot_be_changed(config, tmp_path, capsys):
    short = config.model_copy(deep=True)
    short.budget.updates = 1
    train(short, tmp_path / "run", watch=lambda metrics: True)
    assert main(["train", "--resume", str(tmp_path / "run"), "--objective.beta", "0.5"]) == 2
    assert "--resume: objective.beta would make another run of it; what may change is" in capsys.readouterr().err


def test_a_checkpoint_of_another_lora_is_refused(config, tmp_path):
    short = config.model_copy(deep=True)
    short.budget.updates = 1
    train(short, tmp_path / "run", watch=lambda metrics: True)
    config.model.lora.rank = 3
    with pytest.raises(MarbleError, match="the checkpoint is of another model or another LoRA than the config's"):
        train(config, tmp_path / "run", resume=True)


def test_dropout_of_a_lora_from_elsewhere_is_off(folder, tmp_path):
    policy = Policy.from_pretrained(str(folder), call=call_of("sd3"), device="cpu")
    policy.add_adapters(rank=2, alpha=4, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    policy.denoiser.peft_config["default"].lora_dropout = 0.5
    policy.save(tmp_path, "default")
    for use in ("start", "apply"):
        other = Policy.from_pretrained(str(folder), call=call_of("sd3"), device="cpu")
        if use == "start":
            other.add_adapters(rank=1, alpha=1, seed=0, start=str(tmp_path / "lora"))
        else:
            other.load_lora(tmp_path / "lora")
        dropouts = [module for module in other.denoiser.modules() if isinstance(module, torch.nn.Dropout)]
        assert any(module.p == 0.5 for module in dropouts)
        first, second = (other.images(["a cat"], [1], steps=2, adapter="default") for _ in range(2))
        assert torch.equal(first, second)


def test_a_run_that_exported_nothing_is_not_generated_from(config, tmp_path, capsys):
    run = Run.create(tmp_path / "run", config)
    assert main(["generate", str(run.path), "a cat", "--out", str(tmp_path / "pictures")]) == 2
    assert "has exported nothing yet" in capsys.readouterr().err


def test_a_run_folders_own_wish_for_remote_code_is_not_granted(config, tmp_path, monkeypatch):
    """A run folder is something that people pass on."""
    config.model.trust_remote_code = True
    run = Run.create(tmp_path / "run", config)
    (run.path / "lora").mkdir()
    (run.path / "lora" / "x.safetensors").write_bytes(b"")
    asked = []

    def loading(*arguments, **options):
        asked.append(options["trust_remote_code"])
        raise MarbleError("enough")

    monkeypatch.setattr(Policy, "from_pretrained", loading)
    for flags in ([], ["--trust-remote-code"]):
        assert main(["generate", str(run.path), "a cat", "--out", str(tmp_path / "pictures"), *flags]) == 2
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"height": 0}, "model.call: height must be a whole number of at least 1, got 0"),
        ({"height": 33}, "StableDiffusion3Pipeline"),
        ({"joint_attention_kwargs": 3}, "StableDiffusion3Pipeline refuses"),
    ],
)
def test_arguments_that_the_pipeline_cannot_take(config, tmp_path, call, text):
    config.model.call |= call
    with pytest.raises(MarbleError, match=text):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_anywhere_is_one_message(config, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    check_config(config)
    monkeypatch.setattr(Policy, "from_pretrained", full)
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "marble: out of memory; use model.dtype" in error
    assert "Traceback" not in error


# ---- rewards that stop answering --------------------------------------------------------------------------


class Flaky(Reward):
    """Raises from the given call on: the first two are of the evaluation at the start."""

    name = "flaky"
    calls, alive = 0, range(0)

    def score(self, images, records):
        Flaky.calls += 1
        if Flaky.calls not in Flaky.alive:
            raise ConnectionError("no route to host")
        return images[:, 0].float().mean((1, 2)) / 255


@pytest.fixture
def flaky(config, monkeypatch):
    """A run with a second reward that answers in the evaluation at the start and in the first epoch."""
    monkeypatch.setattr(Flaky, "calls", 0)
    monkeypatch.setattr(Flaky, "alive", range(1, 3))
    values = config.model_dump()
    values["rewards"].append({"reward": f"{__name__}:Flaky"})
    return make_config(values | {"missing_limit": 2, "budget": {"updates": 6}})


def test_a_run_goes_on_without_a_reward_and_stops_saved_at_the_limit(flaky, tmp_path, caplog, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(MarbleError) as caught:
        train(flaky, out)
    assert str(caught.value) == (
        "rewards: no score of flaky in 2 updates in a row or more (missing_limit); the run has stopped, saved after "
        "update 3; mend it, then go on with marble train --resume"
    )
    rows = Run(out).metrics()
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["reward"]["flaky"] is not None
    assert "missing" not in rows[1]
    assert [row["reward"]["flaky"] for row in rows[2:]] == [None, None]
    assert [row["missing"] for row in rows[2:]] == [{"flaky": 6}] * 2
    assert all(row["reward"]["bright"] is not None for row in rows[1:])
    assert "reward flaky: no score for 6 of 6 images: ConnectionError: no route to host" in caplog.text
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()

    monkeypatch.setattr(Flaky, "alive", range(1, 10**6))  # mended
    run = train(flaky, out, resume=True)
    assert [row["update"] for row in run.metrics()] == list(range(7))
    assert run.metrics()[4]["reward"]["flaky"] is not None
    assert "flaky" in run.evaluation()["gains"]


def test_what_is_missing_is_remembered_over_an_interruption(flaky, tmp_path):
    out = tmp_path / "run"
    train(flaky, out, watch=lambda metrics: metrics["update"] == 2)  # broken off when it has been missing once
    with pytest.raises(MarbleError, match="saved after update 3"):
        train(flaky, out, resume=True)


def test_one_score_brings_a_reward_back(flaky, tmp_path, monkeypatch):
    class Rarely:
        def __contains__(self, call):
            return call <= 2 or call % 2 == 0

    monkeypatch.setattr(Flaky, "alive", Rarely())
    run = train(flaky, tmp_path / "run")
    assert [row.get("missing") for row in run.metrics()[1:]] == [None, {"flaky": 6}] * 3


def test_a_run_stops_at_once_when_no_reward_is_left(config, flaky, tmp_path, monkeypatch):
    values = config.model_dump() | {"rewards": [{"reward": f"{__name__}:Flaky"}], "missing_limit": 100}
    out = tmp_path / "run"
    with pytest.raises(MarbleError, match=r"no score of flaky in a whole epoch; .*, saved after update 1"):
        train(make_config(values), out)
    monkeypatch.setattr(Flaky, "alive", range(1, 10**6))
    run = train(make_config(values), out, resume=True)
    assert [row["update"] for row in run.metrics()] == list(range(5))


def test_a_reward_that_never_answers_is_found_before_training(flaky, tmp_path, monkeypatch):
    monkeypatch.setattr(Flaky, "alive", range(0))
    with pytest.raises(MarbleError, match="no score of flaky for any of the base model's pictures"):
        train(flaky, tmp_path / "run")
    assert not (tmp_path / "run" / "lora").exists()


def test_early_stop_waits_for_a_reward_that_gives_no_score(flaky, tmp_path, monkeypatch):
    """Once it crashed for want of a gain: neither a strike nor a reprieve now."""
    values = flaky.model_dump()
    values["held_out_rewards"] = [values["rewards"].pop()["reward"]]
    values["evaluation"] |= {"every": 1, "early_stop": "flaky"}
    monkeypatch.setattr(Flaky, "alive", range(1, 2))
    config, out = make_config(values | {"budget": {"updates": 3}}), tmp_path / "run"
    with pytest.raises(MarbleError, match=r"no score of flaky for any of the pictures made after training .* --resume"):
        train(config, out)
    rows = Run(out).metrics()
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    assert [row["held_out"]["flaky"] for row in rows[1:]] == [None] * 3
    assert [row["held_out_missing"] for row in rows[1:]] == [{"flaky": 4}] * 3
    assert "after" not in Run(out).evaluation()
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    monkeypatch.setattr(Flaky, "alive", range(1, 10**6))  # mended: nothing is trained anew
    run = train(config, out, resume=True)
    assert [row["update"] for row in run.metrics()] == [0, 1, 2, 3]
    assert set(run.evaluation()["gains"]) == {"bright", "flaky"}


def test_another_revision_than_at_the_start_is_told_of(flaky, tmp_path, caplog, monkeypatch):
    out = tmp_path / "run"
    train(flaky, out, watch=lambda metrics: True)
    monkeypatch.setattr(Flaky, "revision", "2", raising=False)
    monkeypatch.setattr(Flaky, "alive", range(1, 10**6))
    train(flaky, out, resume=True, watch=lambda metrics: True)
    assert 'reward flaky: "" judged the base model and "2" judges now' in caplog.text


def test_a_mended_reward_is_not_stopped_for_before_it_is_asked():
    absence = Absence(2)
    scores, wanted = torch.tensor([[torch.nan]], dtype=torch.float64), torch.tensor([[True]])
    absence.count(RewardTable.of(["a"], scores, wanted), 2)
    assert absence.lost == ["a"]
    absence.count(RewardTable.of(["a"], scores, ~wanted), 1)  # no prompt of this epoch is its
    assert absence.lost == []
    absence.count(RewardTable.of(["a"], scores, wanted), 1)
    assert absence.lost == ["a"]
