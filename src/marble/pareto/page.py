"""The page of a front: a scatter to point at, and tables of all that it shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from marble.pareto.figure import paint, scatter
from marble.pareto.fronts import label_of
from marble.pareto.points import KINDS
from marble.pareto.script import SCRIPT, STYLE
from marble.report.layout import inline_png, page, section
from marble.storage import write_atomic

DOUBT = 0.05
"""Share of draws on the front beyond which a dominated model is said to be so perhaps."""
THUMBNAIL = 160
"""Longest side of the pictures on the page; those beside it are whole."""


def write_page(folder: Path, content: dict[str, Any], prompts: Sequence[str]) -> Path:
    """Make `pareto.html` of `pareto.json`'s content; returns its path.

    Args:
        folder: of the front, with the pictures in `points/`.
        content: of `pareto.json`.
        prompts: those whose pictures were kept, in order.
    """
    chosen = content["sets"][label_of(content["rewards"])]
    parts = [
        f"<style>{STYLE}</style>",
        _headline(content, chosen),
        _front(folder, content, prompts),
        _volumes(content, chosen),
        _table(content, chosen),
        _left_out(content),
    ]
    path = folder / "pareto.html"
    write_atomic(path, page("marble: trade-offs", *parts, script=SCRIPT))
    return path


def _headline(content: dict[str, Any], chosen: dict[str, Any]) -> str:
    front = chosen["fronts"]["all"]
    return (
        f"<header><h1>{escape(' against '.join(content['rewards']))}</h1>"
        f'<p class="note">{len(content["points"])} models, each on the same {content["prompts"]} held-out prompts with '
        f"{content['images']} images and fixed seeds</p>"
        f'<p class="lead">On the front: {escape("; ".join(front))}.</p></header>'
    )


def _front(folder: Path, content: dict[str, Any], prompts: Sequence[str]) -> str:
    names, colours = content["names"], paint(content["points"])
    x, y, *third = (names.index(name) for name in content["rewards"])
    choice = (
        f'<div id="choice" hidden><label>across {_select("across", names, x)}</label>'
        f"<label>up {_select('up', names, y)}</label>"
        f"<label>size {_select('size', names, third[0] if third else -1, none=True)}</label></div>"
    )
    articles = "".join(
        _article(folder, i, point, colours[point["method"]], prompts) for i, point in enumerate(content["points"])
    )
    keys = "".join(_key(colour, "method", name or "base") for name, colour in colours.items())
    kinds = {point["kind"] for point in content["points"]} - {"base", "method"}
    keys += "".join(_key("#888888", kind, KINDS[kind]) for kind in KINDS if kind in kinds)
    note = (
        "Better is up and to the right; dashed, the front of these two rewards: no other model is at least as good in "
        "both and better in one. Crosses are 95% intervals, over prompts, of the gain over the base model on the same "
        "prompts and seeds; fewer than 5 prompts have none. Faint points are dominated. Point at a model to see "
        "what it makes; click on two to keep them side by side (Tab and Enter do the same)."
    )
    hint = '<p id="hint" class="note" aria-live="polite">Point at a model in the figure to see its pictures here.</p>'
    return section(
        "The front",
        note,
        f'<div id="pareto">{choice}<div>{scatter(content)}<div>{keys}</div></div>'
        f'<div id="about" style="display:flex;flex-direction:column">{hint}{articles}</div></div>',
    )


def _select(name: str, rewards: Sequence[str], chosen: int, none: bool = False) -> str:
    options = [(-1, "the same")] * none + list(enumerate(rewards))
    marked = "".join(
        f'<option value="{value}"{" selected" * (value == chosen)}>{escape(text)}</option>' for value, text in options
    )
    return f'<select id="{name}">{marked}</select>'


def _key(colour: str, kind: str, text: str) -> str:
    mark = f'<svg width="16" height="14"><circle class="{kind}" style="--c:{colour}" cx="8" cy="7" r="5"/></svg>'
    return f'<span class="key">{mark} {escape(text)}</span>'


def _article(folder: Path, i: int, point: dict[str, Any], colour: str, prompts: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_score(value)}</td><td>{_gain(point['gains'][name])}</td>"
        f"<td>{_interval(point['gain_intervals'][name])}</td></tr>"
        for name, value in point["means"].items()
    )
    pictures = ""
    for p, prompt in enumerate(prompts):
        file = folder / "points" / point["file"] / f"{p:03d}_0.png"
        if file.is_file():
            text = escape(prompt)
            pictures += f'<img alt="{text}" title="{text}" src="{inline_png(_thumbnail(file))}">'
    head = "<tr><th>reward</th><th>score</th><th>gain</th><th>95% interval</th></tr>"
    return (
        f'<article data-index="{i}" style="--c:{colour}" hidden><h3>{escape(point["name"])}</h3>'
        f'<p class="note">{escape(KINDS[point["kind"]])}; gains in spreads of the base model&#x27;s scores</p>'
        f'<div class="pictures">{pictures}</div>'
        f"<table>{head}{rows}</table></article>"
    )


def _thumbnail(file: Path) -> bytes:
    with Image.open(file) as picture:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _gain(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _interval(ends: Sequence[float] | None) -> str:
    return " … ".join(f"{end:+.2f}" for end in ends or ()) or "–"


def _volumes(content: dict[str, Any], chosen: dict[str, Any]) -> str:
    head = "<tr><th></th><th>hypervolume</th><th>95% interval</th><th>points</th><th>above the base in all</th></tr>"
    kinds = [(f"all {kind if kind != 'all' else 'point'}s", row) for kind, row in chosen["kinds"].items()]
    body = "".join(_volume_row(name, row) for name, row in [*kinds, *chosen["methods"].items()])
    note = (
        f"What the points dominate above the base model's point, in spreads of its scores, by {_listed(content)}. A "
        "model below the base in one of these rewards adds nothing. More points cover more, noise included: compare "
        "like with like. A method counts with its strengths and checkpoints, a soup with what it is mixed of; over "
        "several seeds, their mean and its interval by Student's t."
    )
    return section("Hypervolume", note, f'<div class="wide"><table>{head}{body}</table></div>', _matrix(content))


def _volume_row(name: str, row: dict[str, Any]) -> str:
    interval = " … ".join(f"{value:.3f}" for value in row["interval"]) or "one seed has none"
    return (
        f"<tr><td>{escape(name)}</td><td>{row['hypervolume']:.3f}</td><td>{interval}</td><td>{row['points']}</td>"
        f"<td>{row['above_reference']}</td></tr>"
    )


def _matrix(content: dict[str, Any]) -> str:
    rewards, values = content["hypervolumes"]["rewards"], content["hypervolumes"]["values"]
    if len(rewards) < 2:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in rewards)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_volume(value)}</td>' for value in row)}</tr>"
        for name, row in zip(rewards, values, strict=True)
    )
    note = '<p class="note">All points, by any two of the rewards that some run was trained on:</p>'
    return f"{note}<table><tr><th></th>{head}</tr>{body}</table>"


def _volume(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(content: dict[str, Any], chosen: dict[str, Any]) -> str:
    label = label_of(content["rewards"])
    head = "".join(f"<th>{escape(name)}</th>" for name in content["names"])
    body = ""
    for i, point in enumerate(content["points"]):
        scores = "".join(f"<td>{_score(point['means'][name])}</td>" for name in content["names"])
        name = f'<a href="#point-{i}">{escape(point["name"])}</a>'
        standing = escape(verdict(point["fronts"][label]))
        body += f"<tr><td>{name}</td><td>{escape(point['kind'])}</td>{scores}<td>{standing}</td></tr>"
    note = (
        f"By {_listed(content)}. In brackets, the share of draws in which the model is on the front when the prompts "
        "are drawn anew; perhaps dominated, if that is in more than one draw of twenty. Not told apart: none of the "
        "models that dominate it is better by more than the prompts' noise in any of these rewards (95%, paired, by "
        "Student's t, with allowance for the number of rewards and of those models)."
    )
    return section(
        "All points",
        note,
        f'<div class="wide"><table><tr><th>model</th><th>kind</th>{head}<th>standing</th></tr>{body}</table></div>',
    )


def verdict(row: dict[str, Any] | None) -> str:
    """A point's standing in words."""
    if row is None:
        return "not measured"
    share = f" ({100 * row['share']:.0f}%)"
    if row["front"]:
        return "on the front" + share
    if not row["told_apart"]:
        return f"not told apart from {row['dominated_by']}{share}"
    return ("perhaps " if row["share"] > DOUBT else "") + f"dominated by {row['dominated_by']}{share}"


def _listed(content: dict[str, Any]) -> str:
    return escape(" and ".join(content["rewards"]))


def _left_out(content: dict[str, Any]) -> str:
    lines = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in content.get("left_out", {}).items())
    return section("Left out", "", f"<ul>{lines}</ul>") if lines else ""
