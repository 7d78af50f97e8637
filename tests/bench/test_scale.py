import json
from dataclasses import replace

import pytest
import torch

from marble.bench import SHAPES
from marble.bench.scale import (
    Constants,
    Model,
    Work,
    constants,
    handed,
    held,
    message_seconds,
    model_of,
    predict,
    ring,
    sent,
    tree,
)
from marble.bench.shapes import _sd3
from marble.bench.simulate import check, fit, simulate
from marble.bench.update import Phase
from marble.cli import main, scale
from marble.errors import MarbleError

from ..small import Trial, config_of

TINY = _sd3(64, 2, 1, 8, 6, 48, 3, "tiny")

SLOW = Constants(
    flops=10.0,
    update=3.0,
    exact=1.5,
    reward=0.5,
    gram=1000.0,
    disk=100.0,
    gpus=8,
    inside=100.0,
    between=5.0,
    inside_latency=1.0,
    between_latency=10.0,
    inside_tree=2.0,
    between_tree=20.0,
)
FREE = replace(SLOW, inside=1e30, between=1e30, inside_latency=0, between_latency=0, inside_tree=0, between_tree=0)


def test_bytes_by_hand():
    # P = 10 made up to 12 for 4 processes, R = 3
    assert [handed(way, 10, 3, 4) for way in ("gradient", "whole")] == [4 * 10, 4 * 3 * 10]
    assert handed("scattered", 10, 3, 4) == 4 * 3 * 12 + 8 * 9 + 4 * 3  # columns, Gram, own part of the direction
    assert [sent(way, 10, 3, 4) for way in ("gradient", "whole")] == [60, 180]  # 2 * 3/4 of them
    assert sent("scattered", 10, 3, 4) == 3 / 4 * (4 * 3 * 12 + 4 * 12 + 2 * 72)
    assert held("whole", 10, 3, 4) == (120, 120)
    assert held("scattered", 10, 3, 4) == (120 + 36, 36)
    assert [handed(way, 10, 3, 1) for way in ("gradient", "whole", "scattered")] == [0, 0, 0]


@pytest.mark.parametrize("rewards", [5, 20])
def test_scattered_rows_send_about_half(rewards):
    share = sent("scattered", 10**7, rewards + 1, 8) / sent("whole", 10**7, rewards + 1, 8)
    assert share == pytest.approx((rewards + 2) / (2 * (rewards + 1)), rel=1e-5)


def test_seconds_by_hand():
    # 16 processes on two nodes: an all-reduce makes 2 * 15 steps, 2 of them between nodes; 8 cards carry 8 * 5 a second
    assert ring(80.0, 2, 16, SLOW) == 28 * 1 + 2 * 10 + 80 / 40
    assert ring(80.0, 1, 8, SLOW) == 7 * 1 + 80 / 100
    assert tree(80.0, 16, SLOW) == pytest.approx(2 * (7 * 2 + 1 * 20) + 2 * 80 / (0.9 * 40))
    assert tree(80.0, 8, SLOW) == pytest.approx(2 * 7 * 2 + 2 * 80 / 90)
    assert message_seconds("whole", 10, 3, 16, SLOW) == ring(2 * 15 / 16 * 120, 2, 16, SLOW)  # 53.6 s, a tree 74.7 s
    assert message_seconds("whole", 10, 3, 512, SLOW) == tree(120, 512, SLOW)
    assert message_seconds("whole", 10, 3, 1, SLOW) == 0
    # scattered: 12 steps' numbers of 3 rows and of the direction once round, and a Gram of 72 bytes
    expected = ring(3 / 4 * 144, 1, 4, SLOW) + ring(2 * 3 / 4 * 72, 2, 4, SLOW) + ring(3 / 4 * 48, 1, 4, SLOW)
    assert message_seconds("scattered", 10, 3, 4, SLOW) == pytest.approx(expected)


def test_an_epoch_by_hand():
    # a forward pass takes 2 s: an image 4 * 2 s to sample, 2 * 0.5 s to judge, 3 visits of 2 * 3 * 1.5 s to learn from
    work = Work(rewards=2, prompts=6, group_size=2, steps=4, timesteps=3)
    row = predict(Model(parameters=10, base=100, flops=20), work, FREE, 4)
    assert (row["images"], row["prompts"], row["refused"], row["no_idle_prompts"]) == (4, 6, False, 8)
    assert row["idle"] == 0.25  # two have 4 images and two have 2
    assert row["seconds"]["rollout"] == pytest.approx(32)
    assert row["seconds"]["rewards"] == pytest.approx(4)
    assert row["seconds"]["update"] == pytest.approx(4 * 3 * 9)
    assert row["seconds"]["gram"] == pytest.approx(4 * 3 * 10 / 1000)
    assert row["seconds"]["epoch"] == pytest.approx(32 + 4 + 108 + 0.12)
    assert row["efficiency"] == pytest.approx(0.75, abs=1e-3)
    assert row["checkpoint"] == {"bytes": 200, "seconds": 2.0}
    amortised = predict(Model(10, 100, 20), replace(work, refresh=10), FREE, 4)
    assert amortised["seconds"]["update"] == pytest.approx(4 * 3 * 6 * 1.05)
    assert amortised["seconds"]["gram"] == pytest.approx(0.012)


def test_messages_of_an_epoch_are_rows_where_it_solves_and_a_gradient_elsewhere():
    work = Work(rewards=2, updates=4, refresh=2)
    row = predict(Model(10, 100, 20), work, SLOW, 16)
    times = {way: message_seconds(way, 10, 3, 16, SLOW) for way in ("whole", "gradient")}
    assert row["seconds"]["messages"] == pytest.approx(2 * times["whole"] + 2 * times["gradient"])
    gram = 4 * 3 * 10 / 1000
    assert row["ways"]["whole"]["share"] == pytest.approx(2 * (times["whole"] + gram) / row["seconds"]["epoch"])


def test_more_processes_than_prompts_are_marked_and_given_a_prompt_each():
    row = predict(Model(10, 100, 20), Work(), FREE, 64)
    assert (row["refused"], row["prompts"], row["images"], row["idle"]) == (True, 64, 24, 0)


def test_reward_processes_keep_up_and_never_pay_on_machines_of_one_kind():
    work = Work(rewards=2, prompts=8, group_size=1, steps=3, timesteps=1)
    row = predict(Model(10, 100, 20), work, FREE, 8)  # 6 s to sample an image, 1 s to judge it
    aside = row["aside"]
    assert aside["rollout_processes_a_reward_process"] == pytest.approx(6)
    assert aside["reward_processes"] == 2  # 8 / 7, made up
    assert aside["epoch_seconds"] == pytest.approx((row["seconds"]["epoch"] - 1) * 8 / 6)
    for reward in (0.01, 1.0, 100.0):
        found = predict(Model(10, 100, 20), Work(), replace(FREE, reward=reward), 4096)
        assert found["aside"]["epoch_seconds"] > found["seconds"]["epoch"]
    assert predict(Model(10, 100, 20), Work(), replace(FREE, reward=0.0), 8)["aside"]["reward_processes"] == 0
    assert predict(Model(10, 100, 20), Work(), replace(FREE, reward=1e9), 8)["aside"]["epoch_seconds"] is None


def test_constants_say_where_they_come_from():
    found = constants({"flops": 1.0}, {"flops": 2.0, "disk": 3.0}, "here")
    assert (found.flops, found.disk, found.gpus) == (1.0, 3.0, 8)
    assert (found.sources["flops"], found.sources["disk"]) == ("given", "measured: here")
    assert all(source.split(":")[0] in ("given", "measured", "published", "assumed", "measured elsewhere")
               for source in found.sources.values())  # fmt: skip
    assert set(found.sources) == {*vars(found)} - {"sources"}


def test_numbers_of_a_shape_are_those_of_its_network():
    counted = model_of(TINY, 4)
    phase = Phase(TINY, batch=1, rewards=1, rank=4, checkpointing=False, dtype="fp32", device="cpu")
    assert counted.parameters == phase.engine.count
    assert counted.base == sum(p.numel() for p in phase.network.parameters()) - counted.parameters
    assert model_of(TINY, 4, parameters=7).parameters == 7


def test_sd35_medium_by_hand():
    # 24 blocks of 8 layers, the last without to_add_out; 13 with 4 more; width 1536
    model = model_of(SHAPES["sd35-medium"], 32)
    assert model.parameters == (24 * 8 - 1 + 13 * 4) * 2 * 1536 * 32 == 23_887_872
    assert model.base == 2_243_171_520
    # 1024 image tokens, 333 of text: 12 squares a block and stream (text: 3 in the last), 4 more in 13; attention
    image, text, square = 1024, 333, 1536**2
    linear = 2 * square * (image * (24 * 12 + 13 * 4) + text * (23 * 12 + 3))
    attention = 4 * 1536 * (24 * (image + text) ** 2 + 13 * image**2)
    assert model.flops == pytest.approx(linear + attention, rel=0.005)


def test_a_checkpoint_holds_five_sets_of_numbers(untrained):
    config = config_of()
    _, _, parts = Trial.of(untrained).run(config, 1, None)
    state = [parts.policy.adapter_state(name) for name in ("default", "old", "ema")]
    moments = [m for s in parts.updater.state_dict()["optimizer"]["state"].values() for m in s.values()]
    held = sum(t.numel() for each in state for t in each.values()) + sum(m.numel() for m in moments if m.ndim)
    assert 4 * held == predict(Model(parts.engine.count, 0, 0.0), Work(), SLOW, 8)["checkpoint"]["bytes"]


def test_a_line_is_fitted():
    assert fit([(10.0, 3.0), (100.0, 21.0), (1000.0, 201.0)]) == pytest.approx((1.0, 0.2))
    a, b = fit([(10.0, 1.0), (100.0, 20.0)])  # a line would begin below 0
    assert a == 0
    assert 0.1 < b < 0.2


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_predicted_bytes_are_those_that_processes_hand_over(processes):
    results = simulate(processes, [(1001, 3), (20_000, 6)], repeats=1)
    assert [(r["parameters"], r["rows"], r["processes"]) for r in results] == [
        (1001, 3, processes),
        (20_000, 6, processes),
    ]
    lines = check(results, lambda result: True)
    assert len(lines) == 4
    for line in lines:
        assert line["handed_bytes"] == line["predicted_bytes"], line
        assert (line["handed_bytes"] > 0) == (processes > 1)
        assert (line["message_seconds"] > 0) == (processes > 1)
    for result in results:
        assert result["error"] < 3e-7  # both ways have the same Gram and direction


def test_a_process_that_fails_is_named():
    with pytest.raises(MarbleError, match=r"process \d of 1 failed: .*negative dimension"):
        simulate(1, [(-4, 2)], repeats=1)


def test_command_prints_tables_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale, "CHECKED", (1000, 2000, 4000, 8000))
    out = tmp_path / "scale.json"
    argv = ["sd3-small", "--rewards", "2", "--processes", "8", "64", "--flops", "1e12", "--check", "1"]
    assert main(["bench", "scale", *argv, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "64*" in printed
    assert "refused as it is" in printed
    assert "published: NVLink 4" in printed
    assert "1 processes over gloo" in printed
    content = json.loads(out.read_text())
    (table,) = content["tables"]
    assert table["constants"]["sources"]["flops"] == "given"
    assert [row["processes"] for row in table["rows"]] == [8, 64]
    (checked,) = content["check"]
    assert [line["fitted"] for line in checked["messages"]] == 2 * [True, False, True, False]


def test_constants_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale, "_DISK", 2**16)
    monkeypatch.setitem(SHAPES, "sd3-small", TINY)
    out = tmp_path / "scale.json"
    argv = ["sd3-small", "--rewards", "1", "--processes", "8", "--measure", "cpu", "--exact", "1.2", "--json", str(out)]
    assert main(["bench", "scale", *argv]) == 0
    found = json.loads(out.read_text())["tables"][0]["constants"]
    assert found["sources"]["flops"].startswith("measured: here, sd3-small fp32 on cpu")
    assert found["flops"] > 1e8
    assert 1.5 < found["update"] < 10
    assert (found["exact"], found["sources"]["exact"]) == (1.2, "given")
    assert "measured: here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sd35-medum"], 'Did you mean "sd35-medium"'),
        (["--prompts", "0"], "--prompts: at least 1, got 0"),
        (["--group-size", "0"], "--group-size: at least 1, got 0"),
        (["--processes", "8", "0"], "--processes: numbers of at least 1, got [8, 0]"),
        (["--flops", "0"], "--flops: a number above 0, got 0.0"),
        (["--between", "nan"], "--between: a number above 0, got nan"),
        (["--inside-latency", "-1"], "--inside-latency: a number of at least 0, got -1.0"),
        (["--json", "nowhere/at/all.json"], '--json: "nowhere/at/all.json" must be a file'),
        pytest.param(
            ["--measure", "cuda"],
            "torch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_one_message(argv, said, capsys):
    assert main(["bench", "scale", *argv]) == 2
    assert said in capsys.readouterr().err
