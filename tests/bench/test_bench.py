import json

import pytest
import torch

from marble.bench import SHAPES, bench_update
from marble.bench.measure import interleaved, peak_bytes, ratio, summary
from marble.bench.shapes import _sd3, _unet
from marble.cli import main

TINY = _sd3(64, 2, 1, 8, 6, 48, 3, "tiny")
CPU = torch.device("cpu")


def test_arms_take_turns_there_and_back():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # once unmeasured, then round by round
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_and_ratio_are_medians_round_by_round():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])["median"] == 2.0


def test_peak_is_of_tensors_that_live_together():
    def work():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB now
        del first
        return second * 2  # 8 MB again

    assert peak_bytes(work, CPU) == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("shape", [TINY, _unet((32, 32, 64), (1, 1, 1), 16, 32, 8, "tiny")], ids=["sd3", "unet"])
def test_update_phase_is_measured_and_the_engine_is_exact(shape):
    result = bench_update(shape, rewards=3, rank=4, repeats=1, batch=3)
    assert result["error"] < 1e-5
    assert result["fast_share"] == 1
    plain, exact = result["arms"]["weighted sum"], result["arms"]["exact"]
    assert plain["against_weighted_sum"]["median"] == 1
    amortised = result["arms"]["amortised N=10, from exact and weighted sum"]["seconds"]["median"]
    assert amortised == pytest.approx(0.9 * plain["seconds"]["median"] + 0.1 * exact["seconds"]["median"])
    assert exact["peak_bytes"] > plain["peak_bytes"] > 0
    assert result["arms"]["exact by K backwards"]["seconds"]["median"] > 0


def test_checkpointing_and_bfloat16_run(monkeypatch):
    result = bench_update(TINY, rewards=2, rank=4, repeats=1, checkpointing=True, dtype="bf16", slow=False)
    assert result["error"] < 0.05
    assert "exact by K backwards" not in result["arms"]


def test_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "sd3-small", TINY)
    out = tmp_path / "bench.json"
    argv = ["bench", "sd3-small", "--rewards", "2", "4", "--rank", "2", "--repeats", "1", "--json", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "exact by K backwards" in printed
    assert "over the floor" in printed
    content = json.loads(out.read_text())
    assert [update["rewards"] for update in content["update"]] == [2, 4]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sd3-smal"], 'Did you mean "sd3-small"'),
        (["sd3-small", "--repeats", "0"], "--repeats: at least 1, got 0"),
        (["sd3-small", "--rewards", "0"], "--rewards"),
        (["sd3-small", "--json", "nowhere/at/all.json"], "no folder"),
        (["sd3-small", "--json", "."], '--json: "." is a folder'),
        (["mini", "--rank", "4"], "--rank: mini is measured as the demo trains it"),
    ],
)
def test_mistakes_are_one_message(argv, said, capsys):
    assert main(["bench", *argv]) == 2
    assert said in capsys.readouterr().err


def test_shapes_are_listed(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ["mini", *SHAPES])


@pytest.mark.slow
def test_whole_epochs_of_mini(capsys, tmp_path):
    out = tmp_path / "bench.json"
    assert main(["bench", "mini", "--repeats", "1", "--json", str(out)]) == 0
    arms = json.loads(out.read_text())["epoch"]["arms"]
    assert set(arms) == {"weighted sum", "exact", "amortised N=10", "amortised N=10, solved on a third"}
