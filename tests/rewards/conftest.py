"""GenEval's tiny networks, built once."""

import pytest
import torch

from marble.rewards.clip import load_clip
from marble.rewards.geneval.colours import ColourNamer
from marble.rewards.geneval.detector import load_detector

from .genevals import SIDES, build_clip, build_detector


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    return build_detector(tmp_path_factory.mktemp("detector"), seed=4)


@pytest.fixture(scope="session")
def detector(detector_folder):
    return load_detector(str(detector_folder), None, torch.device("cpu"), SIDES)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def namer(clip_folder):
    return ColourNamer(load_clip(str(clip_folder), None, torch.device("cpu"), torch.float32))
