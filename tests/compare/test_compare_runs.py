"""Finished runs side by side: named by what tells them apart, refused where they cannot be compared."""

import pytest

from marble.compare import describe, side_by_side
from marble.compare.results import read_result
from marble.config import demo_config_path, make_config, read_config
from marble.errors import MarbleError
from marble.overrides import override
from marble.run import Run

NAMES = ["aesthetic", "alignment", "preference", "text", "composition", "diversity", "second-alignment"]


def made(folder, *settings, finished=True, gain=1.0, **changes):
    """A run folder of two prompts with two images each; what was learned adds `gain` to every score."""
    config = make_config(override(read_config(demo_config_path()), list(settings)))
    run = Run.create(folder, config)
    before = [[1.0 * i] * len(NAMES) for i in range(4)]
    after = [[score + gain for score in row] for row in before]
    count = len(config.rewards)
    content = {
        "training_rewards": NAMES[:count],
        "held_out_rewards": NAMES[count:],
        "revisions": dict.fromkeys(NAMES, "1"),
        "seeds": [1, 2],
        "steps": 10,
        "guidance": {},
        "before": {"names": NAMES, "prompts": ["x", "y"], "scores": before, "means": dict.fromkeys(NAMES, 1.5)},
    } | changes
    if finished:
        content["after"] = content["before"] | {"scores": after, "means": dict.fromkeys(NAMES, 1.5 + gain)}
    run.write_evaluation(content)
    run.log({"update": 0, "held_out": dict.fromkeys(NAMES, 1.5)})
    run.log({"update": 180, "images": 4320, "time": {"elapsed": 90.0}, "cosine_advantage/applied": -0.1})
    return folder


def test_a_run_is_read(tmp_path):
    found = read_result(made(tmp_path / "a", gain=0.5), NAMES[::-1], {"memory": 7, "jobs": [2], "threads": [1]})
    # scores 0, 1, 2, 3: population standard deviation √1.25
    assert found.spread == pytest.approx(1.25**0.5)
    assert found.gains == pytest.approx(0.5 / 1.25**0.5)
    assert found.means == pytest.approx(2.0)
    assert (found.seconds, found.memory, found.images, found.updates) == (90.0, 7, 4320, 180)
    assert found.cosines == [-0.1]
    assert found.prompt_scores[:, 0] == pytest.approx([1.0, 3.0])
    assert found.place == ("cpu", 1, 1, "jobs", 2)


def test_images_without_a_score_count_in_neither(tmp_path):
    folder = made(tmp_path / "a")
    run = Run(folder)
    content = run.evaluation()
    content["after"]["scores"][3][0] = None
    content["before"]["scores"][0][1] = None
    run.write_evaluation(content)
    found = read_result(folder, NAMES)
    assert found.prompt_gains[:, 2:] * found.spread[2:] == pytest.approx(1.0)
    assert found.gains[:2] * found.spread[:2] == pytest.approx(1.0)


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [
        made(tmp_path / "a"),
        made(tmp_path / "b", "--seed", "1", "--threads", "2"),
        made(tmp_path / "c", "--balance.method", "weighted-sum"),
        made(tmp_path / "d", "--balance.method", "weighted-sum", "--objective.name", "awm"),
        made(tmp_path / "e", "--optimizer.lr", "1e-3"),
    ]
    found, config = side_by_side(paths)
    assert {name: sorted(seeds) for name, seeds in found.done.items()} == {
        "marble:optimizer.lr=0.0005": [0, 1],
        "weighted-sum": [0],
        "awm": [0],
        "marble:optimizer.lr=0.001": [0],
    }
    assert found.overrides["awm"] == {
        "balance.method": "weighted-sum",
        "balance.visits": "even",
        "objective.name": "awm",
        "optimizer.lr": 5e-4,
    }
    content = describe(found, config)
    assert content["baseline"] == "weighted-sum"
    assert content["arms"]["awm"]["seeds"]["0"]["folder"] == str((tmp_path / "d").resolve())


def test_a_specialist_stands_beside_those_that_train_on_all(tmp_path):
    others = [{"reward": f"mini-{name}"} for name in NAMES[1:]]
    one = ("--rewards", "[mini-aesthetic]", "--held_out_rewards", str(others))
    found, _ = side_by_side([made(tmp_path / "a", *one), made(tmp_path / "b")])
    assert list(found.done) == ["specialist:mini-aesthetic", "marble"]
    assert found.training == NAMES[:5]


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (("--budget.updates", "90"), {}, "budget.updates: 180 in"),
        (("--rollout.prompts", "15"), {}, "rollout.prompts: 12 in"),
        (("--model.revision", "other"), {}, "model.revision: none in"),
        ((), {"seeds": [3, 4]}, "evaluation seeds: [1, 2] in"),
        ((), {"revisions": dict.fromkeys(NAMES, "2")}, 'revision of reward "aesthetic": 1 in'),
        (("--optimizer.lr", "1e-3"), {"finished": False}, "is not finished"),
        ((), {}, "are marble with seed 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, settings, changes, message):
    paths = [made(tmp_path / "a"), made(tmp_path / "b", *settings, **changes)]
    with pytest.raises(MarbleError) as caught:
        side_by_side(paths)
    assert message in str(caught.value)


def test_runs_of_other_training_sets_are_refused(tmp_path):
    rewards = [f"mini-{name}" for name in NAMES]
    two = ("--rewards", str(rewards[:2]), "--held_out_rewards", str(rewards[2:]))
    some = {"training_rewards": NAMES[:2], "held_out_rewards": NAMES[2:]}
    with pytest.raises(MarbleError, match="or on one of them, got aesthetic, alignment in"):
        side_by_side([made(tmp_path / "a", *two, **some), made(tmp_path / "b")])


def test_one_run_and_other_folders_are_refused(tmp_path):
    with pytest.raises(MarbleError, match="at least two run folders, got 1"):
        side_by_side([made(tmp_path / "a")])
    with pytest.raises(MarbleError, match="is not a run folder"):
        side_by_side([tmp_path / "a", tmp_path / "none"])
