from pathlib import Path

import pytest
import yaml

from marble import MarbleError
from marble.catalogue import FROM_ADVANTAGES, FROM_GRADIENTS, METHODS, NEED_TORCHJD, OBJECTIVES
from marble.config import Config, Decay, check_names, dump_config, make_config, read_config

DEMO = Path(__file__).parent.parent / "src" / "marble" / "configs" / "demo.yaml"


@pytest.fixture
def demo():
    return read_config(DEMO)


def complaint(values):
    with pytest.raises(MarbleError) as caught:
        make_config(values)
    return str(caught.value)


def test_the_demo_config_is_valid_and_its_names_are_known(demo):
    check_names(make_config(demo))


def test_what_is_written_down_is_complete_and_reads_back_the_same(demo):
    config = make_config(demo)
    text = dump_config(config)
    assert make_config(yaml.safe_load(text)) == config
    assert "amax: 5.0" in text  # a default


def test_all_errors_at_once_with_field_rule_and_value(demo):
    demo["optimizer"]["lr"] = -1
    demo["rollout"]["group_size"] = 1
    demo["balance"] = {"refersh": 5}
    text = complaint(demo)
    assert "optimizer.lr: input should be greater than 0, got -1" in text
    assert "rollout.group_size: input should be greater than or equal to 2, got 1" in text
    assert 'balance.refersh: unknown setting. Did you mean "refresh"?' in text


def test_misspelt_section_and_item_of_a_list(demo):
    demo["rewads"] = []
    demo["rewards"][0]["wieght"] = 2
    text = complaint(demo)
    assert 'rewads: unknown setting. Did you mean "rewards"?' in text
    assert 'rewards.0.wieght: unknown setting. Did you mean "weight"?' in text


def test_wrong_type(demo):
    demo["rollout"]["steps"] = "many"
    assert "rollout.steps" in complaint(demo)
    assert "'many'" in complaint(demo)


def test_no_rewards(demo):
    demo["rewards"] = []
    assert "rewards: list should have at least 1 item" in complaint(demo)
    del demo["rewards"]
    assert "rewards: is required" in complaint(demo)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("objective", {"timesteps": 9}, "use objective.timesteps = 5 or rollout.steps = 10"),
        ("rollout", {"prompts": 2}, "rollout.prompts: at least one for each source by its share, got 2; use 3"),
        ("evaluation", {"prompts": 2}, "evaluation.prompts: at least one for each source by its share, got 2; use 3"),
        ("evaluation", {"prompts": 2, "mixture": "even"}, "at least one for each source by its share, got 2; use 3"),
        ("evaluation", {"mixture": "odd"}, "evaluation.mixture: input should be 'shares' or 'even', got 'odd'"),
        ("model", {"call": {"guidance_scale": 4}}, "model.call: guidance_scale is set by other settings"),
        ("balance", {"method": "published", "norms": "folded"}, "use method = marble for either correction"),
        ("optimizer", {"betas": [2, 0]}, "optimizer.betas.0: input should be less than 1, got 2"),
        ("optimizer", {"lr": float("inf")}, "optimizer.lr: input should be a finite number, got inf"),
        ("optimizer", {"updates_per_epoch": 10_000}, "use 432"),
        ("balance", {"finish": 200}, "less than budget.updates = 180"),
        ("budget", {"updates": None}, "give updates, minutes or both"),
        ("evaluation", {"early_stop": "diversity", "every": 0}, "needs evaluation.every > 0"),
    ],
)
def test_rules_between_settings_name_the_nearest_values(demo, section, change, message):
    demo[section] = {**demo.get(section, {}), **change}
    assert message in complaint(demo)


def test_a_reward_is_not_both_trained_on_and_held_out(demo):
    demo["held_out_rewards"] = ["mini-text"]
    demo["rewards"].append({"reward": "mini-aesthetic"})
    text = complaint(demo)
    assert '"mini-text" is also trained on' in text
    assert '"mini-aesthetic" is given more than once' in text


def test_unknown_names_are_found_without_importing(demo):
    demo["rewards"][0]["reward"] = "mini-aestetic"
    demo["prompts"][1]["source"] = "missing.txt"
    with pytest.raises(MarbleError) as caught:
        check_names(make_config(demo))
    assert 'rewards.0.reward: unknown reward "mini-aestetic". Did you mean "mini-aesthetic"?' in str(caught.value)
    assert 'prompts.1.source: prompt file "missing.txt" does not exist' in str(caught.value)


def test_published_is_one_word(demo):
    demo["balance"] = {"method": "published"}
    balance = make_config(demo).balance
    assert (balance.advantage_scale, balance.norms) == ("published", "raw")


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("smooth", "gram", "balance.smooth: published has weights, got gram; use balance.method = marble"),
        ("estimate", "halves", "balance.estimate: published has batch, got halves; use"),
        ("gradients", "advantage", "balance.gradients: published has whole, got advantage; use"),
        ("advantage_scale", "match", "got advantage_scale = match and norms = raw; use method = marble"),
    ],
)
def test_published_is_to_the_letter(demo, field, change, message):
    demo["balance"] = {"method": "published", field: change}
    assert message in complaint(demo)


def test_halves_are_averaged_and_have_two_prompts_of_every_source(demo):
    demo["balance"] = {"estimate": "halves"}
    demo["rollout"]["prompts"] = 5
    text = complaint(demo)
    assert "balance.estimate: halves is too noisy to solve on unaveraged; use balance.smooth = gram" in text
    assert "rollout.prompts: halves need two prompts of every source, got 5; use 6" in text


@pytest.mark.parametrize("method", sorted(set(FROM_ADVANTAGES) - {"uniform"}))
@pytest.mark.parametrize(("field", "value"), [("smooth", "gram"), ("solve_share", 0.5), ("gradients", "advantage")])
def test_settings_of_solves_are_refused_where_nothing_is_solved(demo, method, field, value):
    demo["balance"] = {"method": method, field: value}
    assert f"balance.{field}: {method} takes no reward's gradient" in complaint(demo)


@pytest.mark.parametrize("method", [*FROM_ADVANTAGES, "published"])
def test_a_floor_needs_every_rewards_gradient(demo, method):
    demo["balance"] = {"method": method}
    demo["rewards"][3]["floor"] = True
    text = complaint(demo)
    assert "rewards.3.floor: needs a method that takes every reward's gradient" in text
    assert f"got balance.method = {method}; use marble" in text


@pytest.mark.parametrize("method", sorted(set(FROM_GRADIENTS) - {"published"}))
def test_floors_and_priorities_go_with_every_other_method(demo, method):
    demo["balance"] = {"method": method, "smooth": "gram", "estimate": "halves", "gradients": "advantage"}
    demo["rewards"][3] |= {"floor": True, "priority": 2}
    term = make_config(demo).rewards[3]
    assert (term.floor, term.priority) == (True, 2.0)


@pytest.mark.parametrize(
    ("method", "instead"),
    [("weighted-sum", "use rewards.N.weight instead"), ("published", "use balance.method = marble")],
)
def test_a_priority_that_would_not_count(demo, method, instead):
    demo["balance"] = {"method": method}
    demo["rewards"][1]["priority"] = 2
    assert f"rewards.1.priority: {method} knows none, got 2.0; {instead}" in complaint(demo)
    demo["rewards"][1]["priority"] = 1
    make_config(demo)


def test_closed_loop_compares_rewards(demo):
    demo["balance"] = {"method": "closed-loop"}
    make_config(demo)
    demo["rewards"] = demo["rewards"][:1]
    assert "balance.method: closed-loop compares rewards, got one reward; use marble" in complaint(demo)


@pytest.mark.parametrize(
    ("section", "field", "wrong", "right"),
    [
        ("balance", "method", "pc-grad", "pcgrad"),
        ("balance", "method", "marbel", "marble"),
        ("objective", "name", "ntf", "nft"),
    ],
)
def test_an_unknown_method_or_objective(demo, section, field, wrong, right):
    demo[section] = {field: wrong}
    text = complaint(demo)
    assert f'"{wrong}" is not one of {", ".join(METHODS if section == "balance" else OBJECTIVES)}.' in text
    assert f'Did you mean "{right}"?' in text


def test_an_unknown_method_is_said_with_its_field(demo):
    demo["balance"] = {"method": "marbel"}
    demo["objective"]["name"] = "ntf"
    text = complaint(demo)
    assert 'balance.method: "marbel" is not one of' in text
    assert 'objective.name: "ntf" is not one of' in text


def test_several_broken_rules_at_once(demo):
    demo["balance"] = {"method": "published", "smooth": "gram"}
    demo["rewards"][0] |= {"floor": True, "priority": 3}
    text = complaint(demo)
    for field in ("balance.smooth", "rewards.0.floor", "rewards.0.priority"):
        assert f"\n  {field}: " in text


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(MarbleError, match="does not exist"):
        read_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(MarbleError, match="not valid YAML"):
        read_config(broken)
    broken.write_text("- 1")
    with pytest.raises(MarbleError, match="must be a mapping"):
        read_config(broken)


def test_decay_schedules():
    slow = Decay(slope=0.001, limit=0.5)
    assert [slow.at(u) for u in (0, 100, 10_000)] == [0.0, 0.1, 0.5]
    late = Decay(start=75, slope=0.0075, limit=0.999)
    assert late.at(75) == 0
    assert late.at(175) == pytest.approx(0.75)
    assert Decay(slope=0.0).at(1000) == 0


def test_defaults_are_the_published_settings():
    config = Config.model_validate({"prompts": [{"source": "x"}], "rewards": [{"reward": "y"}]})
    assert (config.objective.beta, config.objective.amax, config.objective.kl) == (0.1, 5.0, 1e-4)
    assert (config.balance.refresh, config.balance.decay) == (10, 0.7)
    assert (config.rollout.prompts, config.rollout.group_size, config.optimizer.lr) == (48, 24, 3e-4)


def test_a_method_of_torchjds_is_refused_without_it(demo, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    demo["balance"] = {"method": "pcgrad"}
    assert 'balance.method: pcgrad needs TorchJD: pip install "marble-diffusion[torchjd]"' in complaint(demo)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(NEED_TORCHJD)))
def test_a_runs_complete_config_can_be_read_again(demo, method):
    demo["balance"] = {"method": method}
    config = make_config(demo)
    assert make_config(yaml.safe_load(dump_config(config))) == config
