"""The map of regimes, written of comparisons and measurements that are made by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from marble.config import make_config
from marble.conflict.regimes import nearest_regime, read_regimes
from marble.setup import check_config, held_out_prompts

ROOT = Path(__file__).parent.parent.parent
NAMES = ["a", "b"]
OVERRIDES = {
    "marble": {"balance.method": "marble"},
    "raw-norms": {"balance.method": "marble", "balance.norms": "raw"},
    "weighted-sum": {"balance.method": "weighted-sum"},
    "standardised-sum": {"balance.method": "standardised-sum"},
    "upgrad": {"balance.method": "upgrad", "balance.refresh": 1},
}
# seed → gains of a and b in spreads of the base model: the raw sum leads on average, raw norms on the worst
GAINS = {
    "marble": {"100": [0.5, 0.4], "101": [0.5, 0.3]},
    "raw-norms": {"100": [0.6, 0.5], "101": [0.6, 0.5]},
    "weighted-sum": {"100": [2.0, 0.1], "101": [2.0, 0.1]},
    "standardised-sum": {"100": [0.5, 0.2], "101": [0.5, 0.2]},
    "upgrad": {"100": [0.4, 0.3], "101": [0.4, 0.3]},
}


@pytest.fixture(scope="module")
def regimes():
    sys.path.insert(0, str(ROOT / "bench"))
    import regimes

    return regimes


def comparison(lost=()):
    """What comparison.json holds of the arms; the spreads are there to be left alone."""
    arms = {}
    for arm, seeds in GAINS.items():
        rows = {seed: {"status": "done", "gains": dict(zip(NAMES, row, strict=True))} for seed, row in seeds.items()}
        rows |= {seed: {"status": "failed", "error": "x"} for name, seed in lost if name == arm}
        arms[arm] = {"overrides": OVERRIDES[arm], "seeds": rows}
    return {"training_rewards": NAMES, "spread": {"a": 0.01, "b": 0.4}, "arms": arms, "verdict": {}}


def conflict(cosine=-0.3, width=0.2):
    table = [[1.0, cosine], [cosine, 1.0]]
    low, high = ([[None if v is None else v + side for v in row] for row in table] for side in (-width / 2, width / 2))
    scores = {"mismatch": 12.0, "rewards": {"a": {"judges": 1.0}, "b": {"judges": 0.2}}}
    return {"scores": scores, "gradients": {"cosines_true": {"estimate": table, "low": low, "high": high}}}


def lay(out, cell, compared, measured):
    for folder, name, content in (("arms", "comparison", compared), ("conflict", "conflict", measured)):
        (out / cell.name / folder).mkdir(parents=True)
        (out / cell.name / folder / f"{name}.json").write_text(json.dumps(content))


def test_every_regime_measures_each_specialist_on_enough_prompts(regimes, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for cell in regimes.CELLS:
        config = make_config(cell.config(90))
        check_config(config)
        sources = [record.source for record in held_out_prompts(config)]
        assert min(sources.count("words"), sources.count("objects")) >= 18, cell.name


def test_gains_are_in_spreads_already(regimes):
    found = {arm: rows.tolist() for arm, rows in regimes.gains(comparison()).items()}
    assert found == {arm: list(rows.values()) for arm, rows in GAINS.items()}


def test_a_seed_counts_if_every_arm_has_finished_it(regimes):
    found = regimes.gains(comparison(lost=[("marble", "100")]))
    assert found["marble"].tolist() == [[0.5, 0.3]]
    assert all(len(rows) == 1 for rows in found.values())
    assert regimes.gains(comparison(lost=[("marble", "100"), ("raw-norms", "101")])) == {}


def test_what_leads_the_default_in_both_on_every_seed_is_suggested(regimes):
    rows = regimes.gains(comparison())
    mean, worst = ({arm: of(found, axis=1) for arm, found in rows.items()} for of in (np.mean, np.min))
    assert regimes.winner(mean) == "weighted-sum"
    assert regimes.winner(worst) == "raw-norms"
    assert regimes.suggested(mean, worst) == "raw-norms"  # the raw sum's worst is behind
    worst["raw-norms"][1] = worst["marble"][1]
    assert regimes.suggested(mean, worst) == "marble"  # one seed does not agree


def test_the_map_holds_the_settings_that_were_measured(regimes, tmp_path, capsys):
    lay(tmp_path, regimes.CELLS[0], comparison(), conflict())
    lay(tmp_path, regimes.CELLS[1], comparison(), conflict(width=0.7))  # too wide to be known
    lay(tmp_path, regimes.CELLS[2], comparison(), conflict(cosine=None))
    lay(tmp_path, regimes.CELLS[3], comparison(lost=[("marble", "100"), ("raw-norms", "101")]), conflict())
    file = tmp_path / "regimes.json"
    regimes.write(tmp_path, file)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{cell.name} left out: its conflict is not known" for cell in regimes.CELLS[1:3]]
    (cell,) = read_regimes(file)
    assert (cell.mismatch, cell.specialist_share, cell.conflict) == (12, 0.2, -0.3)
    assert cell.mean == {"method": "weighted-sum"}
    assert cell.worst == {"method": "marble", "norms": "raw"}
    assert cell.suggested == cell.worst
    assert cell.seeds == 2
    for balance in (cell.mean, cell.worst):
        made = make_config({"prompts": [{"source": "x"}], "rewards": [{"reward": "r"}], "balance": balance}).balance
        assert made.advantage_scale == "match"  # as measured
    assert nearest_regime([cell], 10, 0.2, -0.2) is cell


def test_the_table_shows_what_is_not_known(regimes, tmp_path, capsys):
    lay(tmp_path, regimes.CELLS[0], comparison(), conflict())
    lay(tmp_path, regimes.CELLS[1], comparison(), conflict(cosine=None))
    regimes.table(tmp_path)
    head, _, known, unknown, *leads = capsys.readouterr().out.splitlines()
    assert head.endswith("| marble | raw-norms | weighted-sum | standardised-sum | upgrad |")
    assert known.startswith("| 1× | 50% | 0 | -0.30 | 0.45 0.40 / 0.40 0.30 | 0.55 0.55 / 0.50 0.50 |")
    assert unknown.startswith("| 1× | 20% | 0 | ? |")
    # at worst marble gains 0.4 and 0.3, raw norms 0.5 on both seeds; both cells are alike
    assert leads[3].startswith("| no conflict built in, 1× | 2 | ")
    assert " / -0.15 [-0.15, -0.15] | " in leads[3]
    assert not any("dial" in line for line in leads)  # no such cell was measured
