"""The real command on the embedded model with a tiny budget, its page, and bad input."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
import yaml

from marble.cli import main
from marble.config import demo_config_path, read_config
from marble.conflict.gather import Picture
from marble.conflict.page import conflict_page

TINY = [
    *("--batches", "3", "--rollout.prompts", "6", "--rollout.group_size", "3", "--rollout.steps", "3"),
    *("--objective.timesteps", "1", "--optimizer.updates_per_epoch", "2", "--threads", "1"),
]


def call(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["conflict", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def mistake(*arguments):
    code, out, err = call(*arguments)
    assert code == 2, (out, err)
    assert not out
    assert err.startswith("marble: ")
    return err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conflict") / "out"
    code, out, err = call("mini", "--out", folder, "--json", *TINY)
    assert code == 0, err
    assert "6 of 6 updates" in err
    return folder, json.loads(out)


def test_what_is_written(measured):
    folder, content = measured
    assert sorted(path.name for path in folder.iterdir()) == ["conflict.html", "conflict.json"]
    assert json.loads((folder / "conflict.json").read_text()) == content
    names = ["aesthetic", "alignment", "preference", "text", "composition"]
    assert content["rewards"] == names
    assert content["setup"]["visits"] == 9  # 6 · 3 images at one timestep, in two updates
    rows = content["scores"]["rewards"]
    assert [rows[name]["judges"] for name in names] == pytest.approx([1, 1, 1, 1 / 3, 1 / 3])
    assert sum(rows[name]["owns"] for name in names) == pytest.approx(1)
    assert sum(content["scores"]["informative"].values()) == pytest.approx(1)
    gradients = content["gradients"]
    assert gradients["pull"] < 1e-5  # a fresh adapter feels none
    assert gradients["directions"]["fresh"]["advantage"]["conflict_rate"] == 0
    assert len(gradients["cosines_true"]["estimate"]) == 5
    rules = {finding["rule"] for finding in content["advice"]["findings"]}
    assert {"spreads", "specialist"} <= rules
    assert yaml.safe_load(content["advice"]["suggested"]["config"])["balance"]["method"] == "marble"


def test_the_page_is_self_contained(measured):
    folder, content = measured
    page = (folder / "conflict.html").read_text()
    for heading in ("A suggested set-up", "Do the gradients conflict?", "Specialist map", "What they disagree on"):
        assert heading in page
    assert page.count("<svg") == 5
    assert "data:image/png;base64," in page
    links = re.findall(r'(?:src|href)="([^"#]*)', page)
    assert all(link.startswith("data:") for link in links if link)
    assert content["advice"]["findings"][0]["finding"].split(".")[0] in page


def test_everything_shown_is_escaped(measured):
    _, content = measured
    bad, text = "<b>$x$ & $y^", json.dumps(content)
    content = json.loads(text.replace('"aesthetic"', json.dumps(bad))) | {"model": "<i>model"}
    scores = np.random.default_rng(0).normal(size=(6, 5))
    picture = Picture(torch.zeros(3, 8, 8, dtype=torch.uint8), "<script>alert(1)</script>", [1.0] * 5, [2.0] * 5)
    page = conflict_page(content, scores, ["<em>$source"] * 6, [picture])
    for raw in ("<b>$", "<i>model", "<script>alert", "<em>$"):
        assert raw not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;$x$ &amp; $y^" in page


def config_of(tmp_path, **changes):
    values = read_config(demo_config_path()) | changes
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_mistakes_are_found_before_anything_is_loaded(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("marble.conflict.measure.assemble", lambda config: pytest.fail("loaded"))
    one = config_of(tmp_path, rewards=[{"reward": "mini-text"}])
    assert "one reward alone has nothing to conflict with, got mini-text" in mistake(
        "mini", "--config", one, "--out", out
    )
    assert 'Did you mean "mini-text"?' in mistake("mini", "--rewards.0.reward", "mini-tex", "--out", out)
    idle = config_of(tmp_path, prompts=[{"source": "mini-places"}], evaluation={"prompts": 9})
    assert "text, composition applies to no prompt" in mistake("mini", "--config", idle, "--out", out)
    assert '--config: needed for "other/model"' in mistake("other/model", "--out", out)
    assert 'model "./none" does not exist' in mistake("./none", "--config", config_of(tmp_path), "--out", out)
    assert "--model.id: the model is the first argument" in mistake("mini", "--model.id", "x", "--out", out)
    assert "--batches: at least 3, got 2" in mistake("mini", "--batches", 2, "--out", out)
    assert 'Did you mean "group_size"?' in mistake("mini", "--rollout.group_sise", 4, "--out", out)
    assert "does not exist" in mistake("mini", "--config", tmp_path / "none.yaml", "--out", out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process, got 2 processes" in mistake("mini", "--out", out)
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists and is not empty" in mistake("mini", "--out", tmp_path / "full")
    assert not out.exists()


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("marble.conflict.measure.gather", interrupted)
    monkeypatch.setattr("marble.conflict.measure.assemble", lambda config: None)
    code, out, err = call("mini", "--out", tmp_path / "out", *TINY)
    assert (code, out) == (130, "")
    assert err.endswith("marble: interrupted\n")
    assert not (tmp_path / "out").exists()
