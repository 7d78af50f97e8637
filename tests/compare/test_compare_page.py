"""comparison.json and the page, from results written by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from marble.compare import describe, load_comparison, table_of, write_comparison, write_page
from marble.compare.words import costs, number, scores, standings, told
from marble.config import demo_config_path, make_config, read_config
from marble.errors import MarbleError

from .made import result, results

CURVE = [(0, {"a": 1.0, "b": 2.0, "c": None}), (1, {"a": 1.5, "b": 2.0, "c": None})]


@pytest.fixture(scope="module")
def config():
    return make_config(read_config(demo_config_path())).model_dump(mode="json")


@pytest.fixture(scope="module")
def content(config):
    found = results(
        marble={0: result(1.0, 0.5, np.nan, curve=CURVE), 1: result(2.0, 0.7, np.nan, curve=CURVE)},
        ppo={0: result(0.5, -0.5, 0.0), 1: "the <b>disk</b> is full"},
    )
    return describe(found, config)


def test_content_is_plain_json_and_comes_back(content, tmp_path):
    write_comparison(tmp_path, content)
    assert "NaN" not in (tmp_path / "comparison.json").read_text()
    assert load_comparison(tmp_path) == load_comparison(tmp_path / "comparison.json") == content
    assert content["baseline"] == "ppo"
    assert content["base"] == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert content["spread"] == {"a": 0.5, "b": 1.0, "c": 2.0}
    cell = content["arms"]["marble"]["seeds"]["1"]
    assert cell["status"] == "done"
    assert cell["gains"] == {"a": 2.0, "b": pytest.approx(0.7), "c": None}
    assert content["arms"]["ppo"]["seeds"]["1"] == {
        "status": "failed",
        "folder": "cells/ppo-1",
        "error": "the <b>disk</b> is full",
    }


def test_curves_are_over_seeds_where_all_were_evaluated(content):
    curve = content["arms"]["marble"]["curves"]
    assert curve["a"] == {"updates": [0, 1], "mean": [1.0, 1.5], "low": [1.0, 1.5], "high": [1.0, 1.5]}
    assert "c" not in curve
    assert content["arms"]["ppo"]["curves"] == {}


def test_other_files_are_refused(tmp_path):
    with pytest.raises(MarbleError, match="holds no comparison that can be read"):
        load_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"arms": {}}')
    with pytest.raises(MarbleError, match="not what marble compare writes"):
        load_comparison(tmp_path)


def test_a_baseline_without_a_run_is_noted_and_one_that_is_no_arm_refused(config):
    found = results(marble={0: result(1, 1, 1)}, weighted_sum={0: result(1, 1, 1)}, ppo={0: "broke"})
    content = describe(found, config, "ppo", ["as it is"])
    assert content["baseline"] == "weighted-sum"
    said = 'baseline: "ppo" has no finished run; relative gains are over weighted-sum'
    assert content["notes"] == ["as it is", said]
    with pytest.raises(MarbleError, match='"gdpo" is not an arm; those are: marble, weighted-sum, ppo'):
        describe(found, config, "gdpo")


def test_settings_of_arms_are_published_without_servers_and_keys(config):
    found = results(marble={0: result(1, 1, 1)})
    found.overrides["marble"] = {
        "balance.refresh": 5,
        "rewards.0.weight": 2.0,
        "rewards.0.url": ["http://secret:1"],
        "rewards.1.reward": "http://secret:1/mini-text",
        "rewards.1.settings.key": "secret",
        "rewards.1.settings.batch": 3,
        "rewards.2.settings": {"token": "secret", "batch": 4},
        "rewards.3": {"reward": "http://secret:1/x"},
        "held_out_rewards": ["mini-text", {"reward": "y", "settings": {"folder": "/home/secret"}}],
    }
    told = describe(found, config)["arms"]["marble"]["overrides"]
    assert "secret" not in json.dumps(told)
    assert told["balance.refresh"] == 5
    assert told["rewards.0.weight"] == 2.0
    assert told["rewards.1.settings.batch"] == 3
    assert told["rewards.2.settings"] == {"batch": 4}
    assert [use["reward"] for use in told["held_out_rewards"]] == ["mini-text", "y"]


def test_table_of_is_flat_and_ranked(content):
    rows = table_of(content)
    assert [row["arm"] for row in rows] == ["marble", "ppo"]
    assert rows[0]["gain/a"] == 1.5
    assert rows[0]["gain/a/low"] < 1.5 < rows[0]["gain/a/high"]
    assert rows[1]["mean_gain/low"] is None
    assert all(not isinstance(value, dict) for row in rows for value in row.values())


def test_texts():
    assert told({"mean": 0.214, "low": 0.114, "high": 0.314}) == "+0.21 ± 0.10"
    assert told({"mean": -0.2, "low": None, "high": None, "prompts": [-0.3, 0.1]}) == "−0.20 [−0.30, +0.10]"
    assert told({"mean": 0.2, "low": None, "high": None}, 1, sign=False, scale=100) == "20.0"
    assert told({"mean": None, "low": None, "high": None}) == told(None) == number(None) == "–"


def test_tables_have_a_row_an_arm(content):
    assert [row[0] for row in standings(content)] == [row[0] for row in costs(content)] == ["arm", "marble", "ppo"]
    assert [row[3:5] for row in costs(content)[1:]] == [["12", "2"], ["12", "2"]]
    assert [row[0] for row in scores(content)] == ["arm", "base model", "marble", "ppo"]
    assert all(len({len(row) for row in table(content)}) == 1 for table in (standings, costs, scores))


def test_the_page_escapes_and_needs_nothing_else(content, tmp_path):
    for name in ("marble-0", "ppo-0"):
        for part in ("before", "after"):
            folder = tmp_path / "cells" / name / "samples" / part
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "000_0.png")
        prompts = {"before": {"prompts": ['<script>alert("x")</script>']}}
        (tmp_path / "cells" / name / "evaluation.json").write_text(json.dumps(prompts))
    page = write_page(tmp_path, content).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "the &lt;b&gt;disk&lt;/b&gt; is full" in page
    assert "<link" not in page
    assert 'src="http' not in page
    assert page.count("data:image/png") == 3  # the base model and two arms
    assert page.count("<svg") == 2


def test_cells_that_made_more_than_others_are_shown_as_a_range(config, tmp_path):
    found = results(marble={0: result(1, 1, 1), 1: result(1, 1, 1, updates=1)})
    content = describe(found, config, remarks=["a <remark>"])
    assert costs(content)[1][3:5] == ["6 to 12", "1 to 2"]
    for cell in content["arms"]["marble"]["seeds"].values():
        (tmp_path / cell["folder"]).mkdir(parents=True)
        (tmp_path / cell["folder"] / "evaluation.json").write_text('{"before": {"prompts": []}}')
    assert "a &lt;remark&gt;" in write_page(tmp_path, content).read_text()


def test_a_page_of_nothing_but_failures(config, tmp_path):
    page = write_page(tmp_path, describe(results(marble={0: "broke"}), config)).read_text()
    assert "Nothing has been measured yet" in page
    assert "broke" in page
