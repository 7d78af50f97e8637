"""Where composition calls a picture right: nearly all true renders are, none with a thing wrong."""

import numpy as np
import torch

from marble.mini.prompts import to_record
from marble.mini.render import render
from marble.mini.rewards import Composition
from marble.mini.world import MINI


def test_right_pictures_are_right_and_wrong_ones_are_not():
    rng, reward = np.random.default_rng(0), Composition()
    pools = [MINI.attribute_specs(), MINI.count_specs(), MINI.position_specs()]
    specs = [pool[i] for pool in pools for i in rng.integers(len(pool), size=40)]
    records, shares = [to_record(spec, "test") for spec in specs], []
    for shown in (specs, [MINI.confuse(spec, rng) for spec in specs]):
        pictures = np.stack([render(MINI, spec, rng) for spec in shown])
        scores = reward.score(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), records)
        shares.append((scores >= reward.accuracy_above).double().mean().item())
    assert shares[0] > 0.95
    assert shares[1] == 0
