"""Two processes, each with a part of the images, do what one does with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marble import MarbleError, distributed
from marble.distributed import (
    active,
    agree,
    decide,
    gather_rows,
    share,
    spread,
    start,
    sum_gradients,
    sum_over_processes,
    total,
)

from .small import REWARDS, Trial
from .two_processes import CASES, OWN, PATIENCE, ROWS, pipeline_run, run_all, toy_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trial(untrained):
    return Trial.of(untrained)


@pytest.fixture(scope="module")
def both(trial, untrained, tmp_path_factory):
    """The results of two processes, this one and another."""
    folder = tmp_path_factory.mktemp("two")
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    other = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.two_processes", str(folder), str(untrained)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        mine = run_all(0, folder, trial)
        _, errors = other.communicate(timeout=PATIENCE)
    except Exception as error:
        other.kill()
        raise AssertionError(f"the other process said: {other.communicate()[1]}") from error
    finally:
        other.kill()
        del os.environ["GLOO_SOCKET_IFNAME"]
    assert other.returncode == 0, errors
    return [mine, torch.load(folder / "other.pt", weights_only=True)]


def far(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_per_reward_gradients_of_two_processes_are_those_of_one(both):
    one = toy_run(OWN[None])
    assert torch.equal(both[0]["toy"]["alphas"], both[1]["toy"]["alphas"])
    assert torch.equal(both[0]["toy"]["parameters"], both[1]["toy"]["parameters"])
    assert far(both[0]["toy"]["parameters"], one["parameters"]) < 1e-10
    assert far(both[0]["toy"]["alphas"], one["alphas"]) < 1e-10
    assert len(one["alphas"].unique(dim=0)) == 3  # a balance of its own at every solve


def test_rows_are_reduced_once_a_solve_and_nothing_during_micro_batches(both):
    count = toy_run(OWN[None])["count"]
    for results in both:
        assert results["toy"]["reduced"] == [[(REWARDS + 1) * count], [count]] * 3
    assert toy_run(OWN[None])["reduced"] == [[], []] * 3


@pytest.mark.parametrize("case", CASES)
def test_an_update_of_two_processes_is_that_of_one(both, trial, case):
    first, second = (results[case] for results in both)
    one = pipeline_run(trial, case, None)
    assert one is not None, "a process has a micro-batch without images"
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["alpha"], second["alpha"])
    assert first["metrics"] == second["metrics"]
    went = (one["parameters"] - trial.origin).norm()
    if case == "solve on a share":  # of each process's own visits: not the same as one process's
        assert (first["parameters"] - one["parameters"]).norm() < 0.2 * went
        return
    assert (first["parameters"] - one["parameters"]).norm() < 1e-5 * one["parameters"].norm()
    assert (first["parameters"] - one["parameters"]).norm() < 1e-3 * went
    for found, expected in zip(first["metrics"], one["metrics"], strict=True):
        assert found.keys() == expected.keys()
        for key in expected:
            if key == "reward_cosines":
                torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), atol=1e-4, rtol=0)
            else:
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


def test_an_update_sends_one_large_message(both):
    """Beside single numbers: the rows where they hold the whole update, the gradient where there are none, or both."""
    gradient = both[0]["exact"]["count"]
    rows, to_the_letter = (REWARDS + 1) * gradient, (2 * REWARDS + 1) * gradient
    expected = {
        "exact": [[rows]] * 3,
        "amortised": [[rows], [gradient], [gradient]],
        "published": [[to_the_letter, gradient], [gradient], [to_the_letter, gradient]],
        "weighted sum": [[gradient]] * 3,
        "solve on a share": [[rows, gradient]] * 3,
    }
    for case, sizes in expected.items():
        for results in both:
            assert [[size for size in update if size > 1] for update in results[case]["reduced"]] == sizes, case


def test_with_one_process_nothing_is_sent():
    assert not active()
    values = torch.tensor([1.0, 2.0])
    assert sum_over_processes(values) is values
    assert total(3.5) == 3.5
    parameter = torch.nn.Parameter(torch.ones(2))
    sum_gradients([parameter])
    assert parameter.grad is None
    assert gather_rows(values, range(2), 2) is values
    assert share(5) == range(5)
    assert agree(True)
    assert decide(lambda: {1, 2}) == {1, 2}  # it need not even be JSON
    assert spread(b"abc") == b"abc"
    assert not start()


def test_rows_of_all_processes_arrive_bit_for_bit(both):
    assert [results["helpers"]["who"] for results in both] == [[0, 2, True], [1, 2, False]]
    assert [results["helpers"]["own"] for results in both] == [[0, 1], [2]]
    bits = ROWS.view(torch.int64)
    for results in both:
        found = results["helpers"]
        assert torch.equal(found["float64"].view(torch.int64), bits)  # NaN, −0 and subnormal numbers too
        assert torch.equal(found["one has all"].view(torch.int64), bits)
        assert torch.equal(found["bool"], ROWS > 1)
        assert torch.equal(found["uint8"][..., 0], ROWS.clamp(0, 5).to(torch.uint8))
        assert torch.equal(found["half"], ROWS[:, 0].half())


def test_the_main_process_decides(both):
    for results in both:
        found = results["helpers"]
        assert found["agreed"] == [True, False]
        assert found["decided"] == {"rank": 0, "numbers": [1, 2.5, None]}
        assert found["said"] == "found by the main one"
        assert found["spread"] == list(range(7))
        assert found["nothing"] == []


@pytest.mark.parametrize(("count", "processes"), [(5, 2), (4, 3), (8, 4), (2, 3), (0, 2), (48, 7)])
def test_shares_hold_all_and_are_as_equal_as_can_be(monkeypatch, count, processes):
    monkeypatch.setattr(distributed, "world", lambda: processes)
    shares = [share(count, process) for process in range(processes)]
    assert [i for own in shares for i in own] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_engines_that_reduce_gradients_themselves_are_refused(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(MarbleError, match=rf"ACCELERATE_USE_{engine}=true: .*Launch with torchrun"):
        start()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "_has_gpus", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MarbleError, match="2 processes were launched on a machine with 1 GPU"):
        start()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        pytest.param(-1, "no such thing", marks=pytest.mark.slow),  # in all of them
        pytest.param(0, "no such thing", marks=pytest.mark.slow),
        (1, "process 1: no such thing"),
    ],
)
def test_an_error_ends_all_processes_and_is_said_once(number, said):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.two_processes"]
    done = subprocess.run(
        [*command, "fail", str(number)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("said: ")]
    assert len(lines) == 1, done.stdout + done.stderr
    assert lines[0].startswith(f"said: {said}")
