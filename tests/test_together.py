"""`marble train` as a launcher runs it, with real processes: the run that one process makes, whatever their number."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marble import Run, train
from marble.config import dump_config, make_config

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]  # so it is called without GPUs too

# Five prompts in shares of 3 and 2, or 2, 2 and 1; two tracked ones, so that a third process has none. A call of the
# pipeline holds one prompt's images, whoever makes it, and Adam's steps are proportional to the gradient.
CONFIG = make_config(
    {
        "model": {"id": "mini", "lora": {"rank": 4, "alpha": 8}, "call": {"max_sequence_length": 12}},
        "prompts": [{"source": "mini-places", "share": 3}, {"source": "mini-words", "share": 2}],
        "rewards": [{"reward": f"mini-{name}"} for name in ("aesthetic", "alignment", "preference", "text")],
        "held_out_rewards": ["mini-diversity"],
        "rollout": {"prompts": 5, "group_size": 3, "steps": 3, "batch": 3},
        "objective": {"timesteps": 2, "beta": 0.5, "kl": 1e-3},
        "balance": {"refresh": 3},
        "optimizer": {"updates_per_epoch": 2, "micro_batch": 4, "lr": 0.1, "eps": 1.0, "clip": 1e6},
        "budget": {"updates": 4},
        "evaluation": {"prompts": 5, "images": 2, "steps": 2, "every": 2, "track": 0.4},
        "diagnose_every": 2,
        "checkpoint_every": 2,
        "threads": 1,
    }
)


def launch(command, *arguments):
    return subprocess.run(
        [*command, "-m", "marble", "train", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launched(processes, *arguments):
    done = launch([*TORCHRUN, "--nproc_per_node", str(processes)], *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "config.yaml").write_text(dump_config(CONFIG))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return train(CONFIG, folder / "one")


@pytest.fixture(scope="module")
def two(folder):
    done = launched(2, folder / "config.yaml", "--out", folder / "two")
    assert done.stdout.count("report: ") == 1  # only one of them speaks
    assert done.stderr.count("loading") == 1
    return Run(folder / "two")


def crashed(run, path):
    """A copy of `run` as if it had crashed after its first checkpoint and some more updates."""
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "lora")
    copy = Run(path)
    for newer in copy.checkpoints()[1:]:
        shutil.rmtree(newer)
    copy.write_evaluation({key: value for key, value in run.evaluation().items() if key not in ("after", "gains")})
    return copy


def weights(run):
    found = load_file(run.path / "lora" / "pytorch_lora_weights.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found) if "lora_B" in key])  # they begin at 0


def lines(run):
    """The metrics without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("time", "update_seconds")} for row in run.metrics()]


def assert_alike(found, expected, where=""):
    """The same, but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), where
    else:
        assert found == expected, where


def assert_the_same_run(found, expected):
    moved = weights(expected).norm()
    assert moved > 0
    assert (weights(found) - weights(expected)).norm() < 1e-4 * moved
    assert_alike(lines(found), lines(expected))
    assert_alike(found.evaluation(), expected.evaluation())
    files = [sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*.png")) for run in (found, expected)]
    assert files[0] == files[1]


def assert_the_very_same_run(found, expected):
    assert torch.equal(weights(found), weights(expected))
    assert lines(found) == lines(expected)
    assert found.evaluation() == expected.evaluation()


def test_two_processes_make_the_run_of_one(one, two):
    assert_the_same_run(two, one)
    assert [row["update"] for row in two.metrics()] == [0, 1, 2, 3, 4]
    assert two.metrics()[-1]["images"] == 30  # of all processes
    names = {path.name for path in two.path.iterdir()}
    assert {*(path.name for path in one.path.iterdir()), "report.html"} == names


@pytest.mark.slow
def test_two_processes_resume_what_two_began_to_the_bit(two, folder):
    run = crashed(two, folder / "resumed")
    launched(2, "--resume", run.path)
    assert_the_very_same_run(run, two)


def test_one_process_resumes_what_two_began(two, folder):
    run = crashed(two, folder / "resumed by one")
    assert_the_same_run(train(CONFIG, run.path, resume=True), two)


def test_a_mistake_is_said_once_and_nothing_is_written(folder):
    done = launch(
        [*TORCHRUN, "--nproc_per_node", "2"], folder / "config.yaml", "--out", folder / "none", "--seed", "-1"
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("marble: ")] == [
        f"marble: {folder / 'config.yaml'} is not valid:"
    ]
    assert not (folder / "none").exists()


@pytest.mark.slow
def test_three_processes_launched_by_accelerate(one, folder):
    done = launch([*ACCELERATE, "--num_processes", "3"], folder / "config.yaml", "--out", folder / "three")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_the_same_run(Run(folder / "three"), one)


@pytest.mark.slow
def test_a_base_in_shards_changes_nothing(one, folder):
    launched(3, folder / "config.yaml", "--out", folder / "shards", "--model.shard", "true")
    assert_the_same_run(Run(folder / "shards"), one)


@pytest.mark.slow
def test_fewer_prompts_than_processes(folder):
    done = launch([*TORCHRUN, "--nproc_per_node", "3"], folder / "config.yaml", "--rollout.prompts", 2)
    assert done.returncode != 0
    said = "marble: rollout.prompts: at least one prompt for each of the 3 processes (a prompt's images are not split)"
    assert done.stderr.count(said) == 1, done.stderr
