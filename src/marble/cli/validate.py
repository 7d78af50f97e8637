"""`marble validate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Validate:
    """Check a config whole: settings, names, files, prompts and rewards. Loads no model and downloads nothing.

    Settings may follow as for marble train: --optimizer.lr 1e-4.

    example: marble validate my.yaml
    """

    config: tyro.conf.Positional[Path]
    """a YAML file"""
    json: bool = False
    """print the complete config, defaults included, as JSON"""


def run(argv: list[str]) -> int:
    """The command."""
    args, changes = tyro.cli(Validate, args=argv, prog="marble validate", return_unknown_args=True)
    from marble.cli.settings import override
    from marble.config import make_config, read_config
    from marble.setup import check_config

    config = make_config(override(read_config(args.config), changes), str(args.config))
    unseen = check_config(config, fetch=False)
    if args.json:
        print(json.dumps(config.model_dump(mode="json")))
        return 0
    images = config.rollout.prompts * config.rollout.group_size
    print(
        f"{args.config} is valid: {config.model.id}, {len(config.rewards)} rewards, {config.balance.method}, "
        f"{images} images an epoch, {config.optimizer.updates_per_epoch} updates an epoch"
    )
    if unseen:
        print(f"not looked at: the prompts of {', '.join(unseen)}, and whether rewards apply to them (a download)")
    return 0
