"""The real command line, in processes of its own, on tiny budgets and bad input."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from marble.cli import COMMANDS, main
from marble.cli.settings import describe_settings, override
from marble.cli.train import _resumable
from marble.config import demo_config_path, read_config
from marble.errors import MarbleError

TINY = [
    *("--rollout.prompts", "3", "--rollout.group_size", "2", "--rollout.steps", "3", "--objective.timesteps", "1"),
    *("--optimizer.updates_per_epoch", "1", "--budget.updates", "2", "--threads", "1"),
    *("--evaluation.prompts", "3", "--evaluation.images", "2", "--evaluation.steps", "2", "--evaluation.every", "0"),
]


def marble(*arguments, cwd=None, **options):
    command = [sys.executable, "-m", "marble", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, **options)


def mistake(*arguments):
    """Run a command, in this process for speed, that must fail as a user's mistake; returns its one message."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert code == 2, (out.getvalue(), err.getvalue())
    assert out.getvalue() == ""
    before, mark, message = err.getvalue().partition("marble: ")
    assert mark
    assert "Traceback" not in before + message
    return message


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    done = marble("demo", "--out", folder / "run", "--json", *TINY)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["gains"]) >= {"aesthetic", "text"}
    return folder / "run"


def test_demo_writes_a_report_and_a_lora(run):
    assert (run / "report.html").stat().st_size > 50_000
    assert (run / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["budget"]["updates"] == 2


def test_report_is_made_again(run):
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert marble("report", run).returncode == 0
    assert (run / "report.html").read_bytes() == before


def test_generate_equals_stock_diffusers_without_marble(run, tmp_path):
    prompt = "a red circle left of a blue square"
    done = marble(
        "generate",
        "mini",
        prompt,
        "--lora",
        run / "lora",
        "--seed",
        5,
        "--count",
        2,
        "--steps",
        4,
        "--out",
        tmp_path / "a",
    )
    assert done.returncode == 0, done.stderr
    calls = json.loads((tmp_path / "a" / "calls.json").read_text())
    assert [row["seed"] for row in calls["images"]] == [5, 6]
    from marble.mini import model_folder

    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(model_folder())!r})
pipe.load_lora_weights({str(run / "lora")!r})
generator = torch.Generator().manual_seed(6)
image = pipe({prompt!r}, num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
image.save({str(tmp_path / "b.png")!r})
assert "marble" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    from PIL import Image, ImageChops

    own, stock = Image.open(tmp_path / "a" / "000_6.png"), Image.open(tmp_path / "b.png")
    assert own.size == (64, 64)
    assert ImageChops.difference(own, stock).getbbox() is None


def test_generate_takes_a_run_folder(run, tmp_path):
    done = marble("generate", run, "a beach at noon", "--steps", 2, "--out", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["file"] == "000_0.png"
    assert json.loads((tmp_path / "a" / "calls.json").read_text())["lora"] == str(run / "lora")


def test_validate(tmp_path):
    good = marble("validate", demo_config_path())
    assert good.returncode == 0
    assert "5 rewards" in good.stdout
    values = read_config(demo_config_path())
    values["rewards"][0]["rewrd"] = "x"
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(values))
    assert 'rewards.0.rewrd: unknown setting. Did you mean "reward"?' in mistake("validate", bad)


@pytest.mark.parametrize("what", ["models", "rewards", "methods", "objectives", "prompts"])
def test_list(what):
    rows = json.loads(marble("list", what, "--json").stdout)
    assert rows
    assert all(rows.values())  # each with a line about it


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    done = marble(command, "--help")
    assert done.returncode == 0
    assert "example" in done.stdout


def test_overview_is_quick():
    code = "import sys; from marble.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_mistakes_are_one_message(tmp_path, run):
    assert 'Did you mean "train"?' in mistake("trian")
    assert "does not exist" in mistake("train", tmp_path / "none.yaml")
    assert "exists and is not empty" in mistake("demo", "--out", run)
    assert "not a run folder" in mistake("report", tmp_path)
    assert "is finished" in mistake("train", "--resume", run)
    assert "does not exist" in mistake("generate", tmp_path / "none", "x", "--out", tmp_path / "o")
    assert "not a Diffusers pipeline" in mistake("generate", tmp_path, "x", "--out", tmp_path / "o")
    assert "holds no pytorch_lora" in mistake("generate", "mini", "x", "--lora", tmp_path, "--out", tmp_path / "o")
    assert "--count: must be at least 1" in mistake("generate", "mini", "x", "--count", 0, "--out", tmp_path / "o")
    assert "--seed: must be" in mistake("generate", "mini", "x", "--seed", 10**20, "--out", tmp_path / "o")
    assert "refuses" in mistake("generate", "mini", "x", "--height", 65, "--out", tmp_path / "o")
    (tmp_path / "file").write_text("x")
    assert "is a file" in mistake("generate", "mini", "x", "--out", tmp_path / "file" / "o")
    assert "is not valid YAML" in mistake("validate", run / "samples" / "before" / "000_0.png")
    assert 'Did you mean "pretrain"?' in mistake("mini", "pretrian")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--rollout.group_sise", "4"], 'Did you mean "group_size"?'),
        (["--rollout.group_size", "1"], "rollout.group_size: input should be greater than or equal to 2, got 1"),
        (["--rollout.group_size", "many"], "rollout.group_size"),
        (["--rewards", "[]"], "rewards: list should have at least 1 item"),
        (["--rewards.7.weight", "2"], "the list has items 0 to 4"),
        (["--model.id", "nothing"], 'model "nothing" does not exist'),
        (["--prompts.0.source", "mini-place", "--seed", "3"], 'Did you mean "mini-places"?'),
        (["--seed"], "expected a value"),
        (["--model.id", "@x"], "cannot read the value"),
        (["--rewards.0.reward", "os:path"], "is no reward"),
        (["--model.call.max_seq", "3"], "takes no max_seq"),
        (["--evaluation.prompts", "600"], "which has 18; use 54"),
        (["--model.lora.targets", "[attn.to_q, attn.to_z]"], "no layer of transformer matches attn.to_z"),
        (["extra"], "does not exist"),
    ],
)
def test_bad_settings_leave_nothing_behind(setting, message, tmp_path):
    arguments = ["train", *setting, "--out", tmp_path / "run"]
    assert message in mistake(*arguments)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "marble",
        "train",
        "--out",
        str(tmp_path / "run"),
        *TINY,
        "--budget.updates",
        "400",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"-m marble train --resume {tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    done = len(metrics.read_text().splitlines())
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("updates: 400", f"updates: {done + 1}"))
    assert marble("train", "--resume", tmp_path / "run").returncode == 0
    assert json.loads(metrics.read_text().splitlines()[-1])["update"] == done + 1


def test_settings_are_laid_over_a_config():
    values = {"a": {"b": 1}, "items": [{"w": 1}]}
    override(values, ["--a.b", "1e-4", "--items.0.w=2", "--new.thing", "[1, 2]", "--none", "null"])
    assert values == {"a": {"b": 1e-4}, "items": [{"w": 2}], "new": {"thing": [1, 2]}, "none": None}
    for bad in (["value"], ["--a"], ["--a.b.c", "1"], ["--items.x", "1"]):
        with pytest.raises(MarbleError):
            override({"a": {"b": 1}, "items": [1]}, bad)


def test_settings_of_a_reward_that_is_given_by_its_name_alone():
    values = {"rewards": ["one", {"reward": "two"}]}
    override(values, ["--rewards.0.weight", "2", "--rewards.0.settings.batch", "8", "--rewards.1.url", "http://a:1"])
    one, two = {"reward": "one", "weight": 2, "settings": {"batch": 8}}, {"reward": "two", "url": "http://a:1"}
    assert values == {"rewards": [one, two]}


@pytest.mark.parametrize(
    ("setting", "may"),
    [
        ("rewards.0.url", True),
        ("held_out_rewards.12.url", True),
        ("rewards.3.settings.timeout", True),
        ("held_out_rewards.0.settings.device", True),
        ("missing_limit", True),
        ("optimizer.lr", True),
        ("rewards.0.reward", False),
        ("rewards.0.settings.threshold", False),
        ("rewards.0.settings.name", False),
        ("rewards.x.url", False),
        ("url", False),
        ("timeout", False),
        ("seed", False),
    ],
)
def test_what_a_run_may_go_on_with_otherwise(setting, may):
    assert _resumable(setting) == may


def test_every_setting_is_described():
    text = describe_settings()
    assert "--optimizer.lr float = 0.0003" in text
    assert "--rewards.N.weight" in text
    assert "--balance.method str = marble  see marble list methods" in text
    assert "--balance.smooth weights|gram = weights" in text
