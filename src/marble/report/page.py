"""Puts a run's figures, tables and pictures on one page. Nothing on it is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from marble.export import public_rewards
from marble.report import figures
from marble.report.layout import inline_png, page, section
from marble.run import Run
from marble.storage import write_atomic


def write_report(run: Run) -> Path:
    """Make `report.html` in the run's folder from what lies there, whatever there is of it; returns its path."""
    rows, evaluation = run.metrics(), run.evaluation()
    held_out = evaluation.get("held_out_rewards", [])
    training = evaluation.get("training_rewards", [])
    paint = figures.colours([*training, *held_out], held_out)
    parts = [
        _headline(run, rows, evaluation),
        _gains(evaluation, paint),
        _gallery(run, evaluation),
        _curves(rows, paint, held_out),
        _balance(rows, training, paint),
        _conflict(rows, training),
        _specialists(evaluation),
        _about(run),
    ]
    path = run.path / "report.html"
    write_atomic(path, page(f"marble: {run.path.name}", *parts))
    return path


def _verdict(gain: dict[str, float]) -> tuple[str, str]:
    if gain["low"] > 0:
        return "up", "up"
    return ("down", "down") if gain["high"] < 0 else ("same", "no clear change")


def _headline(run: Run, rows: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    updates = [row for row in rows if row["update"]]
    method = run.config.balance.method
    lines = [f"<h1>{escape(run.path.name)}</h1>"]
    if updates:
        last = updates[-1]
        minutes = last["time"]["elapsed"] / 60
        lines.append(
            f'<p class="note">{escape(run.config.model.id)} · method {escape(method)} · {last["update"]} updates · '
            f"{last['images']} images · {minutes:.1f} minutes</p>"
        )
    gains = evaluation.get("gains")
    if gains:
        training = [gains[name] for name in evaluation["training_rewards"] if name in gains]
        kept = [(n, gains[n]) for n in evaluation["held_out_rewards"] if n in gains]
        risen = sum(_verdict(gain)[0] == "up" for gain in training)
        lines.append(
            f'<p class="lead">{risen} of {len(evaluation["training_rewards"])} training rewards rose on held-out '
            f"prompts (95% interval above 0). "
            + " ".join(f"Never trained on: {escape(n)}, {_verdict(g)[1]}." for n, g in kept)
            + "</p>"
        )
        lines += _absent(updates, evaluation)
    else:
        lines.append('<p class="lead">This run has not finished: no final evaluation yet.</p>')
    return f"<header>{''.join(lines)}</header>"


def _absent(updates: list[dict[str, Any]], evaluation: dict[str, Any]) -> list[str]:
    """Rewards that did not always answer: in how many updates, and whether they have no gain for it."""
    counts: dict[str, int] = {}
    for row in updates:
        for name in row.get("missing", {}):
            counts[name] = counts.get(name, 0) + 1
    lines = [f"{escape(name)} gave no score for some images of {count} updates" for name, count in counts.items()]
    for part in ("before", "after"):
        missing = evaluation.get(part, {}).get("missing", {})
        lines += [f"{escape(name)} for {count} of those evaluated {part}" for name, count in missing.items()]
    lost = [name for name in evaluation["before"]["names"] if name not in evaluation["gains"]]
    lines += [f"there is no gain of {escape(', '.join(lost))}"] if lost else []
    return [f'<p class="note">Missing scores: {"; ".join(lines)}.</p>'] if lines else []


def _gains(evaluation: dict[str, Any], paint: dict[str, str]) -> str:
    gains = evaluation.get("gains")
    if not gains:
        return ""
    body = []
    for name, gain in gains.items():
        mark, word = _verdict(gain)
        kind = "" if name in evaluation["training_rewards"] else " (held out)"
        body.append(
            f"<tr><td>{escape(name)}{kind}</td><td>{gain['before']:.4f}</td><td>{gain['after']:.4f}</td>"
            f'<td class="{mark}">{gain["gain"]:+.4f}</td><td>{gain["low"]:+.4f} … {gain["high"]:+.4f}</td>'
            f'<td class="{mark}">{word}</td></tr>'
        )
    table = (
        "<table><tr><th>reward</th><th>before</th><th>after</th><th>gain</th><th>95% interval</th><th></th></tr>"
        + "".join(body)
        + "</table>"
    )
    count = len(evaluation["before"]["prompts"])
    note = (
        f"{count} held-out prompts, {len(evaluation['seeds'])} images each, the same seeds before and after; "
        "intervals by bootstrap over prompts."
    )
    return section("What was gained", note, figures.forest(gains, paint), table)


def _gallery(run: Run, evaluation: dict[str, Any]) -> str:
    before, after = run.path / "samples" / "before", run.path / "samples" / "after"
    if not before.is_dir():
        return ""
    pairs = []
    for p, prompt in enumerate(evaluation.get("before", {}).get("prompts", [])):
        rows = [
            _strip(label, sorted(folder.glob(f"{p:03d}_*.png")))
            for label, folder in (("before", before), ("after", after))
        ]
        if any(rows):
            pairs.append(f'<div class="pair"><b>{escape(prompt)}</b>{"".join(rows)}</div>')
    return section("Before and after", "The same prompts and seeds.", f'<div class="gallery">{"".join(pairs)}</div>')


def _strip(label: str, paths: list[Path]) -> str:
    images = "".join(f'<img alt="" src="{inline_png(path.read_bytes())}">' for path in paths)
    return f'<div class="row"><span>{label}</span>{images}</div>' if images else ""


def _curves(rows: list[dict[str, Any]], paint: dict[str, str], held_out: list[str]) -> str:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.get("held_out", {}).items():
            if value is not None:
                points.setdefault(name, []).append((row["update"], value))
    if not points or max(map(len, points.values())) < 2:
        return ""
    note = "Mean score on the held-out prompts that are followed during training; dotted, the base model."
    return section("On the way", note, figures.curves(points, paint, held_out))


def _balance(rows: list[dict[str, Any]], training: list[str], paint: dict[str, str]) -> str:
    with_alpha = [row for row in rows if "alpha" in row]
    if not with_alpha:
        return ""
    updates = [row["update"] for row in with_alpha]
    note = "Weight of each reward's normalised gradient, smoothed; dotted, equal weights." + _opposed(rows)
    alpha = np.array([row["alpha"] for row in with_alpha])
    return section("The balance", note, figures.weights(updates, alpha, training, paint))


def _opposed(rows: list[dict[str, Any]]) -> str:
    """Which rewards were found to oppose each other, and what the balance did about it."""
    found = [row for row in rows if row.get("opposed")]
    pairs = sorted({" and ".join(pair) for row in found for pair in row["opposed"]})
    solves = sum(bool(row.get("refreshed")) for row in rows)
    if not pairs:
        return ""
    return (
        f" In {len(found)} of {solves} solves rewards truly opposed each other ({escape('; '.join(pairs))}): "
        "there the weights are UPGrad's, which keep all rewards in, where min-norm would spend nearly all on those."
    )


def _conflict(rows: list[dict[str, Any]], training: list[str]) -> str:
    measured = [row for row in rows if "cosine/applied" in row]
    if not measured:
        return ""
    updates = [row["update"] for row in measured]
    head = "".join(f"<th>{escape(label)}</th>" for label, _ in figures.LINES.values())
    body = ""
    kinds = {"cosine_advantage": "advantage part", "cosine": "whole gradients"}
    for kind, title in kinds.items():
        cells = ""
        for key in figures.LINES:
            values = np.array([row[f"{kind}/{key}"] for row in measured])
            cells += f"<td>{values.mean():+.2f}, negative in {100 * (values < 0).mean():.0f}%</td>"
        body += f"<tr><td>{title}</td>{cells}</tr>"
    matrix = np.mean([row["reward_cosines"] for row in measured], axis=0)
    note = (
        "Cosine of a direction with the gradient of the reward that it serves worst, on raw gradients before the "
        "optimiser. Below 0 the step makes that reward worse. The advantage-free part is the loss's pull to the old "
        "policy, which all rewards share."
    )
    return section(
        "How the rewards conflict",
        note,
        figures.cosines(updates, measured),
        f"<table><tr><th>mean worst cosine</th>{head}</tr>{body}</table>",
        '<p class="note">Mean cosine between the rewards\' own gradients (advantage part):</p>',
        figures.agreement(matrix, training),
    )


def _specialists(evaluation: dict[str, Any]) -> str:
    before = evaluation.get("before")
    if not before:
        return ""
    scores = np.array([[np.nan if v is None else v for v in row] for row in before["scores"]], dtype=float)
    each = len(evaluation["seeds"])
    sources = [source for source in evaluation["sources"] for _ in range(each)]
    spread = np.nanstd(scores, axis=0)
    z = (scores - np.nanmean(scores, axis=0)) / np.where(spread > 0, spread, 1)
    training = [before["names"].index(name) for name in evaluation["training_rewards"]]
    speaks = np.abs(np.nan_to_num(z[:, training])) > 1
    some = (speaks.any(axis=1) & ~speaks.all(axis=1)).mean()
    note = (
        "The base model's held-out samples, scored by every reward (z-scores; grey: the reward cannot judge it). "
        f"{100 * some:.0f}% of the samples stand out (|z| > 1) for some training rewards only."
    )
    return section("Specialist map", note, figures.specialist_map(scores, before["names"], sources))


def _about(run: Run) -> str:
    values = public_rewards(run.config.model_dump(mode="json"))  # reports are handed around
    config = escape(yaml.safe_dump(values, sort_keys=False))
    environment = run.path / "environment.json"
    machine = escape(environment.read_text(encoding="utf-8")) if environment.exists() else ""
    return (
        f"<section><details><summary>Configuration</summary><pre>{config}</pre></details>"
        f"<details><summary>Environment</summary><pre>{machine}</pre></details></section>"
    )
