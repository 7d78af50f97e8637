"""A frozen base in shards over two processes gives what a whole one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from marble import MarbleError, shard
from marble.shard import blocks_of, shard_base

from .tiny import build

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("shard")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.two_processes", "shard", str(folder)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.parametrize("model", ["sd3", "flux", "unet"])
def test_outputs_and_every_rewards_gradient_are_those_of_a_whole_base(both, model):
    for found in both:
        whole, sharded = found[model]
        for key in ("output", "first", "second", "autograd"):
            assert whole[key].norm() > 0
            assert (sharded[key] - whole[key]).norm() <= 1e-6 * whole[key].norm(), key
    assert not torch.equal(both[0][model][0]["first"], both[1][model][0]["first"])  # each of its own samples


@pytest.mark.parametrize("model", ["sd3", "flux", "unet"])
def test_a_process_holds_its_share_of_the_base_and_all_that_is_trained(both, model):
    whole = both[0][model][0]
    base = whole["numbers"] - whole["trained"]
    for found in both:
        held = found[model][1]["numbers"] - whole["trained"]
        assert 0.4 * base < held < 0.6 * base
    assert sum(found[model][1]["numbers"] - whole["trained"] for found in both) == base


def test_blocks_are_the_items_of_the_denoisers_own_lists():
    assert len(blocks_of(build("sd3"))) == 2
    assert len(blocks_of(build("flux"))) == 3


def test_what_cannot_be_in_shards_is_refused(monkeypatch):
    with pytest.raises(MarbleError, match=r"model\.shard: .* needs several processes"):
        shard_base(nn.Linear(2, 2), [], torch.device("cpu"))
    monkeypatch.setattr(shard, "active", lambda: True)
    with pytest.raises(MarbleError, match=r"model\.shard: weight is trained"):
        shard_base(nn.Linear(2, 2), [], torch.device("cpu"))
    quantised = nn.Linear(2, 2, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MarbleError, match=r"model\.shard: weight is quantised"):
        shard_base(quantised, [], torch.device("cpu"))
