"""`marble pareto` as it is called, over two tiny real runs, and bad input."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from marble.cli import main

from ..pareto.made import made_run
from ..pareto.running import two_runs


def call(*arguments):
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["pareto", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def mistake(*arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, ""), (out, err)
    return err.partition("marble: ")[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("runs"))


def test_a_front_over_two_runs(runs, tmp_path):
    command = [*runs, "--out", tmp_path / "front", "--rewards", "aesthetic", "preference", "composition"]
    command += ["--scales", "0", "0.5", "1", "--checkpoints", "--soups", "1", "--json"]
    code, out, err = call(*command)
    assert code == 0, err
    content = json.loads(out)
    assert content == json.loads((tmp_path / "front" / "pareto.json").read_text())
    assert [p["name"] for p in content["points"]] == [
        *("base", "aesthetic", "aesthetic × 0.5", "aesthetic after 1 updates"),
        *("preference", "preference × 0.5", "preference after 1 updates", "0.5 aesthetic + 0.5 preference"),
    ]
    assert {p["name"] for p in content["points"] if p["taken"]} == {"base", "aesthetic", "preference"}
    assert content["training_rewards"] == ["aesthetic", "preference"]
    assert next(iter(content["sets"])) == "aesthetic / preference / composition"
    page = (tmp_path / "front" / "pareto.html").read_text()
    assert page.count("<circle data-index=") == page.count("<article data-index=") == 8
    assert page.count("<img ") == 8 * 4
    assert "http" not in page.replace("http://www.w3.org", "")

    points = sorted((tmp_path / "front" / "points").glob("*.json"))
    before = [file.stat().st_mtime_ns for file in points]
    code, out, _ = call(*command)  # what is measured is measured
    assert code == 0
    assert json.loads(out) == content
    assert [file.stat().st_mtime_ns for file in points] == before


def test_a_table_without_json(runs, tmp_path):
    unfinished = made_run(tmp_path / "unfinished", finished=False)
    code, out, err = call(*runs, unfinished, "--out", tmp_path / "front")
    assert code == 0, err
    assert "hypervolume over the base model" in out
    assert "left out: unfinished" in out
    assert str(tmp_path / "front" / "pareto.html") in out


def test_mistakes_are_one_message(runs, tmp_path):
    out = ["--out", tmp_path / "front"]
    assert 'Did you mean "aesthetic"' in mistake(*runs, *out, "--rewards", "aestetic", "preference")
    assert "two or three" in mistake(*runs, *out, "--rewards", "preference")
    assert "is none of the finished runs" in mistake(*runs, *out, "--soup", "aesthetic", "preferense")
    assert "--soups: mixes specialists" in mistake(runs[0], *out, "--soups", "2")
    assert "is not a run folder" in mistake(tmp_path, *out)
    assert "given more than once" in mistake(runs[0], runs[0], *out)
    made = made_run(tmp_path / "made")
    assert "cannot be put on one front" in mistake(*runs, made, *out)
    alone = made_run(tmp_path / "alone", finished=False)
    assert "needs two points" in mistake(alone, *out)
    assert "evaluation.prompts" in mistake(*runs, *out, "--prompts", "600")
    assert not (tmp_path / "front").exists()
    assert "exists and is not empty" in mistake(*runs, "--out", runs[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales", "0.5", "-1", "inf"], "--scales: must be finite and at least 0, got -1, inf"),
        (["--soups", "-1"], "--soups: must be at least 0, got -1"),
        (["--prompts", "1"], "--prompts: must be at least 2, got 1"),
        (["--optimizer.lr", "1"], "cannot be changed here"),
        (["--evaluation.step", "1"], 'Did you mean "evaluation.steps"'),
    ],
)
def test_a_bad_flag_fails_before_anything_heavy(flags, message, tmp_path):
    code = (
        "import sys; from marble.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "pareto", str(tmp_path), "--out", str(tmp_path / "front"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_no_number_is_refused(tmp_path):
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
        call(tmp_path, "--out", tmp_path / "front", "--scales", "half")
    assert caught.value.code == 2
