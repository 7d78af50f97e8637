"""Which runs are taken, called what, and which are refused together."""

import pytest

from marble import MarbleError
from marble.pareto.runs import read_sources

from .made import comparison, made_run


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    folders = [made_run(tmp_path / name, seed=i) for i, name in enumerate(["a/run", "b/run", "c"])]
    assert [s.label for s in read_sources(folders[:1]).finished] == ["run"]
    assert [s.label for s in read_sources(folders[:2]).finished] == ["a/run", "b/run"]
    found = read_sources(folders).finished
    assert len({s.label for s in found}) == 3
    assert [s.config.seed for s in found] == [0, 1, 2]


def test_a_comparison_s_cells(tmp_path):
    for name in ("sum-0", "sum-1", "marble-0"):
        made_run(tmp_path / "cells" / name)
    folder = comparison(
        tmp_path,
        {
            "sum": {"0": ("done", "cells/sum-0"), "1": ("done", "cells/sum-1")},
            "marble": {"0": ("done", "cells/marble-0"), "1": ("failed", "cells/marble-1")},
        },
    )
    found = read_sources([folder])
    assert [(s.label, s.method) for s in found.finished] == [
        ("sum seed 0", "sum"),
        ("sum seed 1", "sum"),
        ("marble seed 0", "marble"),
    ]
    assert found.left_out == {"marble seed 1": "failed in the comparison"}


def test_of_one_seed_the_arms_names_do(tmp_path):
    made_run(tmp_path / "cell")
    folder = comparison(tmp_path, {"sum": {"0": ("done", "cell")}})
    other = made_run(tmp_path / "other")
    assert [s.label for s in read_sources([folder, other]).finished] == ["sum", "other"]


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": {}}'])
def test_a_broken_comparison_is_said_to_be_none(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(MarbleError, match="comparison"):
        read_sources([tmp_path])


def test_unfinished_runs_are_named_and_left_out(tmp_path):
    found = read_sources([made_run(tmp_path / "a"), made_run(tmp_path / "b", finished=False)])
    assert [s.label for s in found.finished] == ["a"]
    assert list(found.left_out) == ["b"]
    assert "not finished" in found.left_out["b"]


def test_specialists_of_different_rewards_can_be_compared(tmp_path):
    folders = [made_run(tmp_path / "a"), made_run(tmp_path / "b", ["mini-text"], model={"lora": {"rank": 3}})]
    assert [s.trained for s in read_sources(folders).finished] == [["aesthetic"], ["text"]]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"evaluation": {"steps": 3}}, "evaluation.steps: 2 in a, 3 in b"),
        ({"prompts": [{"source": "mini-words"}]}, "prompts.0.source: mini-places in a, mini-words in b"),
        ({"held_out_rewards": ["mini-text"]}, 'reward "mini-alignment": {'),
        ({"held_out_rewards": [{"reward": "mini-text", "settings": {"world": "mini-b"}}]}, "'world': 'mini-b'"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype: float32 in a, bfloat16 in b"),
        ({"model": {"call": {"max_sequence_length": 9}}}, "model.call"),
    ],
)
def test_what_is_judged_otherwise_is_refused_and_named(tmp_path, change, difference):
    folders = [made_run(tmp_path / "a"), made_run(tmp_path / "b", **change), made_run(tmp_path / "c")]
    with pytest.raises(MarbleError) as caught:
        read_sources(folders)
    assert difference in str(caught.value)


def test_where_rewards_judge_makes_no_difference(tmp_path):
    held_out = ["mini-alignment", {"reward": "mini-text", "settings": {"timeout": 3.0}}]
    assert (
        len(read_sources([made_run(tmp_path / "a"), made_run(tmp_path / "b", held_out_rewards=held_out)]).finished) == 2
    )


def test_what_the_command_line_changes_is_the_same_for_all(tmp_path):
    folders = [made_run(tmp_path / "a"), made_run(tmp_path / "b", evaluation={"steps": 3})]
    found = read_sources(folders, ["--evaluation.steps", "4"]).finished
    assert [s.config.evaluation.steps for s in found] == [4, 4]
    assert found[1].run.config.evaluation.steps == 3  # the run itself is as it was


def test_mistakes(tmp_path):
    one = made_run(tmp_path / "a")
    with pytest.raises(MarbleError, match="given more than once"):
        read_sources([one, tmp_path / "." / ".." / tmp_path.name / "a"])
    with pytest.raises(MarbleError, match="is not a run folder"):
        read_sources([one, tmp_path])
