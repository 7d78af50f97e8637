"""`marble evaluate` by the real command line: a run, its LoRA alone, a whole denoiser, and bad input."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from marble.cli import main
from marble.evaluation import Evaluation, gains

TINY = [
    *("--rollout.prompts", "3", "--rollout.group_size", "2", "--rollout.steps", "3", "--objective.timesteps", "1"),
    *("--optimizer.updates_per_epoch", "1", "--budget.updates", "2", "--threads", "1", "--optimizer.lr", "5e-3"),
    *("--evaluation.prompts", "5", "--evaluation.images", "2", "--evaluation.steps", "2", "--evaluation.every", "0"),
]


def run(*arguments):
    """Exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def mistake(*arguments):
    """The message of a command that must fail as a user's mistake."""
    code, out, err = run("evaluate", *arguments)
    assert (code, out) == (2, ""), (out, err)
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, _, err = run("train", "--out", folder, *TINY)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The folder of its evaluation, and what was said."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    command = [sys.executable, "-m", "marble", "evaluate", str(trained), "--out", str(out), "--portion", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_is_evaluated_as_it_evaluated_itself(trained, evaluated):
    own, found = (json.loads((folder / "evaluation.json").read_text()) for folder in (trained, evaluated[0]))
    assert found["reference"]["prompts"] == own["before"]["prompts"]
    sides = [Evaluation.from_json(content) for content in (found["reference"], found["evaluated"])]
    for name, gain in gains(*sides).items():
        assert gain.gain == pytest.approx(own["gains"][name]["gain"], abs=1e-4), name
        assert found["rewards"][name]["difference"]["value"] == pytest.approx(gain.gain), name
    assert any(abs(gain["gain"]) > 1e-4 for gain in own["gains"].values())
    kinds = {name: row["kind"] for name, row in found["rewards"].items()}
    assert [name for name, kind in kinds.items() if kind == "held-out"] == own["held_out_rewards"]


def test_the_table(trained, evaluated):
    out, text = evaluated
    rewards = json.loads((out / "evaluation.json").read_text())["rewards"]
    line = next(line for line in text.splitlines() if line.startswith("aesthetic"))
    for key, shown in (("mean", "{:.4f}"), ("difference", "{:+.4f}"), ("win_rate", "{:.3f}")):
        figures = [rewards["aesthetic"][key][part] for part in ("value", "low", "high")]
        assert "{} [{}, {}]".format(*(shown.format(figure) for figure in figures)) in line
    assert "right (≥ 0.9)" in text
    assert "second-alignment (held out)" in text
    assert f"mini with {trained / 'lora'} against base" in text
    assert str(out / "evaluation.json") in text


def test_a_finished_evaluation_is_printed_again(trained, evaluated):
    out, text = evaluated
    again = ("evaluate", trained, "--out", out, "--portion", "3")
    assert run(*again) == (0, text, "")
    code, printed, _ = run(*again, "--json")
    assert code == 0
    assert json.loads(printed) == json.loads((out / "evaluation.json").read_text())


def test_a_model_alone_with_too_few_prompts_for_intervals(tmp_path):
    few = ("--evaluation.prompts", "4", "--evaluation.images", "1", "--evaluation.steps", "2", "--threads", "1")
    code, text, err = run("evaluate", "mini", "--out", tmp_path / "out", "--held_out_rewards", "[]", *few)
    assert code == 0, err
    assert "too few prompts" in next(line for line in text.splitlines() if line.startswith("composition"))
    assert "too few prompts for an interval of aesthetic, alignment, preference, text, composition" in text
    assert "at least 5, better 20" in text
    assert "win rate" not in text
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["rewards"]["text"]["mean"]["low"] is None
    assert content["reference"] is None
    assert "diversity" not in content["rewards"]  # of one image there is none


def test_the_lora_alone_at_less_strength_against_the_run(trained, tmp_path):
    few = ("--evaluation.prompts", "3", "--evaluation.images", "2", "--evaluation.steps", "2")
    given = ("mini", "--lora", trained / "lora", "--scale", "0.5", "--against", trained, "--out", tmp_path / "out")
    code, text, err = run("evaluate", *given, *few)
    assert code == 0, err
    assert f"mini with {trained / 'lora'} at 0.5 times its strength against {trained / 'lora'}" in text
    setup = json.loads((tmp_path / "out" / "setup.json").read_text())
    assert setup["lora"]["sha256"] == setup["against"]["sha256"]


@pytest.mark.slow
def test_a_whole_denoiser(tmp_path):
    code, _, err = run("train", "--out", tmp_path / "run", "--model.train", "full", *TINY, "--optimizer.lr", "1e-4")
    assert code == 0, err
    code, text, err = run("evaluate", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0, err
    assert f"mini with {tmp_path / 'run' / 'transformer'} against base" in text
    own, found = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "out"))
    after, again = own["after"]["means"], found["evaluated"]["means"]
    assert again["aesthetic"] == pytest.approx(after["aesthetic"], abs=1e-4)
    assert again["aesthetic"] != found["reference"]["means"]["aesthetic"]


def test_mistakes_are_one_message(trained, evaluated, tmp_path):
    out = tmp_path / "out"
    assert "--config: give one" in mistake("owner/name", "--out", out)
    assert "is neither a file" in mistake("mini", "--lora", tmp_path / "none", "--out", out)
    assert "unknown setting" in mistake("mini", "--evaluation.promts", "3", "--out", out)
    assert "got 0" in mistake("mini", "--evaluation.prompts", "0", "--out", out)
    assert 'Did you mean "mini-text"' in mistake("mini", "--rewards.0.reward", "mini-tex", "--out", out)
    assert "does not exist" in mistake("mini", "--config", tmp_path / "none.yaml", "--out", out)
    assert "exists and is not empty" in mistake("mini", "--out", trained)
    assert "portion: 3 there, 8 here" in mistake(trained, "--out", evaluated[0])
    against = ("--against", evaluated[0] / "evaluation.json", "--out", out)
    assert "steps: 2 there, 3 here" in mistake(trained, *against, "--evaluation.steps", "3")
    assert not out.exists()


def test_a_bad_flag_fails_before_torch_is_imported():
    code = (
        "import sys\nfrom marble.cli import main\ntry:\n    main(['evaluate', 'mini'])\n"
        "except SystemExit as end:\n    sys.exit(3 if 'torch' in sys.modules else end.code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2


@pytest.mark.slow
def test_two_processes_by_torchrun(trained, evaluated, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "marble", "evaluate"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    given = [str(trained), "--out", str(tmp_path / "out"), "--portion", "3"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    one, two = ((folder / "evaluation.json").read_bytes() for folder in (evaluated[0], tmp_path / "out"))
    assert one == two
