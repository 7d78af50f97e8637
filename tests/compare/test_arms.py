"""Arms: what their names stand for, and the configuration of their cells."""

import pytest

from marble.catalogue import ARMS, METHODS
from marble.compare.arms import Arm, configure, parse_arms, remarks
from marble.compare.sameness import budget_of, different
from marble.config import demo_config_path, make_config, read_config
from marble.errors import MarbleError

LABELS = ["mini-aesthetic", "mini-text", "my_rewards:calm"]


@pytest.fixture
def demo():
    return read_config(demo_config_path())


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("marble", Arm("marble", {"balance.method": "marble"})),
        ("plain=weighted-sum", Arm("plain", {"balance.method": "weighted-sum"})),
        (
            "gentle=marble:balance.refresh=5,optimizer.betas=[0.9, 0.99],optimizer.lr=1e-4",
            Arm(
                "gentle",
                {
                    "balance.method": "marble",
                    "balance.refresh": 5,
                    "optimizer.betas": [0.9, 0.99],
                    "optimizer.lr": 1e-4,
                },
            ),
        ),
        ("specialist:mini-text", Arm("specialist:mini-text", {"balance.method": "weighted-sum"}, "mini-text")),
        (
            "one=specialist:my_rewards:calm:optimizer.lr=1",
            Arm("one", {"balance.method": "weighted-sum", "optimizer.lr": 1}, "my_rewards:calm"),
        ),
    ],
)
def test_what_a_name_stands_for(text, arm):
    assert parse_arms([text], LABELS) == [arm]


def test_an_arm_without_a_name_is_called_what_it_is():
    assert parse_arms(["marble:balance.refresh=5"], LABELS)[0].name == "marble:balance.refresh=5"


def test_specialists_are_one_of_each():
    assert [arm.specialist for arm in parse_arms(["specialists"], LABELS)] == LABELS


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["marbel"], 'unknown "marbel". Did you mean "marble"?'),
        (["specialist:mini-tex"], 'no training reward "mini-tex" for a specialist. Did you mean "mini-text"?'),
        (["marble", "marble"], "marble given more than once"),
        (["marble", "same=marble"], '"marble" and "same" are the same arm'),
        (["x="], "expected BASE"),
        (["marble:refresh"], 'expected setting=value after the colon, got "refresh"'),
        (["marble:seed=3"], "seed is not an arm's to set, got 3; use --seeds"),
        (["marble:optimizer.lr=1e-4,threads=2"], "threads is not an arm's to set, got 2; use --threads"),
        (["marble:balance.refresh=@"], "balance.refresh: cannot read the value '@'"),
    ],
)
def test_mistakes_are_named(texts, message):
    with pytest.raises(MarbleError) as caught:
        parse_arms(texts, LABELS)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [*METHODS, *ARMS, "specialists"])
def test_every_named_arm_has_the_demos_budget(name, demo):
    base = make_config(demo)
    for arm in parse_arms([name], [term.label for term in base.rewards]):
        config = configure(demo, arm, seed=7)
        assert config.seed == 7
        assert different(budget_of(config), budget_of(base)) == []


def test_a_method_starts_from_its_own_presets_and_the_configs_own_keeps_its_settings(demo):
    demo["balance"] = {"method": "marble", "refresh": 1, "smooth": "gram", "decay": 0.9}
    kept = configure(demo, *parse_arms(["marble"], []), seed=0).balance
    assert (kept.refresh, kept.smooth) == (1, "gram")
    published = configure(demo, *parse_arms(["published"], []), seed=0).balance
    assert (published.refresh, published.smooth, published.norms) == (10, "weights", "raw")


def test_ppo_has_its_own_clip_and_divergence_and_keeps_the_geometry(demo):
    assert demo["objective"]["kl"] == 0.0
    config = configure(demo, *parse_arms(["ppo"], []), seed=0)
    preset = make_config(demo | {"objective": {"name": "ppo", "timesteps": 3}}).objective
    assert (config.objective.kl, config.objective.clip) == (preset.kl, preset.clip)
    assert preset.kl > 0
    assert (config.objective.timesteps, config.rollout.scheduler) == (demo["objective"]["timesteps"], "sde")
    assert configure(demo, *parse_arms(["awm"], []), seed=0).objective.kl == 0.0


def test_a_specialist_trains_on_one_reward_and_holds_the_others_out(demo):
    demo["rewards"][0]["weight"] = 3.0
    arm = Arm("s", {"balance.method": "weighted-sum"}, "mini-text")
    config = configure(demo, arm, seed=0)
    assert [term.label for term in config.rewards] == ["mini-text"]
    assert len(config.held_out_rewards) == 6
    assert [use.label for use in config.held_out_rewards][:2] == ["mini-aesthetic", "mini-alignment"]


def test_settings_that_do_not_fit_say_whose_they_are(demo):
    (arm,) = parse_arms(["odd=weighted-sum:balance.smooth=gram"], [])
    with pytest.raises(MarbleError, match='arm "odd" is not valid'):
        configure(demo, arm, seed=0)


def test_a_solve_on_the_only_micro_batch_is_remarked(demo):
    first, smaller = parse_arms(["published-first", "published-first:optimizer.micro_batch=9"], [])
    given = make_config(demo)
    (told,) = remarks(given, first, configure(demo, first, 0))
    assert "72 visits are one micro-batch" in told
    assert remarks(given, smaller, configure(demo, smaller, 0)) == []


@pytest.mark.parametrize("wish", [{"floor": True}, {"priority": 2.0}])
@pytest.mark.parametrize("name", ["ppo", "weighted-sum", "published"])
def test_what_a_method_does_not_know_is_left_out_and_remarked(demo, wish, name):
    demo["rewards"][0] |= wish
    (arm,) = parse_arms([name], [])
    config = configure(demo, arm, seed=0)
    assert (config.rewards[0].floor, config.rewards[0].priority) == (False, 1.0)
    word = "floors" if "floor" in wish else "priorities"
    assert f"knows no {word}; the rewards' are left out" in remarks(make_config(demo), arm, config)[0]
    (known,) = parse_arms(["closed-loop"], [])
    kept = configure(demo, known, seed=0)
    assert (kept.rewards[0].floor, kept.rewards[0].priority) == (wish.get("floor", False), wish.get("priority", 1.0))
    assert remarks(make_config(demo), known, kept) == []
