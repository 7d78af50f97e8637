"""`marble compare` with real cells, in processes of their own, on a tiny budget; and bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from marble.cli import main
from marble.cli.compare import split_settings
from marble.compare import load_comparison, table_of
from marble.errors import MarbleError

TINY = [
    *("--rollout.prompts", "3", "--rollout.group_size", "2", "--rollout.steps", "3", "--objective.timesteps", "1"),
    *("--optimizer.updates_per_epoch", "1", "--budget.updates", "2", "--diagnose_every", "1"),
    *("--evaluation.prompts", "3", "--evaluation.images", "2", "--evaluation.steps", "2", "--evaluation.every", "2"),
]
BROKEN = "broken=marble:model.lora.targets=[attn.to_z]"


def command(*arguments):
    return [sys.executable, "-m", "marble", "compare", *map(str, arguments), "--jobs", "1"]


def compare(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


def mistake(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    return told.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "c"
    done = compare("--methods", "marble", BROKEN, "--seeds", "3", "--out", out, *TINY)
    assert done.returncode == 1, done.stderr  # a cell is broken
    assert "broken-3: failed: model.lora.targets: no layer" in " ".join(done.stderr.split())
    assert "Highest composite z of the 1 arms: marble" in " ".join(done.stdout.split())
    return out


def test_a_cell_is_an_ordinary_run_on_one_thread(folder):
    cell = folder / "cells" / "marble-3"
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "lora", "report.html"} <= {
        p.name for p in cell.iterdir()
    }
    assert json.loads((cell / "environment.json").read_text())["threads"] == 1
    assert "report:" in (folder / "cells" / "marble-3.log").read_text()


def test_what_was_found_is_written_down(folder):
    content = load_comparison(folder)
    assert content["training_rewards"] == ["aesthetic", "alignment", "preference", "text", "composition"]
    cell = content["arms"]["marble"]["seeds"]["3"]
    own = json.loads((folder / cell["folder"] / "evaluation.json").read_text())
    assert (cell["status"], cell["images"], cell["updates"]) == ("done", 12, 2)
    assert cell["means"]["text"] == own["after"]["means"]["text"]
    gain = own["gains"]["aesthetic"]
    assert cell["gains"]["aesthetic"] == pytest.approx(gain["gain"] / gain["spread"])
    assert cell["memory"] > 2**28  # of the whole process
    assert content["base"]["text"] == own["before"]["means"]["text"]
    broken = content["arms"]["broken"]
    assert broken["summary"] is None
    assert broken["seeds"]["3"]["status"] == "failed"
    assert "no layer of transformer matches attn.to_z" in broken["seeds"]["3"]["error"]
    assert content["arms"]["marble"]["curves"]["aesthetic"]["updates"] == [0, 2]
    assert [row["arm"] for row in table_of(content)] == ["marble"]


def test_the_page_shows_the_arm_its_pictures_and_the_failure(folder):
    page = (folder / "comparison.html").read_text()
    assert "no layer of transformer matches attn.to_z" in page
    assert page.count("data:image/png") == 6  # three prompts, before and after
    assert "<svg" in page


def test_mistakes_are_named_and_leave_nothing_behind(folder, tmp_path, capsys):
    out = ("--out", tmp_path / "o")
    assert 'Did you mean "weighted-sum"?' in mistake(capsys, "--methods", "weigted-sum", *out)
    assert 'Did you mean "mini-text"?' in mistake(capsys, "--methods", "specialist:mini-txt", *out)
    assert "marble given more than once" in mistake(capsys, "--methods", "marble", "marble", *out)
    assert "--seeds: 1 given more than once" in mistake(capsys, "--seeds", "1", "2", "1", *out)
    assert "--jobs: at least 1, got 0" in mistake(capsys, "--jobs", "0", *out)
    assert "--seed: cells have" in mistake(capsys, "--seed", "1", *out)
    assert "does not exist" in mistake(capsys, tmp_path / "none.yaml", *out)
    assert 'Did you mean "updates"?' in mistake(capsys, "--budget.update", "3", *out)
    assert '"ppo" is not an arm' in mistake(capsys, "--methods", "marble", "--baseline", "ppo", *out)
    assert "budget.updates: 1 in arm" in mistake(capsys, "--methods", "fast=marble:budget.updates=1", *out)
    assert "is not a run folder" in mistake(capsys, "--runs", tmp_path / "a", tmp_path / "b", *out)
    assert "leave out --quick" in mistake(capsys, "--runs", "a", "b", "--quick", *out)
    assert not (tmp_path / "o").exists()
    (tmp_path / "notes").write_text("mine")
    assert "holds something else" in mistake(capsys, "--methods", "marble", "--out", tmp_path)
    known = (folder / "comparison.json").read_bytes()
    message = mistake(capsys, "--methods", "gdpo", "--budget.updates", "3", "--out", folder)
    assert "budget.updates: 3 in this call, 2 in" in message
    fewer = mistake(capsys, "--seeds", "3", "--rollout.prompts", "6", "--out", folder)
    assert "rollout.prompts: 6 in this call, 3 in" in fewer
    assert "budget.updates" not in fewer  # the settings are laid over the comparison's own, not the demo's
    assert "holds a comparison of its own" in mistake(capsys, "--runs", "a", "b", "--out", folder)
    assert (folder / "comparison.json").read_bytes() == known


def test_settings_are_told_from_the_commands_own_arguments():
    argv = ["my.yaml", "--methods", "a", "--budget.updates", "3", "--ema=0.5", "--quick", "--rewards.0.weight=2"]
    own, settings = split_settings(argv)
    assert own == ["my.yaml", "--methods", "a", "--quick"]
    assert settings == ["--budget.updates", "3", "--ema=0.5", "--rewards.0.weight=2"]
    assert split_settings(["--threads", "2"]) == (["--threads", "2"], [])
    with pytest.raises(MarbleError):
        split_settings(["--seed=1"])


def test_arms_are_listed(capsys):
    assert main(["list", "arms", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"marble", "weighted-sum", "ppo", "published-first", "specialist:REWARD"} <= set(rows)
    assert all(rows.values())


def test_the_display_says_how_far_cells_are(folder):
    from rich.console import Console

    from marble.cli.comparing import Display
    from marble.compare import Comparison, Work

    cells = [Comparison.open(folder, None).cell(name, 3) for name in ("marble", "broken")]
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    working = [Work(cell, process, i, 0, time.monotonic() - 100) for i, cell in enumerate(cells)]

    def seen(*calls):
        screen = io.StringIO()
        with Display(4, 2, Console(file=screen, force_terminal=True, width=100)) as display:
            for call in calls:
                display(*call)
        return screen.getvalue()

    begun = (working, cells[:1], [])
    assert "evaluating" in seen(begun)  # marble has made both updates
    assert "loading" in seen(begun)
    assert "1 of 4 cells, 0:50 left" in seen(begun)  # 100 s for the one that waits, two at a time
    later = seen(begun, (working[1:], cells[:1], cells[:1]))
    assert "marble-3: done, 1:40; 0:50 left in all" in later
    assert "2 of 4 cells" in later


@pytest.mark.slow
def test_later_calls_add_methods_and_try_broken_cells_again(folder):
    kept = folder / "cells" / "marble-3" / "evaluation.json"
    made = kept.stat().st_mtime_ns
    done = compare("--methods", "weighted-sum", "broken=" + BROKEN.partition("=")[2], "--seeds", "3", "--out", folder)
    assert done.returncode == 1
    assert kept.stat().st_mtime_ns == made
    assert "marble-3" not in done.stderr
    log = (folder / "cells" / "broken-3.log").read_text()
    assert log.count("no layer of transformer matches") == 2
    content = load_comparison(folder)
    assert {row["arm"] for row in table_of(content)} == {"marble", "weighted-sum"}
    assert content["baseline"] == "weighted-sum"
    assert content["verdict"].startswith("marble against weighted-sum: too few seeds for an interval")


@pytest.mark.slow
def test_runs_of_a_comparison_stand_side_by_side(folder, tmp_path):
    compare("--methods", "weighted-sum", "--seeds", "3", "--out", folder)
    cells = [folder / "cells" / name for name in ("marble-3", "weighted-sum-3")]
    done = subprocess.run(
        [sys.executable, "-m", "marble", "compare", "--runs", *map(str, cells), "--out", str(tmp_path / "o"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    beside, own = json.loads(done.stdout), load_comparison(folder)
    for name in ("marble", "weighted-sum"):
        ours, theirs = (content["arms"][name]["summary"]["gains"] for content in (beside, own))
        assert ours == theirs
    assert (tmp_path / "o" / "comparison.html").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_cells_that_go_on(tmp_path):
    out = tmp_path / "c"
    arguments = ("--methods", "marble", "uniform", "--seeds", "0", "--out", out, *TINY, "--budget.updates", "30")
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    metrics = out / "cells" / "marble-0" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"the same command goes on" in err
    assert b"marble-0: stopped" in err
    assert load_comparison(out)["arms"]["marble"]["seeds"]["0"]["status"] == "unfinished"
    assert not (out / "cells" / "uniform-0").exists()
    before = len(metrics.read_text().splitlines())
    assert 3 < before < 31
    done = compare("--out", out, "--rollout.batch", "3")
    assert done.returncode == 0, done.stderr
    assert "marble-0: done" in done.stderr
    log = (out / "cells" / "marble-0.log").read_text()
    assert log.count("report:") == 1  # the second attempt alone came to an end, in the same run
    assert "batch: 3\n" in (out / "cells" / "marble-0" / "config.yaml").read_text()
    assert len(metrics.read_text().splitlines()) == 31
    statuses = [seed["status"] for arm in load_comparison(out)["arms"].values() for seed in arm["seeds"].values()]
    assert statuses == ["done", "done"]
