"""Which models a front is drawn through."""

import pytest

from marble import MarbleError
from marble.pareto.points import plan_points
from marble.policy.mixing import Stored

from .made import made_run, sources_of

TRAINED = {"a": ["mini-aesthetic"], "b": ["mini-alignment"], "c": ["mini-text"], "all": ["mini-aesthetic", "mini-text"]}


def runs(tmp_path, *names, seed=0):
    return sources_of(*(made_run(tmp_path / name, TRAINED[name], seed=seed, steps=(2, 4, 5)) for name in names))


def test_scales_leave_out_what_is_there_already(tmp_path):
    found = plan_points(runs(tmp_path, "a", "all"), scales=[0, 0.5, 1, 1.25, 0.5])
    assert [p.name for p in found] == ["base", "a", "a × 0.5", "a × 1.25", "all", "all × 0.5", "all × 1.25"]
    assert [p.kind for p in found[:3]] == ["base", "method", "scale"]
    assert found[0].parts == {}
    assert found[3].parts == {Stored(tmp_path / "a" / "lora"): 1.25}


def test_checkpoints_but_the_last(tmp_path):
    found = plan_points(runs(tmp_path, "a"), checkpoints=True)
    assert [p.parameters.get("update") for p in found] == [None, None, 2, 4]
    (stored,) = found[2].parts
    assert stored.path.parent.name == "step_000002"
    assert (stored.rank, stored.alpha) == (32, 64)


def test_soups_of_every_pair_of_specialists_and_their_mean(tmp_path):
    found = [p for p in plan_points(runs(tmp_path, "a", "b", "c", "all"), soups=1) if p.kind == "soup"]
    mixed = [p.parameters["weights"] for p in found]
    assert mixed[0] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert mixed[1:] == [{"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}, {"b": 0.5, "c": 0.5}]
    assert sum(found[1].parts.values()) == 1


def test_a_named_soup_needs_no_specialists(tmp_path):
    found = [p for p in plan_points(runs(tmp_path, "a", "all"), pairs=[("all", "a")]) if p.kind == "soup"]
    assert [p.parameters["weights"] for p in found] == [
        {"all": 0.75, "a": 0.25},
        {"all": 0.5, "a": 0.5},
        {"all": 0.25, "a": 0.75},
    ]
    assert {p.method for p in found} == {"soup of all and a"}


def test_of_several_seeds_those_of_one_are_mixed(tmp_path):
    sources = sources_of(
        *(made_run(tmp_path / f"{name}{seed}", TRAINED[name], seed=seed) for seed in (0, 1) for name in ("a", "b"))
    )
    found = [p for p in plan_points(sources, soups=1) if p.kind == "soup"]
    assert [p.parameters["weights"] for p in found] == [{"a0": 0.5, "b0": 0.5}, {"a1": 0.5, "b1": 0.5}]


def test_a_run_called_base_is_not_the_base_model(tmp_path):
    found = plan_points(sources_of(made_run(tmp_path / "base"), made_run(tmp_path / "b", ["mini-text"])))
    assert [(p.name, p.kind) for p in found] == [
        ("base (before training)", "base"),
        ("base", "method"),
        ("b", "method"),
    ]


def test_two_points_of_one_name_are_refused(tmp_path):
    with pytest.raises(MarbleError, match=r'two models would be called "a × 0\.5"'):
        plan_points(sources_of(made_run(tmp_path / "a"), made_run(tmp_path / "a × 0.5")), scales=[0.5])


def test_a_pair_is_mixed_once_and_no_run_with_itself(tmp_path):
    sources = runs(tmp_path, "a", "all")
    found = plan_points(sources, pairs=[("all", "a"), ("a", "all")])
    assert [p.name for p in found if p.kind == "soup"] == ["0.75 all + 0.25 a", "0.5 all + 0.5 a", "0.25 all + 0.75 a"]
    with pytest.raises(MarbleError, match='--soup: "a" with itself'):
        plan_points(sources, pairs=[("a", "a")])


@pytest.mark.parametrize("names", [("a", "all"), ("all",)])
def test_soups_without_specialists(tmp_path, names):
    with pytest.raises(MarbleError, match=r"--soups: mixes specialists.*all: aesthetic, text.*--soup RUN RUN"):
        plan_points(runs(tmp_path, *names), soups=2)


def test_full_fine_tuning_is_found_where_it_lies(tmp_path):
    folder = made_run(tmp_path / "a", model={"train": "full"})
    (folder / "unet").mkdir()
    assert plan_points(sources_of(folder))[1].parts == {Stored(folder / "unet"): 1.0}


def test_file_names_are_unlike_and_safe(tmp_path):
    points = plan_points(runs(tmp_path, "a", "b"), scales=[0.5, 1.5], soups=2)
    names = [point.file_name for point in points]
    assert len(set(names)) == len(points)
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in names)
