"""GenEval's tiny networks, built once; servers of rewards, and none."""

import socket

import pytest
import torch

from marble.rewards import http
from marble.rewards.clip import load_clip
from marble.rewards.geneval.colours import ColourNamer
from marble.rewards.geneval.detector import load_detector

from .genevals import SIDES, build_clip, build_detector
from .running import Clip, Mean, Raising, Together, serving


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


@pytest.fixture
def quick(monkeypatch):
    """Short pauses, and no token."""
    monkeypatch.setattr(http, "PAUSE", 0.01)
    monkeypatch.setattr(http, "REST", 0.3)
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)


@pytest.fixture(scope="module")
def server():
    with serving(Mean(), Together(), Clip(), Raising()) as (url, _):
        yield url


@pytest.fixture
def unused():
    """A URL at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
