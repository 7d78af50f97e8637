"""`marble demo`."""

from __future__ import annotations

from pathlib import Path

from marble.cli.train import start, take_options
from marble.config import demo_config_path, make_config, read_config

USAGE = """usage: marble demo [--out DIR] [--json] [--section.setting VALUE …]

Fine-tune the embedded model on five conflicting rewards and write the report.

  --out DIR   the run folder, which must not exist yet; runs/demo (or runs/demo-2 …), if not given

example: marble demo --out runs/first --seed 1"""


def run(argv: list[str]) -> int:
    """The command."""
    if any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    from marble.cli.settings import override
    from marble.distributed import decide, leave, together
    from marble.run import free_folder

    with together() as several:
        options, rest = take_options(argv)
        config = make_config(override(read_config(demo_config_path()), rest))
        out = Path(options.get("out") or decide(lambda: str(free_folder(Path("runs/demo")))))
        code = start(config, out, as_json="json" in options)
    return leave(code) if several else code
