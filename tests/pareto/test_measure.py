"""Scores taken from real runs, and made where they lack: the same, bit for bit."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

from marble import MarbleError
from marble.pareto.measure import Measurer
from marble.pareto.points import plan_points
from marble.pareto.runs import read_sources
from marble.rewards import load_rewards

from ..rewards.running import serving
from .made import ALL, config_of
from .running import two_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("runs"))


def measurer_of(runs, out, *changes, **options):
    sources = read_sources(runs, changes).finished
    return Measurer(sources, out, **{name: options.pop(name) for name in ("anew",) if name in options}), plan_points(
        sources, **options
    )


def same_picture(one, other):
    return ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None


def test_what_runs_have_evaluated_is_what_would_be_made(runs, tmp_path):
    measurer, points = measurer_of(runs, tmp_path / "taken")
    taken = measurer.measure(points)
    measurer, points = measurer_of(runs, tmp_path / "made", anew=True)
    made = measurer.measure(points)
    assert [m.taken for m in taken] == [str(runs[i] / "evaluation.json") for i in (0, 0, 1)]
    assert not any(m.taken for m in made)
    for one, other in zip(taken, made, strict=True):
        assert torch.equal(one.evaluation.scores.nan_to_num(-1), other.evaluation.scores.nan_to_num(-1))
        assert one.evaluation.names == other.evaluation.names == ["aesthetic", "preference", "composition"]
        assert one.revisions == other.revisions
        for p in range(4):
            file = f"points/{one.point.file_name}/{p:03d}_0.png"
            assert same_picture(tmp_path / "taken" / file, tmp_path / "made" / file)
    assert not torch.equal(made[0].evaluation.scores.nan_to_num(-1), made[1].evaluation.scores.nan_to_num(-1))
    final = runs[1] / "samples" / "after" / "002_0.png"
    assert same_picture(tmp_path / "made" / "points" / points[2].file_name / "002_0.png", final)


def test_what_was_broken_off_goes_on_and_what_changed_is_made_again(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "run")
    measurer, points = measurer_of([copy], tmp_path / "front", scales=[0.5], checkpoints=True)
    assert [p.name for p in points] == ["base", "run", "run × 0.5", "run after 1 updates"]

    def stop(point):
        if point.kind == "scale":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measurer.measure(points, stop)
    files = [tmp_path / "front" / "points" / f"{point.file_name}.json" for point in points]
    assert [file.exists() for file in files] == [True, True, True, False]
    before = [file.stat().st_mtime_ns for file in files[:3]]
    found = measurer.measure(points)
    assert [file.stat().st_mtime_ns for file in files[:3]] == before
    assert len({tuple(m.evaluation.scores[:, 0].tolist()) for m in found}) == 4

    os.utime(copy / "lora" / "pytorch_lora_weights.safetensors", ns=(1, 1))
    again = measurer.measure(points)
    assert [file.stat().st_mtime_ns == old for file, old in zip(files, before, strict=False)] == [True, False, False]
    assert torch.equal(again[2].evaluation.scores.nan_to_num(-1), found[2].evaluation.scores.nan_to_num(-1))

    files[3].write_text(files[3].read_text()[:50])  # a file that cannot be read is made again
    measurer.measure(points)
    assert json.loads(files[3].read_text())["name"] == "run after 1 updates"


def test_of_fewer_prompts_those_in_common_are_taken(runs, tmp_path):
    measurer, points = measurer_of(runs, tmp_path, "--evaluation.prompts", "2")
    found = measurer.measure(points)
    whole = json.loads((runs[1] / "evaluation.json").read_text())["after"]
    order = [whole["names"].index(name) for name in found[2].evaluation.names]
    rows = [
        whole["scores"][2 * whole["prompts"].index(text) + i] for text in found[2].evaluation.prompts for i in (0, 1)
    ]
    expected = [[float("nan") if row[k] is None else row[k] for k in order] for row in rows]
    assert found[2].taken
    assert torch.equal(found[2].evaluation.scores.nan_to_num(-1), torch.tensor(expected).double().nan_to_num(-1))


def test_other_steps_are_made_anew(runs, tmp_path):
    measurer, points = measurer_of(runs[:1], tmp_path, "--evaluation.steps", "3")
    assert [m.taken for m in measurer.measure(points)] == ["", ""]


def test_a_served_reward_goes_by_the_name_that_its_server_tells(tmp_path):
    with serving(*load_rewards(ALL[:1])) as (url, _):
        config = config_of(ALL[1:], held_out_rewards=[f"{url}/served-aesthetic"])
        source = SimpleNamespace(config=config)
        assert Measurer([source], tmp_path).names == ["alignment", "text", "aesthetic"]


def test_weights_that_are_gone_are_named_before_anything_is_loaded(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(copy / "lora")
    measurer, points = measurer_of([copy], tmp_path / "front")
    assert len(measurer.measure(points)) == 2  # nothing has to be made
    measurer, points = measurer_of([copy], tmp_path / "front", scales=[2.0])
    with pytest.raises(MarbleError, match=r"there are no weights in .*lora"):
        measurer.measure(points)


def test_another_judge_is_refused(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "run")
    content = json.loads((copy / "evaluation.json").read_text())
    content["revisions"]["preference"] = "of yore"
    (copy / "evaluation.json").write_text(json.dumps(content))
    measurer, points = measurer_of([copy, runs[1]], tmp_path / "front")
    with pytest.raises(MarbleError, match=r'reward preference: "of yore" judged base.*--anew'):
        measurer.measure(points)


def test_the_base_of_a_run_that_went_on_from_a_lora_is_not_what_it_started_from(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "run")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("start: null", f"start: {runs[1] / 'lora'}"))
    measurer, points = measurer_of([copy], tmp_path / "front")
    assert [bool(m.taken) for m in measurer.measure(points)] == [False, True]
