"""The run folder: everything a run leaves behind, each file whole or absent.

Of several processes the main one alone reads and writes it; the others need not even see its disk.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from marble.config import Config, dump_config, make_config, read_config
from marble.distributed import is_main, world
from marble.errors import MarbleError
from marble.storage import load_tree, save_tree, write_atomic

_NEEDED_BYTES = 200 * 2**20
"""Free disk space below which a run is not started."""


class Run:
    """`config.yaml`, `metrics.jsonl`, `evaluation.json`, `checkpoints/`, `samples/`, `lora/` and `report.html`.

    In another process than the main one, nothing is checked or written.
    """

    def __init__(self, path: Path) -> None:
        """An existing run.

        Raises:
            MarbleError: the folder is not there, or holds no `config.yaml`.
        """
        if is_main() and not (path / "config.yaml").is_file():
            raise MarbleError(f'"{path}" is not a run folder: it has no config.yaml')
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Start a new run.

        Raises:
            MarbleError: the folder exists and is not empty, cannot be written, or the disk is nearly full.
        """
        if not is_main():
            return cls(path)
        check_output(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.yaml", dump_config(config))
            write_atomic(path / "environment.json", json.dumps(describe_environment(), indent=2))
        except OSError as error:
            raise MarbleError(f'out: cannot write to "{path}": {error.strerror}') from error
        return cls(path)

    @property
    def config(self) -> Config:
        """The configuration as run."""
        return make_config(read_config(self.path / "config.yaml"), str(self.path / "config.yaml"))

    # ---- metrics --------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        if not is_main():
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`; one cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def forget_after(self, update: int) -> None:
        """Drop the metrics of updates that a resumed run will make again."""
        if not is_main():
            return
        kept = [json.dumps(row) for row in self.metrics() if row["update"] <= update]
        write_atomic(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))

    # ---- evaluation -----------------------------------------------------------------------------------

    def write_evaluation(self, content: dict[str, Any]) -> None:
        """Replace `evaluation.json`."""
        if is_main():
            write_atomic(self.path / "evaluation.json", json.dumps(content))

    def evaluation(self) -> dict[str, Any]:
        """The content of `evaluation.json`, empty before the first evaluation."""
        path = self.path / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    # ---- checkpoints ----------------------------------------------------------------------------------

    def save_checkpoint(self, update: int, state: dict[str, Any], keep: int) -> Path:
        """Write `checkpoints/step_NNNNNN`, aside and then renamed, and delete all but the newest `keep`."""
        folder = self.path / "checkpoints" / f"step_{update:06d}"
        if not is_main():
            return folder
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_tree(aside / "state.safetensors", state)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return folder

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step_*/state.safetensors")
        return sorted(path.parent for path in found if not path.parent.name.endswith(".part"))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint's state, None if there is none.

        Raises:
            MarbleError: it cannot be read; names the one before.
        """
        folders = self.checkpoints()
        return read_checkpoint(folders[-1] / "state.safetensors", folders) if folders else None


def read_checkpoint(file: Path, folders: list[Path]) -> dict[str, Any]:
    """The state in `file`, of the newest of `folders`.

    Raises:
        MarbleError: it cannot be read; names the one before.
    """
    try:
        return load_tree(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        before = f"delete it to go on from {folders[-2].name}" if len(folders) > 1 else "there is none before it"
        raise MarbleError(f'the checkpoint "{folders[-1]}" cannot be read ({error}); {before}') from error


def check_output(path: Path) -> None:
    """Check that a new run can be put at `path`.

    Raises:
        MarbleError: it exists and is not empty, or there is little room on its disk.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MarbleError(f'out: "{path}" exists and is not empty; choose another folder or delete it first')
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise MarbleError(f'out: "{parent}" is a file, not a folder')
    if not os.access(parent, os.W_OK):
        raise MarbleError(f'out: cannot write to "{parent}"')
    free = shutil.disk_usage(parent).free
    if free < _NEEDED_BYTES:
        raise MarbleError(
            f'out: "{parent}" has {free // 2**20} MiB free; a run needs at least {_NEEDED_BYTES // 2**20} MiB'
        )


def free_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def choose_folder(out: Path | None, resume: bool) -> Path:
    """Where a run is, or will be: `out`, or the first free of `runs/run`, `runs/run-2`, …

    Raises:
        MarbleError: as `Run` does with `resume`, as `check_output` does without.
    """
    out = free_folder(Path("runs/run")) if out is None else Path(out)
    if resume:
        return Run(out).path
    check_output(out)
    return out


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for the report."""
    import torch

    packages = ("marble-diffusion", "torch", "diffusers", "transformers", "peft", "numpy", "scipy")
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processes": world(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: version(name) for name in packages},
    }
