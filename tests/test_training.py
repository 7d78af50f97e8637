"""The whole loop on tiny budgets, on the real embedded model."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from marble import MarbleError, Run, train
from marble.config import demo_config_path, make_config, read_config
from marble.report import write_report


def tiny(**sections):
    values = read_config(demo_config_path())
    values["rollout"] = {"prompts": 3, "group_size": 4, "steps": 4, "batch": 12}
    values["objective"] |= {"timesteps": 2}
    values["optimizer"] |= {"updates_per_epoch": 2, "micro_batch": 12}
    values["budget"] = {"updates": 4}
    values["evaluation"] = {"prompts": 6, "images": 2, "steps": 3, "every": 2, "track": 0.5}
    values |= {"diagnose_every": 2, "checkpoint_every": 2, "threads": 1}
    for name, change in sections.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) and name in values else change
    return make_config(values)


def weights(run):
    return load_file(run.path / "lora" / "pytorch_lora_weights.safetensors")


def lines(run):
    """The metrics without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("time", "update_seconds")} for row in run.metrics()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tiny(), tmp_path_factory.mktemp("whole") / "run")


def test_a_run_leaves_everything_behind(whole):
    names = {path.name for path in whole.path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "lora", "evaluation.json"} <= names
    rows = whole.metrics()
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["update"] for row in rows if "held_out" in row] == [0, 2, 4]
    assert [row.get("refreshed") for row in rows[1:]] == [True, False, False, False]
    assert all(abs(sum(row["alpha"]) - 1) < 1e-9 for row in rows[1:])
    for row in rows[1:]:
        assert set(row["time"]) == {"rollout", "rewards", "elapsed", "judging", "hidden"}
        assert set(row["time"]["judging"]) == set(row["reward"])
        assert row["time"]["hidden"] == 0  # none of these has threads of its own
        assert 0 < sum(row["time"]["judging"].values()) <= row["time"]["rewards"]
    evaluation = whole.evaluation()
    assert set(evaluation["gains"]) == {*evaluation["training_rewards"], *evaluation["held_out_rewards"]}
    assert len(evaluation["before"]["scores"]) == 12
    assert (whole.path / "samples" / "after" / "000_0.png").exists()
    assert any(value.abs().max() > 0 for key, value in weights(whole).items() if "lora_B" in key)


def test_same_seed_same_machine_bit_identical(whole, tmp_path):
    again = train(tiny(), tmp_path / "run")
    assert lines(again) == lines(whole)
    for key, value in weights(again).items():
        assert torch.equal(value, weights(whole)[key])
    assert json.loads((again.path / "evaluation.json").read_text()) == whole.evaluation()


def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path):
    def stop_after_the_first_epoch(metrics):
        return metrics["update"] == 1

    half = train(tiny(), tmp_path / "run", watch=stop_after_the_first_epoch)
    assert [row["update"] for row in half.metrics()] == [0, 1, 2]
    assert "after" not in half.evaluation()
    assert (half.path / "lora" / "pytorch_lora_weights.safetensors").exists()  # usable as it is
    write_report(half)
    run = train(tiny(), tmp_path / "run", resume=True)
    assert lines(run) == lines(whole)
    for key, value in weights(run).items():
        assert torch.equal(value, weights(whole)[key])
    assert run.evaluation()["gains"] == whole.evaluation()["gains"]


def test_another_seed_is_another_run(whole, tmp_path):
    other = train(tiny(seed=1), tmp_path / "run")
    assert lines(other)[1]["reward"] != lines(whole)[1]["reward"]


@pytest.mark.parametrize("method", ["published", "uniform", "weighted-sum"])
def test_other_methods(method, tmp_path):
    settings = {"method": method, "refresh": 2}
    run = train(tiny(balance=settings, objective={"kl": 1e-4}, diagnose_every=1), tmp_path / "run")
    rows = run.metrics()[1:]
    assert ("alpha" in rows[0]) == (method != "weighted-sum")
    assert all(row["cosine/fresh"] > -1e-6 and row["cosine_advantage/fresh"] > -1e-6 for row in rows)
    if method == "published":  # on the update that solves, the applied direction is the fresh one
        assert rows[0]["cosine/applied"] == pytest.approx(rows[0]["cosine/fresh"], abs=0.02)
    if method == "weighted-sum":
        for row in rows:
            same = pytest.approx(row["cosine_advantage/weighted_sum"], abs=1e-4)  # but for the strength
            assert row["cosine_advantage/applied"] == same
    if run.metrics()[-1]["update"] > 1:
        assert rows[-1]["kl"] > 0


def test_budget_in_minutes(tmp_path):
    run = train(tiny(budget={"updates": None, "minutes": 0.0001}), tmp_path / "run")
    assert run.metrics()[-1]["update"] == 2  # the epoch in which it ran out is finished


def test_any_geometry(tmp_path):
    config = tiny(
        rollout={"prompts": 5, "group_size": 3, "batch": 2},
        optimizer={"updates_per_epoch": 4, "micro_batch": 7},
        budget={"updates": 3},
    )
    assert train(config, tmp_path / "run").metrics()[-1]["update"] == 3


def test_early_stop_exports_what_was_before_the_fall(tmp_path, monkeypatch):
    from marble.evaluation import Gain

    falling = Gain(1.0, 0.5, -0.5, -0.6, -0.4, 1.0)
    monkeypatch.setattr("marble.heldout.gains", lambda before, after: dict.fromkeys(before.names, falling))
    config = tiny(budget={"updates": 40}, evaluation={"early_stop": "diversity", "patience": 2, "every": 1})
    run = train(config, tmp_path / "run")
    assert run.metrics()[-1]["update"] == 2
    assert "after" in run.evaluation()
    assert all(value.abs().max() == 0 for key, value in weights(run).items() if "lora_B" in key)  # the base's own
    assert train(config, tmp_path / "run", resume=True).metrics()[-1]["update"] == 2  # it knows that it has stopped


def test_resumed_before_the_first_checkpoint(tmp_path):
    def crash(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", watch=crash)
    rows = train(tiny(), tmp_path / "run", resume=True).metrics()
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]


def test_a_reward_that_applies_to_no_prompt(tmp_path):
    config = tiny(prompts=[{"source": "mini-places"}])
    with pytest.raises(MarbleError, match="text, composition applies to no prompt of places"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_noticed_first(tmp_path):
    with pytest.raises(MarbleError, match="does not exist"):
        train(tiny(model={"id": str(tmp_path / "none")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path, monkeypatch):
    train(tiny(), tmp_path / "run", watch=lambda metrics: True)
    state = Run(tmp_path / "run").load_checkpoint()
    del state["method"]
    monkeypatch.setattr(Run, "load_checkpoint", lambda run: state)
    with pytest.raises(MarbleError, match="checkpoint is of an earlier version"):
        train(tiny(), tmp_path / "run", resume=True)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(MarbleError, match="not a run folder"):
        train(tiny(), tmp_path / "none", resume=True)


def test_report_shows_it_all_and_escapes(whole):
    run = Run(whole.path)
    content = run.evaluation()
    content["before"]["prompts"][0] = "<script>alert(1)</script>"
    content["after"]["prompts"][0] = content["before"]["prompts"][0]
    run.write_evaluation(content)
    page = write_report(run).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for heading in (
        "What was gained",
        "Before and after",
        "On the way",
        "The balance",
        "How the rewards conflict",
        "Specialist map",
    ):
        assert heading in page
    assert page.count("<svg") >= 6
    assert not re.search(r'(src|href)="(https?:)?//|url\("?https?:', page)  # nothing is loaded from elsewhere
    assert 'src="data:image/png' in page


# ---- rewards on a server ------------------------------------------------------------------------------------


@contextmanager
def serving(*rewards):
    """A server of its own process; gives its URL and the process."""
    command = [sys.executable, "-m", "marble", "serve", *rewards, "--port", "0", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "MARBLE_TOKEN"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        said = process.stdout.readline()
        yield re.search(r"http://[\d.:]+", said)[0], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_served_rewards_make_the_same_run_bit_for_bit(whole, tmp_path):
    terms = read_config(demo_config_path())["rewards"]
    names = [term["reward"] for term in terms]
    with serving(*names) as (url, _):
        remote = train(tiny(rewards=[term | {"url": url} for term in terms]), tmp_path / "run")
    assert lines(remote) == lines(whole)
    for part in ("before", "after"):  # another test writes to its other contents
        assert remote.evaluation()[part]["scores"] == whole.evaluation()[part]["scores"]
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(remote).items())


def test_a_server_that_dies_costs_its_scores_and_no_more(tmp_path, caplog):
    terms = read_config(demo_config_path())["rewards"]
    assert terms[0]["reward"] == "mini-aesthetic"
    with serving("mini-aesthetic") as (url, process):
        served = terms[0] | {"url": url, "settings": {"retries": 1, "answer_within": 5}}
        config = tiny(rewards=[served, *terms[1:]], evaluation={"every": 0}, missing_limit=4)

        def die(metrics):
            if metrics["update"] == 2:
                process.kill()
            return False

        with pytest.raises(MarbleError, match="no score of aesthetic in 4 updates in a row or more"):
            train(
                config.model_copy(update={"budget": config.budget.model_copy(update={"updates": 20})}),
                tmp_path / "run",
                watch=die,
            )
    rows = Run(tmp_path / "run").metrics()[1:]
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["missing" in row for row in rows] == [False, False, True, True, True, True]
    assert rows[2]["reward"]["aesthetic"] is None
    assert all(row["reward"]["alignment"] is not None for row in rows)
    assert "reward aesthetic: no score for 12 of 12 images" in caplog.text
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()
