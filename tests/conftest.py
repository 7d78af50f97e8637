"""Shared by all tests: one thread (the suite runs beside others), quiet libraries, and a tiny pipeline."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ["MARBLE_CACHE"] = "off"  # no test depends on what another has scored

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The folder of a mini pipeline with random weights: the same classes and sizes as the shipped one."""
    from marble.mini.build import build_pipeline
    from marble.mini.world import MINI

    folder = tmp_path_factory.mktemp("untrained")
    build_pipeline(MINI, 0).save_pretrained(folder)
    return folder


@pytest.fixture
def rng():
    """A numpy generator, the same in every test."""
    import numpy as np

    return np.random.default_rng(0)
