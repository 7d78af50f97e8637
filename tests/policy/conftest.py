"""Tiny pipelines by name, each built once for a file."""

import pytest

from marble import Policy

from ..pipelines import build, call_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def load(folders):
    def load(name, **options):
        return Policy.from_pretrained(str(folders(name)), call=call_of(name), device="cpu", **options)

    return load
