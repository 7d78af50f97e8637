"""`marble train`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marble.config import Config, demo_config_path, dump_config, make_config, read_config
from marble.errors import MarbleError

if TYPE_CHECKING:
    from marble.run import Run

USAGE = """usage: marble train [CONFIG] [--out DIR] [--resume RUN] [--json] [--section.setting VALUE …]

Fine-tune a model on several rewards at once.

  CONFIG         a YAML file; the demo's, if none is given
  --out DIR      the run folder, which must not exist yet; runs/NAME by the config's name, if not given
  --resume RUN   go on with an interrupted run from its newest checkpoint; settings may follow that change what it
                 takes, not what it is: {resumable}
  --json         print the result as JSON

examples: marble train my.yaml --out runs/mine --optimizer.lr 1e-4 --rewards.1.weight 2
          marble train --resume runs/mine
          torchrun --nproc_per_node 8 -m marble train my.yaml      (a process a GPU: docs/distributed.md)

settings (N: number of the item in a list):
"""


RESUMABLE = (
    *("model.dtype", "model.device", "model.offload", "model.checkpointing", "model.vae_tiling", "model.vae_slicing"),
    *("optimizer.lr", "optimizer.micro_batch", "rollout.batch", "budget.updates", "budget.minutes"),
    *("checkpoint_every", "keep_checkpoints", "threads", "missing_limit"),
    *("rewards.N.url", "rewards.N.settings.X", "held_out_rewards.N.url", "held_out_rewards.N.settings.X"),
)
"""Settings that a run may go on with otherwise; of a reward's settings X those in `marble.rewards.base.WHERE`."""


def run(argv: list[str]) -> int:
    """The command."""
    if any(argument in ("-h", "--help") for argument in argv):
        from marble.cli.settings import describe_settings

        print(USAGE.format(resumable=", ".join(RESUMABLE)) + describe_settings())
        return 0
    from marble.distributed import leave, together

    with together() as several:
        code = _run(argv)
    return leave(code) if several else code


def _run(argv: list[str]) -> int:
    from marble.cli.settings import override

    options, rest = take_options(argv)
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
    if "resume" in options:
        if path is not None or "out" in options:
            raise MarbleError("--resume goes on with a run as it was configured: give no config and no --out")
        return resume(Path(options["resume"]), rest, as_json="json" in options)
    source = path or demo_config_path()
    config = make_config(override(read_config(source), rest), str(source) if path else "config")
    out = Path(options.get("out") or Path("runs") / source.stem)
    return start(config, out, as_json="json" in options)


def start(config: Config, out: Path, *, as_json: bool = False) -> int:
    """Check, then run a new run and say where everything lies."""
    from marble.distributed import decide
    from marble.run import check_output

    decide(lambda: check_output(out))
    return _go(config, out, resume=False, as_json=as_json)


def resume(path: Path, changes: list[str], *, as_json: bool = False) -> int:
    """Go on with an existing run, some of its settings changed.

    Raises:
        MarbleError: a change would make it another run, or the run is finished.
    """
    from marble.cli.settings import override
    from marble.distributed import decide
    from marble.run import Run
    from marble.setup import check_config
    from marble.storage import write_atomic

    named = [argument.removeprefix("--").partition("=")[0] for argument in changes if argument.startswith("--")]
    if fixed := [name for name in named if not _resumable(name)]:
        raise MarbleError(
            f"--resume: {', '.join(fixed)} would make another run of it; what may change is {', '.join(RESUMABLE)}"
        )

    def settings() -> dict[str, Any]:
        old = Run(path)
        if "after" in old.evaluation():
            raise MarbleError(f'"{path}" is finished; start a new run with --out, or look at {path / "report.html"}')
        if not changes:
            return old.config.model_dump(mode="json")
        file = path / "config.yaml"
        config = make_config(override(read_config(file), changes), "--resume")
        check_config(config)
        write_atomic(file, dump_config(config))
        return config.model_dump(mode="json")

    return _go(make_config(decide(settings)), path, resume=True, as_json=as_json)


def _resumable(name: str) -> bool:
    """Whether a run may go on with another value of a setting."""
    from marble.rewards.base import WHERE

    general = re.sub(r"rewards\.\d+\.", "rewards.N.", name)
    inner = general.removeprefix("held_out_").removeprefix("rewards.N.settings.")
    return general in RESUMABLE or (inner != general and inner in WHERE)


def _go(config: Config, out: Path, *, resume: bool, as_json: bool) -> int:
    from marble.cli.progress import ProgressDisplay, Silence
    from marble.distributed import decide, is_main
    from marble.setup import check_config
    from marble.training import train

    check_config(config)
    if not is_main():
        with Silence():
            train(config, out, resume=resume)
            return decide(int)
    try:
        with ProgressDisplay(config) as display:
            result = train(config, out, resume=resume, watch=display)
    except KeyboardInterrupt:
        if (out / "config.yaml").is_file():
            print(f"broken off; go on from the last checkpoint with: {_command()} train --resume {out}")
        raise
    return decide(lambda: _tell(result, out, as_json))


def _tell(result: Run, out: Path, as_json: bool) -> int:
    """Write the report, and say what was gained and where everything lies."""
    from marble.report import write_report

    report = write_report(result)
    evaluation = result.evaluation()
    if as_json:
        print(json.dumps({"run": str(out), "report": str(report), "gains": evaluation.get("gains")}))
    elif "gains" in evaluation:
        _print_gains(evaluation)
        if lost := [name for name in evaluation["before"]["names"] if name not in evaluation["gains"]]:
            print(f"no gain of {', '.join(lost)}: there are no scores of the same pictures before and after")
        print(f"\nreport: {report}\nLoRA:   {out / 'lora'}")
    else:
        print(f"stopped early; what there is lies in {out}\ngo on with: {_command()} train --resume {out}")
    return 0 if "gains" in evaluation else 130


def _command() -> str:
    """How this program was called, for the user to call it again."""
    from marble.distributed import active

    if active():
        return "torchrun … -m marble"
    own = Path(sys.argv[0])
    return f"{sys.executable} -m marble" if own.name == "__main__.py" else str(own)


def _print_gains(evaluation: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="gains on held-out prompts", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("reward", "before", "after", "gain", "95% interval"):
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for name, gain in evaluation["gains"].items():
        kind = "" if name in evaluation["training_rewards"] else " (held out)"
        style = "green" if gain["low"] > 0 else "red" if gain["high"] < 0 else None
        table.add_row(
            name + kind,
            f"{gain['before']:.4f}",
            f"{gain['after']:.4f}",
            f"{gain['gain']:+.4f}",
            f"{gain['low']:+.4f} … {gain['high']:+.4f}",
            style=style,
        )
    Console().print(table)


def take_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Take `--out`, `--resume` and `--json` out of the arguments."""
    options: dict[str, str] = {}
    rest, arguments = [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        if name == "--json":
            options["json"] = "yes"
        elif name in ("--out", "--resume"):
            if not equals:
                if not arguments:
                    raise MarbleError(f"{name}: expected a folder after it")
                value = arguments.pop(0)
            options[name[2:]] = value
        else:
            rest.append(argument)
    return options, rest
