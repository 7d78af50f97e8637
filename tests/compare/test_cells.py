"""What the crew knows of cells, and the comparison's folder. Real cells are made in tests/cli/test_compare.py."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from marble.compare.arms import parse_arms
from marble.compare.cells import Crew, Place, Work, _changes, _error, choose_place, last_metrics
from marble.compare.folder import Comparison
from marble.compare.results import gather
from marble.config import demo_config_path, make_config, read_config
from marble.errors import MarbleError
from marble.overrides import override
from marble.run import Run

LABELS = ["mini-aesthetic", "mini-alignment", "mini-preference", "mini-text", "mini-composition"]


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path / "c", read_config(demo_config_path()), ["text"], ["diversity"])


def test_a_comparison_comes_back_with_more_arms_and_seeds(tmp_path):
    comparison = Comparison.open(tmp_path / "c", read_config(demo_config_path()))
    assert comparison.training == ["aesthetic", "alignment", "preference", "text", "composition"]
    assert comparison.held_out == ["diversity", "second-alignment"]
    comparison.add(parse_arms(["marble", "gentle=marble:balance.refresh=5"], LABELS), [0, 1])
    comparison.save()
    again = Comparison.open(comparison.path, None)
    assert (again.arms, again.seeds) == (comparison.arms, comparison.seeds)
    cells = again.add(parse_arms(["marble", "specialist:mini-text"], LABELS), [1, 2])
    assert [cell.folder.name for cell in cells] == [
        "marble-1",
        "marble-2",
        "specialist.mini-text-1",
        "specialist.mini-text-2",
    ]
    assert again.seeds == {"marble": [0, 1, 2], "gentle": [0, 1], "specialist:mini-text": [1, 2]}
    assert len(again.cells()) == 7
    assert cells[1].config.seed == 2


def test_other_configurations_are_refused_by_name(comparison):
    comparison.save()
    values = read_config(demo_config_path())
    values["budget"]["updates"] = 90
    values["optimizer"]["lr"] = 1e-3
    with pytest.raises(MarbleError) as caught:
        Comparison.open(comparison.path, values)
    assert "another configuration" in str(caught.value)
    assert "budget.updates: 90 in this call, 180 in" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def test_where_and_how_fast_to_run_is_taken_over(comparison):
    comparison.save()
    given = ["--rewards.2.url", "http://a:1", "--rollout.batch", "6", "--seed", "5"]
    values = override(read_config(demo_config_path()), given)
    known = Comparison.open(comparison.path, values)
    assert known.config.rewards[2].url == ["http://a:1"]
    assert known.config.rollout.batch == 6
    assert known.config.seed == 0  # cells have their own
    known.save()
    again = Comparison.open(comparison.path, None).config
    assert again == known.config
    unsaid = Comparison.open(comparison.path, {k: v for k, v in values.items() if k != "seed"}).config
    assert unsaid == known.config


def test_a_broken_cell_goes_on_where_and_as_fast_as_is_said_now(comparison):
    (cell,) = comparison.add(parse_arms(["marble"], LABELS), [3])
    Run.create(cell.folder, cell.config)
    override(comparison.values, ["--rollout.batch", "6", "--rewards.2.url", "http://a:1", "--diagnose_every", "3"])
    now = comparison.cell("marble", 3)
    assert now.strayed() == ""
    assert _changes(now, 2) == ["--rewards.2.url", '["http://a:1"]', "--rollout.batch", "6", "--threads", "2"]
    assert make_config(override(cell.config.model_dump(mode="json"), _changes(now, 2))).rollout.batch == 6


def test_a_run_of_another_configuration_stands_for_no_cell_and_is_kept(comparison):
    strange, gone = comparison.add(parse_arms(["marble"], LABELS), [0, 1])
    comparison.save()
    Run.create(strange.folder, make_config(override(strange.config.model_dump(mode="json"), ["--optimizer.lr", "1"])))
    (strange.folder / "evaluation.json").write_text('{"after": {}}')
    gone.folder.mkdir()
    (gone.folder / "config.yaml").write_text("other: setting")
    assert "optimizer.lr: 1.0 in its run, 0.0005 in the comparison" in strange.strayed()
    with Crew(comparison.path, Place(1, 1, [])) as crew:
        assert crew.make([strange, gone], lambda *_: pytest.fail("a process was started"))
    found = gather(comparison)
    assert found.done == {"marble": {}}
    assert [cell["status"] for cell in found.cells["marble"].values()] == ["failed", "failed"]
    assert found.cells["marble"][0]["error"] == strange.strayed()
    assert "other: unknown setting" in found.cells["marble"][1]["error"]
    assert (strange.folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("fast=marble:budget.updates=90", 'budget.updates: 90 in arm "fast", 180 in the comparison'),
        ("few=marble:rollout.group_size=6", "rollout.group_size: 6"),
        ("easy=marble:evaluation.prompts=27", "evaluation.prompts: 27"),
        ("other=marble:held_out_rewards=[]", 'reward "mini-diversity"'),
        ("typo=marble:balance.refrsh=5", 'Did you mean "refresh"?'),
    ],
)
def test_arms_under_another_budget_are_refused_by_name(comparison, arm, message):
    with pytest.raises(MarbleError) as caught:
        comparison.add(parse_arms([arm], LABELS), [0])
    assert message in str(caught.value)


def test_a_name_keeps_its_meaning_and_its_folder(comparison):
    comparison.add(parse_arms(["mine=marble:balance.refresh=5"], LABELS), [0])
    with pytest.raises(MarbleError, match="give it another name"):
        comparison.add(parse_arms(["mine=marble:balance.refresh=6"], LABELS), [0])
    (long,) = comparison.add(parse_arms(["é" * 300 + "=gdpo"], LABELS), [0])
    (other,) = comparison.add(parse_arms(["é" * 301 + "=uniform"], LABELS), [0])
    assert not long.done
    assert len(long.beside(".json").name.encode()) < 120
    assert long.folder != other.folder
    with pytest.raises(MarbleError, match="would have the same folder"):
        comparison.add(parse_arms(["a b=gdpo", "a.b=uniform"], LABELS), [0])


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MarbleError, match="holds something else than a comparison"):
        Comparison.open(tmp_path, read_config(demo_config_path()))
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump({"arms": {}}))
    with pytest.raises(MarbleError, match="not what marble compare writes"):
        Comparison.open(tmp_path, None)


def test_places():
    config = make_config(read_config(demo_config_path()) | {"model": {"id": "mini", "device": "cpu"}})
    assert choose_place(config, 3, 2) == Place(3, 2, [])
    assert choose_place(config, None, 10_000).jobs == 1
    assert choose_place(config, None, None).threads == 1
    config.model.device = "cuda:1"
    assert choose_place(config, None, 2) == Place(1, 2, [])


def test_the_last_whole_line_of_the_metrics_counts(tmp_path):
    assert last_metrics(tmp_path) == {}
    rows = [json.dumps({"update": i, "time": {"elapsed": 60.0 * i}, "filler": "x" * 30_000}) for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"update": 4, "ti')
    assert last_metrics(tmp_path)["update"] == 3


@pytest.fixture
def work(comparison):
    (cell,) = comparison.add(parse_arms(["marble"], LABELS), [0])
    comparison.save()
    cell.folder.mkdir()
    return Work(cell, subprocess.Popen([sys.executable, "-c", ""]), 0, 0, time.monotonic())


def test_how_far_a_cell_is(work):
    work.process.wait()
    assert work.share() == (0, 0.0)
    (work.cell.folder / "metrics.jsonl").write_text('{"update": 45, "time": {"elapsed": 60.0}}\n')
    assert work.share() == (45, 0.25)


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        ("loading …\nmarble: rewards: no such thing;\n  mend it\n", 2, "rewards: no such thing; mend it"),
        ("Traceback (most recent call last):\n  …\nValueError: odd\n", 1, "ValueError: odd"),
        ("", 3, "ended with exit code 3"),
        ("update 10\n", -9, "ended by signal 9 (SIGKILL); memory may have run out"),
    ],
)
def test_what_a_broken_cell_says(work, log, code, error):
    work.process.wait()
    before = "marble: an error of an earlier attempt\n"
    work.cell.beside(".log").write_text(before + log)
    work.log_start = len(before.encode())
    assert _error(work, code) == error


def test_two_crews_do_not_work_in_one_folder(comparison):
    comparison.save()
    with Crew(comparison.path, Place(1, 1, [])), pytest.raises(MarbleError, match="another marble compare is at work"):
        Crew(comparison.path, Place(1, 1, [])).__enter__()
    with Crew(comparison.path, Place(1, 1, [])) as crew:
        assert crew.make([], lambda *_: None)
