"""A LoRA on the tiny pipeline, and a config for it: seven prompts of two sources, two images each, three rewards."""

import pytest
import torch
import yaml

from marble import Policy


@pytest.fixture(scope="session")
def small_lora(untrained, tmp_path_factory):
    """A LoRA's folder, as marble exports it."""
    policy = Policy.from_pretrained(str(untrained))
    policy.add_adapters(rank=2, alpha=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy.save(tmp_path_factory.mktemp("small"), "default")


@pytest.fixture(scope="session")
def small_config(untrained, tmp_path_factory):
    """A training config's file."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    values = {
        "model": {"id": str(untrained), "call": {"max_sequence_length": 12}},
        "prompts": [{"source": "mini-places"}, {"source": "mini-words"}],
        "rewards": ["mini-aesthetic", "mini-text"],
        "held_out_rewards": ["sharpness"],
        "evaluation": {"prompts": 7, "images": 2, "steps": 2},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def plan_of(untrained, small_config):
    """`make_plan` of the tiny pipeline, three prompts a portion."""
    from marble.scoring import make_plan

    def make(**options):
        return make_plan(str(untrained), **{"config": small_config, "portion": 3, **options})

    return make
