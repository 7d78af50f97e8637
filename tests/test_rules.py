"""The rules between settings of the model: each names the field, the reason, and what would do."""

import pytest

from marble import MarbleError
from marble.config import make_config
from marble.rules import RESERVED_CALL


@pytest.fixture(params=[True, False], ids=["with bitsandbytes", "without"])
def bitsandbytes(request, monkeypatch):
    """Whether the extra is there."""
    import importlib.util

    find = importlib.util.find_spec

    def find_spec(name, *rest):
        if name == "bitsandbytes":
            return object() if request.param else None
        return find(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    return request.param


def config_with(**sections):
    return make_config({"prompts": [{"source": "x"}], "rewards": [{"reward": "r"}], **sections})


def complaints(**sections):
    """The broken rules, one a line."""
    with pytest.raises(MarbleError) as caught:
        config_with(**sections)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


EXTRA = 'needs bitsandbytes: pip install "marble-diffusion[quantize]"'


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_need_the_extra_and_stay_as_they_are(bitsandbytes, bits):
    lacking = [] if bitsandbytes else [f"model.quantize: {EXTRA}"]
    if bitsandbytes:
        assert config_with(model={"quantize": bits}).model.quantize == bits
    else:
        assert complaints(model={"quantize": bits}) == lacking
    full = f"model.train: quantised weights cannot be trained, got full with quantize = {bits}"
    assert complaints(model={"quantize": bits, "train": "full"}) == [full, *lacking]
    merged = f"model.merge: quantised weights cannot be added to, got quantize = {bits}"
    assert complaints(model={"quantize": bits, "merge": ["a"]}) == [merged, *lacking]
    assert complaints(model={"quantize": bits, "merge": ["a"], "train": "full"}) == [full, merged, *lacking]


def test_the_small_optimiser_needs_the_extra(bitsandbytes):
    if bitsandbytes:
        assert config_with(optimizer={"name": "adamw-8bit"}).optimizer.name == "adamw-8bit"
    else:
        assert complaints(optimizer={"name": "adamw-8bit"}) == [f"optimizer.name: {EXTRA}"]


def test_all_weights_do_not_go_on_from_a_lora():
    found = complaints(model={"train": "full", "lora": {"start": "some/lora"}})
    assert found == ["model.lora.start: with train = full merge it instead: model.merge: [some/lora]"]
    assert config_with(model={"train": "full", "merge": ["some/lora"]}).model.merge == ["some/lora"]
    assert config_with(model={"lora": {"start": "some/lora"}, "merge": ["b"]}).model.lora.start == "some/lora"


@pytest.mark.parametrize("name", RESERVED_CALL)
def test_arguments_that_training_sets_itself(name):
    assert complaints(model={"call": {name: 1}}) == [f"model.call: {name} is set by other settings; leave it out"]


def test_stages_are_of_rewards_that_there_are_and_of_sequential_alone():
    stages = [{"rewards": ["nobody"]}]
    found = complaints(balance={"method": "sequential", "stages": stages}, budget={"updates": 4})
    assert len(found) == 1
    assert found[0].startswith('balance.stages.0.rewards: "nobody" is not a training reward; those are ')
    found = complaints(balance={"stages": [{"rewards": ["a"]}]}, budget={"updates": 4})
    assert found[0] == "balance.stages: only sequential has stages, got balance.method = marble"
    found = complaints(balance={"method": "sequential"}, budget={"updates": None, "minutes": 1})
    assert found == ["balance.method: sequential divides budget.updates, which must be given"]
    found = complaints(balance={"method": "sequential"}, budget={"updates": 1}, rewards=[{"reward": r} for r in "ab"])
    begin = "balance.stages: each lasts an epoch, optimizer.updates_per_epoch = "
    assert found == [f"{begin}1 updates, or longer, got 1, 0; use budget.updates = 2, or other shares"]
    uneven = {"method": "sequential", "stages": [{"rewards": ["r"], "share": 3}, {"rewards": ["r"]}]}
    found = complaints(balance=uneven, budget={"updates": 12}, optimizer={"updates_per_epoch": 4})
    wanted = "use budget.updates = 16 or optimizer.updates_per_epoch = 3, or other shares"
    assert found == [f"{begin}4 updates, or longer, got 9, 3; {wanted}"]
    for updates, each in ((16, 4), (12, 3)):
        config_with(balance=uneven, budget={"updates": updates}, optimizer={"updates_per_epoch": each})


def test_ppo_is_not_trained_with_what_other_objectives_start_from():
    written = config_with().model_dump(mode="json")
    written["objective"]["name"] = "ppo"
    found = complaints(**written)
    assert [line.split(":")[0] for line in found] == ["objective.clip", "objective.old"]
    assert "less than 1, got 1.0; its authors use 1e-4, with objective.kl = 0.04" in found[0]
    assert "got slope = 0.001 and limit = 0.5; its authors use slope = 0 and limit = 0" in found[1]
    dumped = config_with(objective={"name": "ppo"})
    assert config_with(**dumped.model_dump(mode="json")) == dumped
    config_with(objective={"name": "ppo", "old": {"slope": 0.0, "limit": 0.5}})


def test_all_broken_rules_at_once():
    found = complaints(
        model={"call": {"prompt": "a", "height": 64, "generator": 1}, "train": "full", "lora": {"start": "a/b"}},
        rollout={"steps": 3},
        objective={"timesteps": 3},
        budget={"updates": None},
    )
    assert len(found) == 5
    assert [line.split(":")[0] for line in found] == [
        "model.call",
        "model.call",
        "model.lora.start",
        "objective.timesteps",
        "budget",
    ]


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("model", {"quantize": "2bit"}, "model.quantize: input should be '8bit' or '4bit', got '2bit'"),
        ("model", {"train": "all"}, "model.train: input should be 'lora' or 'full', got 'all'"),
        ("model", {"dtype": "fp16"}, "model.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'fp16'"),
        ("model", {"offload": "vae"}, "model.offload: input should be 'text' or 'all', got 'vae'"),
        ("model", {"lora": {"rank": 0}}, "model.lora.rank: input should be greater than or equal to 1, got 0"),
        ("model", {"lora": {"targets": []}}, "model.lora.targets: list should have at least 1 item"),
        ("rollout", {"scheduler": "dmp++"}, 'rollout.scheduler: "dmp++" is not one of own, dpm++, euler, ddim'),
        ("rollout", {"judged_frames": 0}, "rollout.judged_frames: input should be greater than or equal to 1, got 0"),
        ("optimizer", {"name": "sgd"}, "optimizer.name: input should be 'adamw' or 'adamw-8bit', got 'sgd'"),
    ],
)
def test_values_that_there_are_not(section, value, message):
    assert any(line.startswith(message) for line in complaints(**{section: value}))
