"""Data walks one way: a room imports only rooms before it, and nothing imports the miniature's."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "marble"
ROOMS = [
    ("errors", "statistics", "storage", "seeds", "registry", "catalogue", "distributed", "memory", "shard"),
    ("rules", "overrides"),
    ("config",),
    ("prompts",),
    ("noise",),
    ("watch",),
    ("policy",),
    ("rollout",),
    ("rewards",),
    ("advantages",),
    ("objectives",),
    ("gradients",),
    ("balance",),
    ("diagnose",),
    ("update",),
    ("evaluation",),
    ("run",),
    ("setup",),
    ("step",),
    ("heldout",),
    ("scoring",),
    ("serve",),
    ("resume",),
    ("export",),
    ("card",),
    ("training",),
    ("bench",),
    ("report",),
    ("conflict",),
    ("compare",),
    ("pareto",),
    ("mini",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem not in ("__init__", "__main__")
)


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.startswith("marble."):
                yield name.split(".")[1], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_rooms_before_it(path):
    own = room(path)
    type_only = "if TYPE_CHECKING" in path.read_text()
    for other, line in imported_rooms(path):
        if type_only and own == "rules" and other == "config":
            continue
        assert RANK[other] <= RANK[own], f"{path}:{line} imports {other}, which comes after {own}"
        assert other != "mini" or own in ("mini", "cli"), f"{path}:{line} knows the miniature"


def test_every_module_has_a_room():
    assert {room(path) for path in FILES} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_over_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_training_loop_is_a_corridor():
    assert len((SOURCE / "training.py").read_text().splitlines()) < 150


def test_no_pickle():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}["weights_only"] == "True", path
