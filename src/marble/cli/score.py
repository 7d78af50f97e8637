"""`marble score`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from marble.errors import MarbleError


@dataclass
class Score:
    """Score images by rewards, without training anything.

    Prompts may be left out if `marble generate` made the images (its calls.json lies beside them), or if the rewards
    need none. A score is missing (–) where a reward cannot judge a prompt. GIFs are videos.

    example: marble score pictures/*.png --prompt 'a sign that says "OPEN"' --rewards pickscore ocr sharpness
    """

    images: tyro.conf.Positional[list[Path]]
    """image files, or folders of them"""
    rewards: list[str]
    """registered names, package.module:attribute, or http://host:port/NAME of a served one"""
    prompt: list[str] = field(default_factory=list)
    """one for all images, or one for each"""
    targets: str | None = None
    """JSON: what rewards look for, where the prompt does not say it, such as '{"text": "OPEN"}'; for all images"""
    settings: str | None = None
    """JSON: settings by reward, such as '{"pickscore": {"device": "cuda:1"}}'"""
    json: Annotated[bool, tyro.conf.arg(help="print the scores as JSON")] = False


def run(argv: list[str]) -> int:
    """The command."""
    args = tyro.cli(Score, args=argv, prog="marble score")
    from marble.cli.uses import uses_of
    from marble.rewards import check_rewards, load_rewards, prepare_rewards

    rewards = load_rewards(uses_of(args.rewards, args.settings))
    files = _files(args.images)
    check_rewards(rewards)
    records = _records(args, files, [reward.name for reward in rewards if getattr(reward, "needs_prompt", True)])
    pictures = _pictures(files)
    prepare_rewards(rewards)
    from marble.rewards.files import score_pictures

    table = score_pictures(rewards, pictures, records)
    rows = [[None if score != score else score for score in row] for row in table.scores.tolist()]
    means = table.metrics()["reward"]
    if args.json:
        made = [
            {"file": str(file), "prompt": record.text, "scores": dict(zip(table.names, row, strict=True))}
            for file, record, row in zip(files, records, rows, strict=True)
        ]
        print(json.dumps({"images": made, "means": means}))
    else:
        _show(files, table.names, rows, list(means.values()))
    if table.silent:
        raise MarbleError(f"rewards: no score of {', '.join(table.silent)}; the warnings above say why")
    return 0


def _files(given: list[Path]) -> list[Path]:
    from PIL import Image

    endings = set(Image.registered_extensions())
    files: list[Path] = []
    for path in given:
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in endings) if path.is_dir() else [path]
        if not inside:
            raise MarbleError(f'images: "{path}" holds no images')
        files += inside
    if not files:
        raise MarbleError("images: give at least one")
    return files


def _pictures(files: list[Path]) -> list[Any]:
    """All pictures; all files that are none are listed."""
    from marble.rewards.files import read_picture

    pictures, problems = [], []
    for file in files:
        try:
            pictures.append(read_picture(file))
        except MarbleError as error:
            problems.append(str(error))
    if problems:
        raise MarbleError("images:\n  " + "\n  ".join(problems))
    return pictures


def _records(args: Score, files: list[Path], need_prompts: list[str]) -> list[Any]:
    """What each image is to show."""
    from marble.cli.uses import read_mapping
    from marble.prompts import Record

    targets = read_mapping("--targets", args.targets)
    prompts: list[str | None] = list(args.prompt)
    if len(prompts) == 1:
        prompts = prompts * len(files)
    elif not prompts:
        prompts = [_made_from(file) for file in files]
    elif len(prompts) != len(files):
        raise MarbleError(f"--prompt: give one for all images or one for each of {len(files)}, got {len(prompts)}")
    if None in prompts and need_prompts:
        which = files[prompts.index(None)]
        raise MarbleError(f'--prompt: needed by {", ".join(need_prompts)}, got none for "{which}"')
    return [Record(prompt or "", "command line", targets) for prompt in prompts]


def _made_from(file: Path) -> str | None:
    """The prompt that `marble generate` made it of."""
    try:
        content = json.loads((file.parent / "calls.json").read_text(encoding="utf-8"))
        return next((row["prompt"] for row in content["images"] if row["file"] == file.name), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _show(files: list[Path], names: list[str], rows: list[list[float | None]], means: list[float | None]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("image", *names):
        if heading == "image":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(escape(heading), justify="right", no_wrap=True)
    for label, row in [*zip(map(str, files), rows, strict=True), *([("mean", means)] if len(files) > 1 else [])]:
        table.add_row(escape(label), *("–" if score is None else f"{score:.4f}" for score in row))
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)  # a file has no edge
