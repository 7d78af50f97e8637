"""What a checkpoint holds, and how a run goes on from one: with as many processes as before, or others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from marble.distributed import active, is_main, spread
from marble.errors import MarbleError
from marble.heldout import HeldOut
from marble.run import Run
from marble.setup import Parts
from marble.storage import load_tree


def snapshot(parts: Parts, held_out: HeldOut, epoch: int, spent: float) -> dict[str, Any]:
    """Everything that epochs and updates change; the same in all processes.

    Args:
        parts: of the run.
        held_out: of the run.
        epoch: the next one.
        spent: seconds so far.
    """
    return {
        "epoch": epoch,
        "seconds": spent,
        "adapters": {name: parts.policy.adapter_state(name) for name in ("default", "old", "ema")},
        "updater": parts.updater.state_dict(),
        "method": parts.method.state_dict(),
        "step_norms": parts.step_norms.state_dict(),
        "absence": dict(parts.absence.updates),
        "held_out": held_out.state_dict(),
    }


def restore(parts: Parts, held_out: HeldOut, run: Run) -> tuple[int, float]:
    """Put the newest checkpoint back, if there is one, and forget what was logged after it.

    Returns:
        The next epoch, seconds spent so far.

    Raises:
        MarbleError: the checkpoint is of an earlier version.
    """
    state = _newest(run)
    if state is None:  # broken off before the first one
        run.forget_after(0)
        return 0, 0.0
    if "method" not in state or "step_norms" not in state:
        raise MarbleError(f"{run.path}: its checkpoint is of an earlier version of marble; start the run anew")
    for name, weights in state["adapters"].items():
        parts.policy.load_adapter_state(name, weights)
    parts.updater.load_state_dict(state["updater"])
    parts.method.load_state_dict(state["method"])
    parts.step_norms.load_state_dict(state.get("step_norms", {}))
    parts.absence.updates = dict(state.get("absence", {}))
    held_out.load_state_dict(state["held_out"])
    run.forget_after(parts.updater.updates)
    return state["epoch"], state["seconds"]


def _newest(run: Run) -> dict[str, Any] | None:
    """The newest checkpoint; the main process reads it and sends it to the others."""
    if not active():
        return run.load_checkpoint()
    found = run.checkpoints()[-1:] if is_main() else []
    data = spread(b"".join((folder / "state.safetensors").read_bytes() for folder in found))
    if not data:
        return None
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(aside) / "state.safetensors"
        copy.write_bytes(data)
        return load_tree(copy)
