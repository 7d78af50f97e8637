"""The real thing on the tiny pipeline: broken off, gone on with, shared by two processes, refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marble import MarbleError, Policy, evaluate
from marble.rewards import load_rewards
from marble.scoring import score
from marble.scoring.folder import Folder
from marble.seeds import derive

from .other_process import PATIENCE, scored

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def whole(untrained, small_config, small_lora, tmp_path_factory):
    """The folder of an evaluation of a LoRA against the base, made in one go."""
    from marble.scoring import make_plan

    out = tmp_path_factory.mktemp("whole") / "out"
    score(make_plan(str(untrained), config=small_config, lora=str(small_lora), portion=3), out)
    return out


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scores_are_those_of_evaluate(whole, untrained, plan_of, small_lora, tmp_path):
    plan = plan_of(portion=7, lora=str(small_lora), against="none")
    content = score(plan, tmp_path / "one")
    assert content == read(tmp_path / "one")
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12})
    policy.load_lora(small_lora)
    rewards = load_rewards(["mini-aesthetic", "mini-text", "sharpness"])
    seeds = [derive(0, "evaluation", i) % 2**32 for i in range(2)]
    direct = evaluate(policy, rewards, plan.prompts, seeds=seeds, steps=2, adapter=None)
    names = content["evaluated"]["names"]
    assert names == ["aesthetic", "text", "sharpness", "diversity"]
    rows = [row[:3] for row in content["evaluated"]["scores"]]
    assert rows == direct.to_json()["scores"]
    in_portions = torch.tensor([row[0] for row in read(whole)["evaluated"]["scores"]])
    torch.testing.assert_close(in_portions, torch.tensor([row[0] for row in rows]), atol=1e-4, rtol=0)


def test_what_stands_in_the_result(whole):
    content = read(whole)
    assert [row["kind"] for row in content["rewards"].values()] == ["training", "training", "held-out", "held-out"]
    aesthetic, text = content["rewards"]["aesthetic"], content["rewards"]["text"]
    assert (aesthetic["prompts"], aesthetic["pairs"], text["prompts"], text["pairs"]) == (7, 7, 3, 3)
    assert aesthetic["accuracy"] is None
    assert (text["accuracy_above"], text["accuracy"]["value"]) == (1.0, 0.0)
    sides = [content[side]["means"]["sharpness"] for side in ("evaluated", "reference")]
    found = content["rewards"]["sharpness"]
    assert [found["mean"]["value"], found["reference"]["value"]] == pytest.approx(sides)
    assert found["difference"]["value"] == pytest.approx(sides[0] - sides[1])
    assert found["difference"]["value"] != 0
    assert content["rewards"]["diversity"]["mean"]["value"] > 0
    assert content["setup"]["revisions"]["diversity"] == "distance-1"
    assert len(list((whole / "samples" / "reference").glob("*.png"))) == 14
    assert not list(whole.rglob("*.part"))


def test_broken_off_at_any_time_it_ends_in_the_same_files(whole, plan_of, small_lora, tmp_path):
    plan, out = plan_of(lora=str(small_lora)), tmp_path / "out"
    for stop in (0, 2, 4):  # before the first portion, within each side

        def interrupt(done, total, stop=stop):
            assert total == 6
            if done > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score(plan, out, interrupt)
        assert len(list((out / "parts").iterdir())) == stop + 1
    score(plan, out)
    assert files(out) == files(whole)


def test_a_lost_part_is_made_again_and_a_finished_folder_left_alone(whole, plan_of, small_lora, tmp_path):
    plan, out = plan_of(lora=str(small_lora)), shutil.copytree(whole, tmp_path / "out")
    told = []
    assert score(plan, out, lambda *progress: told.append(progress)) == read(whole)
    assert told == []
    (out / "evaluation.json").unlink()
    (out / "parts" / "evaluated_001.json").unlink()
    (out / "parts" / "reference_002.json").write_text('{"names": [')
    score(plan, out, lambda *progress: told.append(progress))
    assert told == [(2, 6), (3, 6), (5, 6), (6, 6)]
    assert files(out) == files(whole)


def test_another_evaluation_in_the_folder_is_refused(whole, plan_of, small_lora, tmp_path):
    for options, said in (
        ({"changes": ["--evaluation.steps", "3"]}, "steps: 2 there, 3 here"),
        ({"changes": ["--evaluation.images", "3"]}, "seeds: 2 there, 3 here"),
        ({"portion": 2}, "portion: 3 there, 2 here"),
        ({"scale": 2.0}, "lora.scale: 1.0 there, 2.0 here"),
        ({"against": "none"}, 'against: "base" there, "none" here'),
    ):
        with pytest.raises(MarbleError, match=f"holds another evaluation(.|\n)*{said}"):
            score(plan_of(**{"lora": str(small_lora), **options}), whole)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(MarbleError, match="exists and is not empty"):
        score(plan_of(), tmp_path)


def test_portions_judged_by_another_revision_are_not_gone_on_with(whole, plan_of, small_lora, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "evaluation.json").unlink()
    setup = out / "setup.json"
    setup.write_text(setup.read_text().replace('"sharpness": "1"', '"sharpness": "0"'))
    with pytest.raises(MarbleError, match=r'revisions\.sharpness: "0" there, "1" here'):
        score(plan_of(lora=str(small_lora)), out)


def test_an_earlier_evaluation_as_reference(whole, plan_of, small_lora, tmp_path):
    score(plan_of(), tmp_path / "base")
    content = score(plan_of(lora=str(small_lora), against=str(tmp_path / "base")), tmp_path / "out")
    assert content["rewards"] == read(whole)["rewards"]
    file = tmp_path / "base" / "evaluation.json"
    for changes, said in (
        (["--evaluation.prompts", "8"], "prompts: 7 there, 8 here"),
        (["--evaluation.guidance", "2"], "guidance: 1.0 there, 2.0 here"),
        (["--held_out_rewards", "[]"], "rewards: 3 there, 2 here"),
    ):
        with pytest.raises(MarbleError, match=f"cannot be compared with(.|\n)*{said}"):
            plan_of(lora=str(small_lora), against=str(file), changes=changes)
    file.write_text(file.read_text().replace('"sharpness": "1"', '"sharpness": "0"'))
    with pytest.raises(MarbleError, match=r'revisions\.sharpness: "0" there, "1" here'):
        score(plan_of(lora=str(small_lora), against=str(file)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_portion_that_a_reward_does_not_answer_for_is_not_kept(plan_of, tmp_path, monkeypatch):
    (tmp_path / "fragile_reward.py").write_text(
        "from pathlib import Path\n"
        f"BROKEN = Path({str(tmp_path)!r}) / 'broken'\n"
        "def calm(images):\n"
        "    if BROKEN.exists():\n"
        "        raise ValueError('no')\n"
        "    return images.float().mean(dim=(1, 2, 3))\n"
        "calm.accuracy_above = 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan, out = plan_of(changes=["--held_out_rewards", "['fragile_reward:calm']"]), tmp_path / "out"

    def breaks(done, total):
        if done == 1:
            (tmp_path / "broken").touch()

    with pytest.raises(MarbleError, match="no score of calm for any picture of a portion"):
        score(plan, out, breaks)
    assert [path.name for path in (out / "parts").iterdir()] == ["evaluated_000.json"]
    (tmp_path / "broken").unlink()
    calm = score(plan, out)["rewards"]["calm"]
    assert (calm["prompts"], calm["accuracy"]["value"]) == (7, 1.0)


def test_an_answer_without_a_number_is_missing_and_the_evaluation_ends(plan_of, tmp_path, monkeypatch):
    (tmp_path / "mute_reward.py").write_text(
        "def mute(images):\n    light = images.float().mean(dim=(1, 2, 3))\n    return light.fill_(float('nan'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = ["--held_out_rewards", "['mute_reward:mute']", "--evaluation.prompts", "4"]
    found = score(plan_of(changes=changes), tmp_path / "out")["rewards"]["mute"]
    assert (found["prompts"], found["missing"], found["mean"]) == (0, 8, None)


def test_a_folder_begun_and_broken_off_is_gone_on_with(whole, plan_of, small_lora, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(whole / "setup.json", tmp_path / "out")
    folder = Folder(tmp_path / "out")
    plan = plan_of(lora=str(small_lora))
    assert folder.enter(plan.setup) is None
    folder.begin(json.loads((whole / "setup.json").read_text()))
    assert (tmp_path / "out" / "parts").is_dir()


def test_a_lora_of_another_model_is_refused(plan_of, tmp_path):
    from safetensors.torch import save_file

    weights = {f"transformer.no.such.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(MarbleError, match=r"--lora: .*(another model|does not fit|belongs)"):
        score(plan_of(lora=str(tmp_path), against="none"), tmp_path / "out")


def test_two_processes_write_what_one_does(whole, untrained, small_config, small_lora, tmp_path):
    given = [str(path) for path in (tmp_path, untrained, small_config, small_lora)]
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    other = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.scoring.other_process", *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        scored(0, *given)
        _, errors = other.communicate(timeout=PATIENCE)
    except Exception as error:
        other.kill()
        raise AssertionError(f"the other process said: {other.communicate()[1]}") from error
    finally:
        other.kill()
        del os.environ["GLOO_SOCKET_IFNAME"]
    assert other.returncode == 0, errors
    assert files(tmp_path / "0") == files(whole)
    assert not (tmp_path / "1").exists()  # the main process alone writes
