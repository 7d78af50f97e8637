"""Rewards made of what a config says."""

import pytest
import torch

from marble import MarbleError, Reward
from marble.config import RewardUse, check_names, make_config
from marble.prompts import Record
from marble.rewards import check_rewards, load_rewards, make_reward, prepare_rewards, score_images

RECORDS = [Record("a", "s"), Record("bb", "s")]
IMAGES = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 2, 2)


def brightness(images):
    """How bright it is.

    More lines.
    """
    return images.float().mean(dim=(1, 2, 3))


def length(images, records, *, times: float = 1.0):
    return torch.tensor([times * len(record.text) for record in records])


def together(images, records):
    return torch.full((len(images),), float(len(images)))


together.groupwise = True
together.applies = lambda record: record.text == "bb"


def nothing():
    return 1


class Scaled(Reward):
    name = "scaled"

    def __init__(self, *, factor: float, kind: str = "plain"):
        self.factor, self.kind = factor, kind

    def score(self, images, records):
        return self.factor * images.float().mean(dim=(1, 2, 3))


class Refusing(Scaled):
    def __init__(self):
        raise ValueError("not today")


class Nameless(Reward):
    def score(self, images, records):
        return torch.zeros(len(images))


def guessing(images, records=None, *, times: float = 1.0):
    return torch.full((len(images),), -1.0 if records is None else times * len(records))


def use(attribute, /, **settings):
    return RewardUse(reward=f"{__name__}:{attribute}", settings=settings)


def scores(*uses):
    rewards = [make_reward(each) for each in uses]
    return score_images(rewards, IMAGES, RECORDS, torch.arange(2)).scores.tolist()


def test_functions_of_images_with_and_without_prompts():
    assert scores(use("brightness"), use("length"), use("length", times=2, name="twice")) == [[0, 1, 2], [255, 2, 4]]
    reward = make_reward(use("brightness"))
    assert (reward.name, reward.about) == ("brightness", "How bright it is.")


def test_records_are_given_though_they_have_a_default():
    assert scores(use("guessing", times=3)) == [[6], [6]]
    with pytest.raises(MarbleError, match='unknown setting "records"'):
        make_reward(use("guessing", records=1))


def test_a_module_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_rewards.py").write_text("def score(images:\n")
    with pytest.raises(MarbleError, match=r'cannot load reward "broken_rewards:score": SyntaxError'):
        make_reward(RewardUse(reward="broken_rewards:score"))


@pytest.mark.parametrize("settings", [{"x": float("inf")}, {"x": {1: 2}}, {"x": object()}, {"x": (1, 2)}])
def test_settings_are_what_a_config_can_hold(settings):
    with pytest.raises(MarbleError, match=r"rewards\.0\.settings: must be plain numbers, words, lists and mappings"):
        make_config(
            {"prompts": ["x"], "rewards": [{"reward": "a", "settings": settings}]} | {"prompts": [{"source": "x"}]}
        )


def test_all_that_is_wrong_with_settings_is_said_at_once():
    wrong = use("Scaled", fctor=2, batch=-1, timeout="soon", kind=3)
    with pytest.raises(MarbleError) as caught:
        load_rewards([wrong, "nowhere", use("Scaled", factor=True)])
    text = str(caught.value)
    for part in ("batch must be positive", "timeout: input should be", '"fctor". Did you mean "factor"', "kind: input"):
        assert part in text
    assert "settings.factor is required" in text
    assert 'unknown reward "nowhere"' in text
    assert "settings.factor: input should be a number, got True" in text


def test_a_class_without_a_name_has_its_own():
    assert make_reward(use("Nameless")).name == "Nameless"


def test_two_of_a_kind_are_told_apart_by_name():
    one, two = ({"reward": "judge", "settings": {"model": model, "name": model}} for model in ("a", "b"))
    prompts = [{"source": "x"}]
    config = make_config({"prompts": prompts, "rewards": [one], "held_out_rewards": [two]})
    assert [use.label for use in [*config.rewards, *config.held_out_rewards]] == ["a", "b"]
    with pytest.raises(MarbleError, match='"a" is given more than once; settings: '):
        make_config({"prompts": prompts, "rewards": [one, one]})
    with pytest.raises(MarbleError, match='held_out_rewards: "a" is also trained on'):
        make_config({"prompts": prompts, "rewards": [one], "held_out_rewards": [one]})


def test_a_served_reward_need_not_be_known_here():
    served = {"reward": "theirs", "url": "http://127.0.0.1:1"}
    check_names(make_config({"prompts": [{"source": "mini-words"}], "rewards": [served]}))
    with pytest.raises(MarbleError, match='unknown reward "theirs"'):
        check_names(make_config({"prompts": [{"source": "mini-words"}], "rewards": ["theirs"]}))


def test_a_reward_is_prepared_once():
    class Counting(Scaled):
        prepared_for = 0

        def prepare(self):
            self.prepared_for += 1

    reward = Counting(factor=1)
    prepare_rewards([reward])
    prepare_rewards([reward])
    assert reward.prepared_for == 1


def test_a_functions_attributes_count():
    reward = make_reward(use("together"))
    assert reward.groupwise
    assert score_images([reward], IMAGES, RECORDS, torch.zeros(2)).wanted.tolist() == [[False], [True]]


def test_settings_reach_the_constructor_and_the_contract():
    reward = make_reward(use("Scaled", factor="2", batch=7, workers=2, timeout=3, name="mine"))
    assert (reward.factor, reward.batch, reward.workers, reward.timeout, reward.name) == (2.0, 7, 2, 3.0, "mine")
    assert reward.settings == {"factor": "2", "batch": 7, "workers": 2, "timeout": 3, "name": "mine"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (use("Scaled"), 'Scaled": settings.factor is required'),
        (use("Scaled", factor=1, fctor=2), 'unknown setting "fctor". Did you mean "factor"? Known: factor, kind, name'),
        (use("Scaled", factor="much"), "settings.factor: input should be a valid number, unable to parse"),
        (use("Scaled", factor=1, kind=3), "settings.kind: input should be a valid string, got 3"),
        (use("Scaled", factor=1, batch=0), "settings.batch must be positive and at most 100000, got 0"),
        (use("Scaled", factor=1, workers=-1), "settings.workers must be positive and at most 64, got -1"),
        (use("Scaled", factor=1, workers=1000), "settings.workers must be positive and at most 64, got 1000"),
        (
            use("Scaled", factor=1, timeout=1e12),
            "settings.timeout must be positive and at most 1000000, got 1000000000000.0",
        ),
        (use("Scaled", factor=1, name=""), "settings.name must not be empty"),
        (use("Refusing"), 'Refusing" cannot be made: ValueError: not today'),
        (RewardUse(reward=".own:ok"), 'cannot load reward ".own:ok": TypeError'),
        (use("Scaled", factor=1, timeout="soon"), "settings.timeout: input should be a valid number"),
        (use("brightness", times=2), 'unknown setting "times"'),
        (use("nothing"), "(images) or (images, records), and settings with defaults; this one takes 0"),
        (use("RECORDS"), "is no reward: it has no name, applies, score"),
        (use("Nowhere"), "cannot load reward"),
    ],
)
def test_what_cannot_be_made(given, message):
    with pytest.raises(MarbleError) as caught:
        make_reward(given)
    assert message in str(caught.value)


def test_all_that_cannot_be_used_are_listed():
    class Wanting(Scaled):
        def check(self):
            raise MarbleError("wants more")

        def prepare(self):
            raise FileNotFoundError("weights")

    one, two = Wanting(factor=1), Wanting(factor=1)
    one.name, two.name = "one", "two"
    with pytest.raises(MarbleError, match=r"cannot be used:\n  reward one: wants more\n  reward two: wants more"):
        check_rewards([one, Scaled(factor=1), two])
    with pytest.raises(MarbleError, match=r"reward one: prepare\(\) fails: FileNotFoundError: weights"):
        prepare_rewards([one])


def test_shorthands_of_a_config():
    assert RewardUse.model_validate("pickscore") == RewardUse(reward="pickscore")
    assert RewardUse.model_validate({"reward": "x", "url": "http://a:1"}).url == ["http://a:1"]
