"""The tables of docs/benchmarks.md, made of a comparison."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GAINS = {"marble": {"0": [0.5, 0.3], "1": [0.7, 0.5]}, "sum": {"1": [0.9, 0.1], "2": [0.9, 0.1]}, "lost": {}}


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(ROOT / "bench"))
    import gains

    return gains


@pytest.fixture
def path(tmp_path):
    arms = {}
    for name, seeds in GAINS.items():
        rows = {seed: {"status": "done", "gains": dict(zip("ab", row, strict=True))} for seed, row in seeds.items()}
        summary = {"composite_z": 0.5 if name == "marble" else -0.5, "cosine": {"mean": 0.1, "negative": 0.25}}
        arms[name] = {"seeds": rows | {"9": {"status": "failed", "error": "x"}}, "summary": summary}
    content = {"training_rewards": ["a", "b"], "held_out_rewards": [], "arms": arms, "verdict": {}}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    return tmp_path


def run(table, monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["gains.py", *map(str, args)])
    table.main()
    return capsys.readouterr().out.splitlines()


def test_arms_stand_by_composite_with_intervals_over_their_seeds(table, path, monkeypatch, capsys):
    lines = run(table, monkeypatch, capsys, path)
    # mean gains 0.4 and 0.6: 0.5 ± 12.7 · 0.1414 / √2
    marble = "| marble | 2 | +0.50 [-0.77, +1.77] | +0.40 [-0.87, +1.67] | +0.50 | +0.60 | +0.40 | +0.10; 25% |"
    assert lines[2] == marble
    assert lines[3].startswith("| sum | 2 | +0.50 [+0.50, +0.50] | +0.10 [+0.10, +0.10] | -0.50 |")
    assert len(lines) == 4  # nothing of the arm without a finished run


def test_differences_are_paired_by_the_seeds_that_both_have(table, path, monkeypatch, capsys):
    assert run(table, monkeypatch, capsys, path, "--against", "marble")[-1] == "| sum | -0.10 | -0.40 |"


def test_an_unknown_arm_is_named(table, path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(table, monkeypatch, capsys, path, "--arms", "lost")
    assert "no finished run of lost; there are marble, sum" in capsys.readouterr().err
