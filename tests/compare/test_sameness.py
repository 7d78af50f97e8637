"""What has to be equal for runs to be compared."""

import pytest

from marble.compare.sameness import budget_of, different, measured, refuse, settings_of
from marble.config import demo_config_path, make_config, read_config
from marble.errors import MarbleError
from marble.overrides import override


def config(*arguments):
    return make_config(override(read_config(demo_config_path()), list(arguments)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rollout.prompts", 15),
        ("rollout.group_size", 10),
        ("rollout.steps", 8),
        ("optimizer.updates_per_epoch", 3),
        ("budget.updates", 90),
        ("evaluation.images", 4),
        ("prompts.1.share", 2.0),
        ("model.dtype", "bfloat16"),
        ("model.lora.start", "elsewhere"),
    ],
)
def test_another_budget_is_found(setting, value):
    found = different(budget_of(config()), budget_of(config(f"--{setting}", str(value))))
    assert [(name, theirs) for name, _, theirs in found] == [(setting, value)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--balance.refresh", "3"),
        ("--optimizer.lr", "1e-3"),
        ("--model.lora.rank", "8"),
        ("--seed", "4"),
        ("--threads", "2"),
        ("--rewards.0.weight", "2"),
    ],
)
def test_what_arms_may_differ_in_is_not_their_budget(arguments):
    assert different(budget_of(config()), budget_of(config(*arguments))) == []


def test_other_rewards_and_rewards_with_other_settings_are_found():
    fewer = read_config(demo_config_path())
    del fewer["rewards"][0]
    assert [name for name, _, _ in different(budget_of(config()), budget_of(make_config(fewer)))] == [
        'reward "mini-aesthetic"'
    ]
    elsewhere = config("--rewards.0.settings.device", "cpu", "--rewards.1.url", "http://a:1")
    assert different(budget_of(config()), budget_of(elsewhere)) == []
    other = config("--rewards.0.settings.batch", "3")
    assert len(different(budget_of(config()), budget_of(other))) == 1


def test_where_and_how_fast_a_run_is_made_tells_nothing_apart():
    incidental = ("--seed", "3", "--threads", "2", "--checkpoint_every", "7", "--rollout.batch", "12")
    assert different(settings_of(config()), settings_of(config(*incidental, "--model.device", "cpu"))) == []
    assert different(settings_of(config()), settings_of(config("--optimizer.lr", "1e-3"))) == [
        ("optimizer.lr", 5e-4, 1e-3)
    ]


def test_evaluations_of_other_prompts_or_revisions_are_found():
    one = {"before": {"prompts": ["x"]}, "seeds": [1], "steps": 4, "guidance": 1.0, "revisions": {"a": "1", "b": "1"}}
    turned = one | {"revisions": {"b": "1", "a": "1"}}
    assert different(measured(one), measured(turned)) == []
    other = one | {"before": {"prompts": ["y"]}, "revisions": {"a": "2", "b": "1"}}
    assert {name for name, _, _ in different(measured(one), measured(other))} == {
        "held-out prompts",
        'revision of reward "a"',
    }


def test_a_refusal_names_what_differs_and_how_much_more():
    refuse([], "one", "other", "why")
    with pytest.raises(MarbleError) as caught:
        refuse([(f"s{i}", i, None) for i in range(8)], "one", "other", "they differ")
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["they differ:", "  s0: 0 in one, none in other"]
    assert lines[-1] == "  and 2 more"
