import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml

from marble.balance.solvers import solve
from marble.config import make_config
from marble.conflict.across import AcrossBatches
from marble.conflict.advice import advise, headline
from marble.conflict.directions import describe_gradients
from marble.conflict.regimes import FILE, Regime, axes_of, nearest_regime, read_regimes
from marble.conflict.scores import describe_scores
from marble.gradients import gram_of

NAMES = ["a", "b", "c"]
FLAGS = [[False] * 3 for _ in range(3)]


def quiet():
    """Measurements in which no rule finds anything."""
    row = {"judges": 1.0, "constant": 0.0, "owns": 1 / 3, "spread_within": 0.1, "spread_relative": 1.0}
    norm = {"one_batch": 1.0, "known": True, "shown": 0.5, "batches_needed": 3.0}
    seen = {"conflict_rate": 0.1, "conflict_rate_low": 0.02, "against": {"a": 0.1, "b": 0.0, "c": 0.0}}
    flat = [[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0]]
    some = [[30, 20, 20], [20, 30, 20], [20, 20, 30]]
    true = {"worst": 0.31, "worst_low": 0.1, "worst_high": 0.5, "worst_reward": "b", "against": []}
    content = {
        "rewards": NAMES,
        "setup": {"prompts": 12, "group_size": 8, "batches": 24},
        "scores": {
            "rewards": {name: dict(row) for name in NAMES},
            "mismatch": 2.0,
            "pearson": flat,
            "pearson_low": flat,
            "jointly_prompts": some,
        },
        "gradients": {
            "norms": {name: dict(norm) for name in NAMES},
            "cosines_true": {"estimate": flat, "low": flat, "high": flat, "conflict": FLAGS, "agree": FLAGS},
            "directions": {
                "weighted_sum": {"advantage": seen, "true": true | {"cosines": {"a": 0.4, "b": 0.31, "c": 0.5}}}
            },
        },
    }
    return copy.deepcopy(content)


def test_nothing_found_is_said_honestly():
    advice = advise(quiet())
    assert [finding.rule for finding in advice.findings] == ["plain"]
    assert "plain sum will do as well" in advice.findings[0].advice
    assert advice.method == "weighted-sum"


def spoil(content, path, value):
    *way, last = path
    for part in way:
        content = content[part]
    content[last] = value


RAW = ("gradients", "directions", "weighted_sum")
# rule, what is spoilt, a value that triggers it, one that just does not, rewards named, the number
CASES = [
    ("constant", ("scores", "rewards", "b", "constant"), 0.6, 0.5, ["b"], 0.6),
    ("spreads", ("scores", "mismatch"), 3.1, 3.0, None, 3.1),
    ("specialist", ("scores", "rewards", "c", "judges"), 0.33, 0.5, ["c"], 0.33),
    ("noise", ("gradients", "norms", "a", "shown"), 0.19, 0.2, ["a"], 0.19),
    ("unseen", ("gradients", "norms", "b", "known"), False, True, ["b"], None),
    ("by-noise", (*RAW, "advantage", "conflict_rate_low"), 0.11, 0.1, ["a"], 0.1),
    ("opposed", (*RAW, "true", "against"), ["b"], [], ["b"], 0.31),
]


@pytest.mark.parametrize(("rule", "path", "bad", "good", "rewards", "number"), CASES, ids=[case[0] for case in CASES])
def test_every_rule(rule, path, bad, good, rewards, number):
    content = quiet()
    spoil(content, path, good)
    assert [finding.rule for finding in advise(content).findings] == ["plain"]
    spoil(content, path, bad)
    if rule == "unseen":
        spoil(content, (*path[:-1], "shown"), None)
    advice = advise(content)
    found = [finding for finding in advice.findings if finding.rule != "plain"]
    assert [finding.rule for finding in found] == [rule]
    harmless = rule in ("noise", "by-noise")  # a plain sum is as good as anything for them
    assert (len(found) < len(advice.findings)) == harmless
    assert (advice.method == "weighted-sum") == (harmless or rule == "constant")
    assert rewards is None or found[0].rewards == rewards
    assert found[0].number == number
    if number is not None:
        shown = (f"{number:.2f}", f"{number:.3g}", f"{100 * number:.0f}%")
        assert any(text in found[0].finding for text in shown)  # the number stands in the words


def test_true_conflict_wants_a_sure_sign():
    content = quiet()
    content["gradients"]["cosines_true"]["estimate"] = [[1, -0.4, 0.2], [-0.4, 1, 0.2], [0.2, 0.2, 1]]
    assert advise(content).method == "weighted-sum"  # −0.4, but it may be noise
    content["gradients"]["cosines_true"]["conflict"] = [[False, True, False], [True, False, False], [False] * 3]
    advice = advise(content)
    assert [(finding.rule, finding.rewards, finding.number) for finding in advice.findings] == [
        ("conflict", ["a", "b"], -0.4)
    ]
    assert advice.method == "upgrad"  # min-norm weights would all go to the two
    assert "floor" in advice.fragment
    assert "1 of 3 pairs of rewards truly conflict and 0 of 3 pairs surely agree" in headline(content)


def test_what_noise_adds_to_the_conflict_of_a_sum_is_said():
    content = quiet()
    raw = content["gradients"]["directions"]["weighted_sum"]
    raw["advantage"] |= {"conflict_rate": 0.4, "conflict_rate_low": 0.2}
    advice = advise(content)
    assert "taken out, the smallest cosine is +0.31 (+0.10 to +0.50), with b" in advice.findings[0].finding
    assert ([finding.rule for finding in advice.findings], advice.method) == (["by-noise", "plain"], "weighted-sum")
    raw["true"]["cosines"]["c"] = None
    advice = advise(content)
    assert "truly works against c cannot be known" in advice.findings[0].finding
    assert ([finding.rule for finding in advice.findings], advice.method) == (["opposed"], "marble")
    raw["true"] = None
    assert "truly works against any of them cannot be known" in advise(content).findings[0].finding


def test_noise_alone_does_not_argue_against_a_sum():
    """Five orthogonal gradients in noise, one with thrice the weight: many updates oppose one of the others."""
    names, batches, wide, generator = list("abcde"), 24, 12, torch.Generator().manual_seed(0)
    across, grams = AcrossBatches(batches), []
    for _ in range(batches):
        own = torch.eye(5, wide) + 0.5 * torch.randn(5, wide, generator=generator)
        rows = torch.cat([own, torch.tensor([[3.0, 1, 1, 1, 1]]) @ own, torch.zeros(1, wide)])
        grams.append([gram_of(rows)])
        across.add(rows)
    signal = [torch.ones(5, dtype=torch.bool)] * batches
    scores = np.random.default_rng(0).normal(size=(96, 5)) * [2.5, 1, 1, 1, 1]
    every, groups = np.ones(scores.shape, dtype=bool), np.arange(96) // 8
    content = quiet() | {
        "rewards": names,
        "scores": describe_scores(names, scores, every, groups, scores, np.ones(5)),
        "gradients": describe_gradients(names, grams, signal, across),
    }
    assert content["gradients"]["directions"]["weighted_sum"]["advantage"]["conflict_rate"] > 0.3
    advice = advise(content)
    assert [finding.rule for finding in advice.findings] == ["by-noise", "plain"]
    assert advice.method == "weighted-sum"


def test_gradients_that_are_surely_one():
    content = quiet()
    cosines = content["gradients"]["cosines_true"]
    cosines["estimate"] = [[1, 0.2, 0.97], [0.2, 1, 0.2], [0.97, 0.2, 1]]
    cosines["low"] = [[1, 0.2, 0.9], [0.2, 1, 0.2], [0.9, 0.2, 1]]
    assert [finding.rule for finding in advise(content).findings] == ["plain"]  # it may be less
    cosines["low"] = [[1, 0.2, 0.93], [0.2, 1, 0.2], [0.93, 0.2, 1]]
    found = advise(content).findings[0]
    assert (found.rule, found.rewards, found.number) == ("redundant", ["a", "c"], 0.97)
    assert "+0.97" in found.finding


def test_scores_that_are_surely_one():
    content = quiet()
    scores = content["scores"]
    scores["pearson"] = [[1, 0.2, 0.95], [0.2, 1, 0.2], [0.95, 0.2, 1]]
    scores["pearson_low"] = [[1, 0.2, 0.9], [0.2, 1, 0.2], [0.9, 0.2, 1]]
    assert [finding.rule for finding in advise(content).findings] == ["plain"]  # it may be less
    scores["pearson_low"] = [[1, 0.2, 0.93], [0.2, 1, 0.2], [0.93, 0.2, 1]]
    scores["jointly_prompts"] = [[30, 20, 9], [20, 30, 20], [9, 20, 30]]
    assert [finding.rule for finding in advise(content).findings] == ["plain"]  # the interval is of too few prompts
    scores["jointly_prompts"] = [[30, 20, 10], [20, 30, 20], [10, 20, 30]]
    found = advise(content).findings[0]
    assert (found.rule, found.rewards, found.number) == ("redundant", ["a", "c"], 0.95)
    assert "correlate by 0.95" in found.finding
    assert "nothing has to change for it" in found.advice  # min-norm would starve both if their priorities were halved


@pytest.mark.parametrize(("method", "halved"), [("marble", False), ("uniform", True)])
def test_who_counts_twins_twice(method, halved):
    """What the advice on redundant rewards rests on, by the solver itself: twins and a third, all orthogonal else."""
    twins = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    solver = "min-norm" if method == "marble" else method
    plain, half = (solve(solver, twins, torch.tensor([p, p, 1.0])) for p in (1.0, 0.5))
    right = half if halved else plain
    assert right[:2].sum() == pytest.approx(right[2].item(), abs=1e-6)
    wrong = plain if halved else half
    assert abs(wrong[:2].sum() - wrong[2]) > 0.1


def test_a_reward_with_nothing_to_teach():
    content = quiet()
    content["scores"]["rewards"]["b"]["constant"] = 1.0
    assert "leave it out" in advise(content).findings[0].advice


def everything():
    content = quiet()
    content["scores"] |= {"mismatch": 40.0}
    content["scores"]["rewards"]["c"] |= {"judges": 0.1, "constant": 0.7}
    content["gradients"]["norms"]["b"] |= {"shown": 0.1, "batches_needed": 99.0}
    content["gradients"]["cosines_true"]["estimate"] = [[1, -0.4, 0.2], [-0.4, 1, 0.2], [0.2, 0.2, 1]]
    content["gradients"]["cosines_true"]["conflict"] = [[False, True, False], [True, False, False], [False] * 3]
    return content


def test_the_fragment_is_a_config():
    content = everything()
    content["rewards"] = ["two\nlines: x", "b", "c"]
    fragment = advise(content).fragment
    lines = [line.removeprefix("# ") for line in fragment.splitlines() if "rewards:" not in line]
    values = {"prompts": [{"source": "x"}], "rewards": [{"reward": "r"}], **yaml.safe_load("\n".join(lines))}
    config = make_config(values)
    assert (config.balance.method, config.balance.norms, config.rollout.prompts) == ("upgrad", "folded", 24)
    assert yaml.safe_load(fragment) == {"balance": {"method": "upgrad", "visits": "importance", "norms": "folded"}}


RAW = {"method": "marble", "norms": "raw"}
CELLS = [
    Regime(1, 1.0, 0.5, {"method": "weighted-sum"}, {"method": "weighted-sum"}, {"method": "marble"}, 2),
    Regime(10, 0.2, 0.0, {"method": "gdpo"}, {"method": "uniform"}, {"method": "uniform"}, 3),
    Regime(100, 0.05, -0.5, {"method": "marble"}, RAW, RAW, 2),
]


def test_a_measured_case_like_this_one_decides():
    content = quiet()
    content["scores"]["mismatch"] = 8.0
    content["scores"]["rewards"]["c"]["judges"] = 0.25
    assert advise(content).method == "marble"
    advice = advise(content, CELLS)
    assert advice.method == "uniform"
    assert "uniform gained more than marble both on average and for the worst-off reward" in advice.reason
    assert "(3 seeds; most on average: gdpo; most for the worst-off: uniform)" in advice.reason
    assert "norms: folded" in advice.fragment


def test_what_is_suggested_is_what_was_measured():
    advice = advise(everything() | {"setup": {"prompts": 12, "group_size": 8, "batches": 24}}, CELLS)
    assert yaml.safe_load(advice.fragment) == {"balance": {"method": "marble", "norms": "raw"}}
    assert "marble (norms: raw) gained more than marble both" in advice.reason
    assert advice.to_json()["suggested"]["method"] == "marble"


def test_the_default_stands_where_nothing_led_it_in_both():
    content = quiet() | {"rewards": ["a", "b", "c"]}
    content["scores"]["rewards"]["c"]["judges"] = 1.0
    cell = Regime(**(axes_of(content) | {"mean": RAW, "worst": RAW, "suggested": {"method": "marble"}, "seeds": 2}))
    advice = advise(content, [cell])
    assert advice.method == "marble"
    assert "no method gained more than marble both on average and for the worst-off reward" in advice.reason


def test_a_cosine_that_is_hardly_known_does_not_place_a_case():
    content = everything()
    assert axes_of(content) == {"mismatch": 40.0, "specialist_share": 0.1, "conflict": -0.4}
    content["gradients"]["cosines_true"]["low"] = [[1, -0.9, 0], [-0.9, 1, 0], [0, 0, 1]]
    content["gradients"]["cosines_true"]["high"] = [[1, -0.2, 0.4], [-0.2, 1, 0.4], [0.4, 0.4, 1]]
    assert axes_of(content)["conflict"] == 0.2
    content["gradients"]["cosines_true"]["high"] = [[1, 0.4, None], [0.4, 1, None], [None, None, 1]]
    assert axes_of(content)["conflict"] is None
    assert nearest_regime(CELLS, **axes_of(content)) is None


def test_the_nearest_cell_counts_in_steps_of_the_map():
    assert nearest_regime(CELLS, 20, 0.3, 0.1) is CELLS[1]
    assert nearest_regime(CELLS, 50, 0.08, -0.4) is CELLS[2]
    assert nearest_regime(CELLS, 1e4, 0.05, -0.5) is None  # two steps from anything measured
    assert nearest_regime(CELLS, 10, 0.2, -0.8) is None
    assert nearest_regime(CELLS, 10, 0.2, None) is None
    assert nearest_regime([], 10, 0.2, 0.0) is None


def test_the_map_is_read_if_it_is_there(tmp_path):
    path = tmp_path / "regimes.json"
    assert read_regimes(path) == []
    path.write_text(json.dumps({"schema": 1, "about": "x", "cells": [asdict(cell) for cell in CELLS]}))
    assert read_regimes(path) == CELLS
    for key, value, complaint in (
        ("conflict", None, "cells.0.conflict must be a number, got None"),
        ("mean", "gdpo", "cells.0.mean must be settings of balance with a method, got 'gdpo'"),
    ):
        path.write_text(json.dumps({"schema": 1, "cells": [asdict(CELLS[1]) | {key: value}]}))
        with pytest.raises(ValueError, match=complaint):
            read_regimes(path)
    path.write_text('{"schema": 2, "cells": []}')
    with pytest.raises(ValueError, match="schema"):
        read_regimes(path)


@pytest.mark.skipif(not FILE.is_file(), reason="the map has not been made")
def test_the_packaged_map_holds_settings_that_there_are():
    cells = read_regimes()
    assert cells
    for balance in [arm for cell in cells for arm in (cell.mean, cell.worst, cell.suggested)]:
        make_config({"prompts": [{"source": "x"}], "rewards": [{"reward": "r"}], "balance": balance})
