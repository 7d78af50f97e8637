"""Puts a comparison on one page. Nothing on it is loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from marble.compare import figures, words
from marble.report.layout import inline_png, page, section
from marble.storage import write_atomic

_PROMPTS = 8
"""Prompts whose images are shown."""
_LONG = 32
"""Characters of an entry that may be broken into lines."""
_MEAN, _WORST = "mean of those trained on", "worst of those trained on"


def write_page(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `comparison.html` into a comparison's folder; returns its path.

    Args:
        path: the folder, from which `content` names the cells'.
        content: by `marble.compare.describe`.
    """
    parts = [_headline(content), _standings(content), _scores(content), _forest(content), _curves(content)]
    parts += [_gallery(path, content), _costs(content), _failures(content), _about(content)]
    file = path / "comparison.html"
    write_atomic(file, page(f"marble compare: {path.name}", *parts))
    return file


def _headline(content: Mapping[str, Any]) -> str:
    config, arms = content["config"], content["arms"]
    cells = [cell for arm in arms.values() for cell in arm["seeds"].values()]
    done = sum(cell["status"] == "done" for cell in cells)
    seeds = sorted({int(seed) for arm in arms.values() for seed in arm["seeds"]})
    note = (
        f"{config['model']['id']} · {len(arms)} arms · seeds {', '.join(map(str, seeds))} · {done} of {len(cells)} "
        f"cells finished · {config['budget']['updates'] or config['budget']['minutes']} "
        f"{'updates' if config['budget']['updates'] else 'minutes'} each"
    )
    verdict = "".join(f'<p class="lead">{escape(line)}</p>' for line in content["verdict"].splitlines())
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in content.get("notes", []))
    return f'<header><h1>Comparison</h1><p class="note">{escape(note)}</p>{verdict}{notes}</header>'


def _standings(content: Mapping[str, Any]) -> str:
    rows = words.standings(content)
    return section("Gains and standings", escape(words.NOTE), _table(rows)) if len(rows) > 1 else ""


def _costs(content: Mapping[str, Any]) -> str:
    rows = words.costs(content)
    return section("Costs", escape(words.COST_NOTE), _table(rows)) if len(rows) > 1 else ""


def _scores(content: Mapping[str, Any]) -> str:
    rows = words.scores(content)
    note = "Mean scores on the held-out prompts after training, in each reward's own units."
    return section("Scores", note, _table(rows)) if len(rows) > 2 else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in rows[0])
    body = "".join("<tr>" + "".join(map(_entry, row)) + "</tr>" for row in rows[1:])
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table></div>'


def _entry(text: str) -> str:
    """A table's cell; numbers with their intervals are kept on one line."""
    style = ' style="white-space:nowrap"' if len(text) < _LONG else ""
    return f"<td{style}>{escape(text)}</td>"


def _forest(content: Mapping[str, Any]) -> str:
    rows = words.ranked(content)
    if not rows:
        return ""
    gains = {name: {_MEAN: row["mean_gain"], _WORST: row["worst_gain"], **row["gains"]} for name, row in rows}
    rewards = [_MEAN, _WORST, *content["training_rewards"], *content["held_out_rewards"]]
    note = "95% intervals over seeds; over prompts where an arm has a single seed."
    return section("Gains", note, figures.forest(gains, rewards))


def _curves(content: Mapping[str, Any]) -> str:
    held_out = content["held_out_rewards"]
    lines = {name: content["arms"][name]["curves"] for name, _ in words.ranked(content)}
    rewards = [
        name for name in [*content["training_rewards"], *held_out] if any(name in line for line in lines.values())
    ]
    if not rewards:
        return ""
    note = (
        "Mean score on the held-out prompts that are followed during training, over seeds; band: 95% interval over "
        "seeds, where there are two or more."
    )
    return section("On the way", note, figures.curves(lines, rewards, held_out))


def _gallery(path: Path, content: Mapping[str, Any]) -> str:
    """The first image of the first prompts, of the base model and of every arm's first finished seed."""
    folders = {}
    for name, _ in words.ranked(content):
        done = {seed: cell for seed, cell in content["arms"][name]["seeds"].items() if cell["status"] == "done"}
        seed = min(done, key=int)
        folders[f"{name}, seed {seed}"] = path / done[seed]["folder"]
    if not folders:
        return ""
    first = next(iter(folders.values()))
    prompts = json.loads((first / "evaluation.json").read_text(encoding="utf-8"))["before"]["prompts"]
    shown = {"base model": first / "samples" / "before"}
    shown |= {label: folder / "samples" / "after" for label, folder in folders.items()}
    rows = []
    for p, prompt in enumerate(prompts[:_PROMPTS]):
        cells = "".join(f"<td>{_picture(folder / f'{p:03d}_0.png', prompt)}</td>" for folder in shown.values())
        rows.append(f"<tr><td>{escape(prompt)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(label)}</th>" for label in shown)
    table = f'<div style="overflow-x:auto"><table><tr><th>prompt</th>{head}</tr>{"".join(rows)}</table></div>'
    return section("Pictures", "The same prompts and the same noise.", table)


def _picture(path: Path, prompt: str) -> str:
    if not path.exists():
        return ""
    return f'<span class="row"><img alt="{escape(prompt)}" src="{inline_png(path.read_bytes())}"></span>'


def _failures(content: Mapping[str, Any]) -> str:
    rows = [
        [name, seed, cell["status"], cell["error"] or ""]
        for name, arm in content["arms"].items()
        for seed, cell in arm["seeds"].items()
        if cell["status"] != "done"
    ]
    if not rows:
        return ""
    note = "Not in any number above; the same command tries them again."
    return section("Cells that are not finished", note, _table([["arm", "seed", "", "error"], *rows]))


def _about(content: Mapping[str, Any]) -> str:
    arms = {name: arm["overrides"] for name, arm in content["arms"].items()}
    config = escape(yaml.safe_dump(content["config"], sort_keys=False))
    return (
        f"<section><details><summary>Arms</summary><pre>{escape(yaml.safe_dump(arms, sort_keys=False))}</pre></details>"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details></section>"
    )
