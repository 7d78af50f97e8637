import json
import os
import shutil

import pytest

from marble import MarbleError
from marble.scoring import make_plan


def test_the_demo_is_for_its_own_model():
    plan = make_plan("mini", changes=["--evaluation.prompts", "6"])
    assert plan.config.rewards[0].reward == "mini-aesthetic"
    assert len(plan.prompts) == 6
    assert plan.evaluated.empty
    assert plan.against is None
    with pytest.raises(MarbleError, match='--config: give one for "owner/name"'):
        make_plan("owner/name")


def test_a_runs_own_config_counts_for_its_model_and_its_lora(untrained, small_config, small_lora, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small_config, run / "config.yaml")
    shutil.copytree(small_lora, run / "lora")
    plans = [make_plan(str(run)), *(make_plan(str(untrained), lora=str(lora)) for lora in (run, run / "lora"))]
    for plan in plans:
        assert plan.config.model.id == str(untrained)
        assert plan.evaluated.lora == str(run / "lora")
        assert plan.setup["against"] == "base"
        assert len(plan.prompts) == 7
        assert plan.setup["kinds"] == ["training", "training", "held-out"]


def test_what_a_run_was_trained_on_is_not_held_out_elsewhere(untrained, small_config, small_lora, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small_config, run / "config.yaml")
    shutil.copytree(small_lora, run / "lora")
    changes = ["--rewards", "[sharpness]", "--held_out_rewards", "[{reward: mini-text, settings: {batch: 4}}]"]
    plan = make_plan(str(run), config=small_config, changes=[*changes, "--evaluation.prompts", "4"])
    assert plan.setup["kinds"] == ["held-out", "training"]


def test_another_models_revision_is_forgotten(untrained, small_config):
    changes = ["--model.call", "{}"]
    text = small_config.read_text().replace(f"id: {untrained}", "id: owner/name\n  revision: abc\n  dtype: bfloat16")
    other = small_config.with_name("other.yaml")
    other.write_text(text)
    assert make_plan(str(untrained), config=other, changes=changes).setup["model"] == {
        **dict.fromkeys(["revision", "variant", "quantize"]),
        "id": str(untrained),
        "merge": [],
        "call": {},
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"portion": 0}, "--portion: at least 1 prompt, got 0"),
        ({"scale": 2.0}, "--scale: there is no LoRA to scale"),
        ({"scale": -1.0}, "--scale: must be above 0"),
        ({"against": "base"}, "--against: the base model would be compared with itself"),
        ({"against": "no/such/thing"}, '--against: "no/such/thing" is neither'),
        ({"lora": "no-such"}, '--lora: "no-such" is neither a file, a folder nor a hub id'),
        ({"lora": "."}, r'--lora: "." holds no .safetensors file'),
        ({"changes": ["--model.id", "x"]}, "--model.id: .* leave it out"),
        ({"changes": ["--evaluation.prompts", "0"]}, "evaluation.prompts: input should be .* got 0"),
        ({"changes": ["--evaluation.prompts", "2000"]}, "evaluation.prompts: 2000 asks for"),
        ({"changes": ["--rewards.0.reward", "mini-aesthetics"]}, 'Did you mean "mini-aesthetic"'),
        ({"changes": ["--prompts.0.source", "mini-place"]}, 'Did you mean "mini-places"'),
        ({"changes": ["--model.shard", "true"]}, "model.shard"),
        ({"changes": ["--prompts", "[{source: mini-places}]"]}, "text applies to no prompt"),
    ],
)
def test_mistakes_are_found_before_a_model_loads(plan_of, options, said):
    with pytest.raises(MarbleError, match=said):
        plan_of(**options)


def test_a_model_that_is_not_there(small_config):
    with pytest.raises(MarbleError, match='model "nothing" does not exist'):
        make_plan("nothing", config=small_config)


def test_an_unfinished_evaluation_is_no_reference(plan_of, tmp_path):
    (tmp_path / "setup.json").write_text("{}")
    with pytest.raises(MarbleError, match=r"--against: the evaluation in .* is unfinished"):
        plan_of(against=str(tmp_path))


def test_a_model_or_a_merged_lora_that_was_written_anew_is_another(untrained, small_config, small_lora, tmp_path):
    model, merged = (shutil.copytree(source, tmp_path / source.name) for source in (untrained, small_lora))
    changes = ["--model.merge", f"['{merged}']"]
    plans = [make_plan(str(model), config=small_config, changes=changes).setup]
    for folder in (merged, model):
        os.utime(next(folder.rglob("*.safetensors")), ns=(1, 1))
        plans.append(make_plan(str(model), config=small_config, changes=changes).setup)
    assert plans[0]["files"] != plans[1]["files"] != plans[2]["files"]
    assert plans[0] | {"files": []} == plans[2] | {"files": []}
    assert plans[0]["marble"]
    assert make_plan("mini").setup["files"] == []


def test_what_is_no_earlier_evaluation(plan_of, tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"before": {}}))
    for against in (file, tmp_path):
        with pytest.raises(MarbleError, match="is not what marble evaluate writes"):
            plan_of(against=str(against))
    file.write_text("{")
    with pytest.raises(MarbleError, match="cannot be read"):
        plan_of(against=str(file))
