"""The conflict page: what was found, in words first, then figures, then pictures on which the rewards disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from marble.conflict import figures
from marble.conflict.advice import headline
from marble.conflict.directions import DIRECTIONS
from marble.conflict.gather import Picture
from marble.conflict.scores import INFORMATIVE
from marble.report.figures import specialist_map
from marble.report.layout import inline_png, page, section
from marble.rewards.wire import to_png

_NEGLIGIBLE = 1e-3
"""A pull shorter than this share of the rewards' gradients is none."""


def conflict_page(
    content: Mapping[str, Any], scores: np.ndarray, sources: Sequence[str], pictures: Sequence[Picture]
) -> str:
    """The whole page as HTML.

    Args:
        content: of conflict.json.
        scores: `[M, K]`, NaN where missing.
        sources: `[M]`, of the images' prompts.
        pictures: some of them.
    """
    return page(
        f"marble: how the rewards conflict on {content['model']}",
        _head(content),
        _advice(content),
        _directions(content),
        _cosines(content),
        _sizes(content),
        _correlations(content),
        _specialists(content, scores, sources),
        _gallery(content["rewards"], pictures),
        _about(content),
    )


def _head(content: Mapping[str, Any]) -> str:
    setup = content["setup"]
    return (
        f"<header><h1>How the rewards conflict on {escape(content['model'])}</h1>"
        f'<p class="note">before any training · {len(content["rewards"])} rewards · {setup["batches"]} batches of '
        f"{setup['prompts']} prompts × {setup['group_size']} images · {setup['updates'] * setup['batches']} updates "
        f"looked at, none made · {content['seconds'] / 60:.1f} minutes</p>"
        f'<p class="lead">{escape(headline(content))}</p></header>'
    )


def _advice(content: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['finding'])}</td><td>{escape(row['advice'])}</td></tr>"
        for row in content["advice"]["findings"]
    )
    suggested = content["advice"]["suggested"]
    table = f'<table class="words"><tr><th>finding</th><th>what to do</th></tr>{rows}</table>' if rows else ""
    reason = f'<p class="note">Because {escape(suggested["reason"])}.</p>'
    style = "<style>.words td,.words th{text-align:left;vertical-align:top;width:50%}</style>"
    note = "Rules on the numbers below; a rule that found nothing is not listed."
    return section("A suggested set-up", note, style, table, f"<pre>{escape(suggested['config'])}</pre>", reason)


def _directions(content: Mapping[str, Any]) -> str:
    found, body = content["gradients"]["directions"], ""
    if all(row["advantage"] is None for row in found.values()):
        return section("Whom a direction works against", "No reward tells images apart: there is no direction.")
    for name, label in DIRECTIONS.items():
        seen, true = found[name]["advantage"], found[name]["true"]
        against = sorted(seen["against"].items(), key=lambda item: -item[1])
        most = ", ".join(f"{escape(reward)} {_percent(share)}" for reward, share in against[:2] if share)
        kept = found[name]["kept"]
        rate = (
            f"{_percent(seen['conflict_rate'])} ({_percent(seen['conflict_rate_low'])} to "
            f"{_percent(seen['conflict_rate_high'])})"
        )
        body += (
            f"<tr><td>{label}</td><td>{'0%, by construction' if name == 'fresh' else rate}</td>"
            f"<td>{most or '–'}</td><td>{seen['worst']:+.2f}</td><td>{'–' if kept is None else f'{kept:+.2f}'}</td>"
            f"<td>{_true_worst(true)}</td></tr>"
        )
    table = (
        "<table><tr><th>direction</th><th>updates with conflict</th><th>most often against</th>"
        f"<th>worst cosine</th><th>of that, in truth</th><th>made of the truth</th></tr>{body}</table>"
    )
    note = (
        "An update conflicts if its direction has a negative cosine with a reward's own gradient in the same update. "
        "That flatters the balanced direction, which is solved on this very batch and never negative there, and it "
        "blames every direction for noise. <i>Of that, in truth</i>: the mean worst cosine of the same weights on the "
        "true gradients. <i>Made of the truth</i>: of weights found there. –: a direction not surely longer than 0. "
        "95% intervals over batches."
    )
    return section("Whom a direction works against", note, figures.worst(found), table)


def _true_worst(true: Mapping[str, Any] | None) -> str:
    if true is None:
        return "–"
    low, high = true["worst_low"], true["worst_high"]
    interval = "" if low is None else f" ({low:+.2f} to {high:+.2f})"
    return f"{true['worst']:+.2f}{interval}, {escape(true['worst_reward'])}"


def _cosines(content: Mapping[str, Any]) -> str:
    gradients = content["gradients"]
    pull = gradients["pull"]
    same = (
        "A fresh adapter feels no pull to the old policy, so these are the whole gradients too; in training the pull "
        "comes in, is common to all, and makes rewards look more alike."
        if pull < _NEGLIGIBLE
        else f"The part that no advantage enters is left out; its norm is {pull:.2g} times theirs."
    )
    note = (
        "Cosines between the rewards' gradients on the base model with a fresh adapter. One update's are pulled "
        "towards 0 by noise; products of different batches are not. Framed: the sign is sure, with an allowance "
        f"for the number of pairs; ?: too noisy to say. {same}"
    )
    true = gradients["cosines_true"]
    sure = [[a or b for a, b in zip(x, y, strict=True)] for x, y in zip(true["conflict"], true["agree"], strict=True)]
    panels = {"in one update": gradients["cosines_one_batch"]["mean"], "noise taken out": true["estimate"]}
    return section("Do the gradients conflict?", note, figures.heatmaps(content["rewards"], panels, sure))


def _sizes(content: Mapping[str, Any]) -> str:
    norms, body = content["gradients"]["norms"], ""
    for name, row in content["scores"]["rewards"].items():
        norm = norms[name]
        shown = "?" if norm["shown"] is None else _percent(norm["shown"])
        needed = "?" if norm["batches_needed"] is None else f"{norm['batches_needed']:.0f}"
        mean, spread, constant = (row[key] for key in ("mean", "spread", "constant"))
        body += (
            f"<tr><td>{escape(name)}</td><td>{_number(mean)}</td><td>{_number(spread)}</td>"
            f"<td>{_number(row['spread_within'])}</td><td>{_percent(row['judges'])}</td>"
            f"<td>{'–' if constant is None else _percent(constant)}</td><td>{shown}</td><td>{needed}</td></tr>"
        )
    table = (
        "<table><tr><th>reward</th><th>mean</th><th>spread</th><th>within prompts</th><th>prompts it can judge</th>"
        f"<th>constant</th><th>shown by one update</th><th>updates needed</th></tr>{body}</table>"
    )
    note = (
        "A raw sum follows whoever spreads furthest: spreads relative to the largest, and whose the sum's variance "
        "within prompts is (dotted: equal shares). <i>Constant</i>: share of its prompts whose images it cannot tell "
        "apart. <i>Shown</i>: share of its gradient in what one update shows of it, the rest is noise. <i>Needed</i>: "
        "so many updates' images show as much gradient as noise."
    )
    return section("Scales and signals", note, figures.sizes(content["scores"]["rewards"], norms), table)


def _correlations(content: Mapping[str, Any]) -> str:
    scores, names = content["scores"], content["rewards"]
    counts = [n for i, row in enumerate(scores["jointly"]) for n in row[:i]]
    note = (
        "Over images that both judged, each score less its prompt's mean: only what tells a prompt's images apart "
        f"reaches an advantage; {min(counts)} to {max(counts)} images a pair."
    )
    panels = {"Pearson": scores["pearson"], "Spearman": scores["spearman"]}
    return section("Do the scores agree?", note, figures.heatmaps(names, panels))


def _specialists(content: Mapping[str, Any], scores: np.ndarray, sources: Sequence[str]) -> str:
    share = content["scores"]["informative"]
    rows = content["scores"]["rewards"].items()
    alone = ", ".join(f"{escape(name)} {_percent(row['alone'])}" for name, row in rows)
    note = (
        f"z-scores of every sample (grey: cannot be judged). A sample is informative for a reward if its advantage "
        f"exceeds ±{INFORMATIVE:g}: {_percent(share['one'])} are for exactly one reward ({alone}), "
        f"{_percent(share['some'])} for several, {_percent(share['all'])} for all, {_percent(share['none'])} for none."
    )
    names = [figures.plain(name) for name in content["rewards"]]
    labels = [figures.plain(source) for source in sources]
    with np.errstate(all="ignore"):
        return section("Specialist map", note, specialist_map(scores, names, labels))


def _gallery(names: Sequence[str], pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    cards = []
    for picture in pictures:
        rows = ""
        for name, score, advantage in zip(names, picture.scores, picture.advantages, strict=True):
            if score == score:
                mark = "up" if advantage > INFORMATIVE else "down" if advantage < -INFORMATIVE else "same"
                rows += (
                    f'<tr><td>{escape(name)}</td><td>{_number(score)}</td><td class="{mark}">{advantage:+.1f}</td></tr>'
                )
        image = f'<img alt="" src="{inline_png(to_png(picture.pixels))}">'
        cards.append(
            f'<div class="pair discord">{image}<div><b>{escape(picture.prompt)}</b><table>{rows}</table></div></div>'
        )
    style = (
        "<style>.discord{display:flex;gap:10px;align-items:flex-start}.discord img{width:88px;height:88px;"
        "object-fit:cover;border-radius:4px;image-rendering:pixelated}.discord table{font-size:12.5px}"
        ".discord td{padding:1px 7px 1px 0}</style>"
    )
    note = "Samples that one reward would have more of and another less of: score, and advantage within the prompt."
    return section("What they disagree on", note, style, f'<div class="gallery">{"".join(cards)}</div>')


def _about(content: Mapping[str, Any]) -> str:
    setup = content["setup"]
    return (
        "<section><details><summary>How it was measured</summary>"
        f"<p>Objective {escape(setup['objective'])}, {setup['visits']} image-timestep visits an update, "
        f"{setup['parameters']:,} trained parameters, seed {setup['seed']}. The adapter is fresh: its second factors "
        "are zero and alone have gradients, as in training's first updates. Inner products of true gradients come from "
        "pairs of different batches, which share no noise; their intervals from leaving batches out in turn. All "
        "numbers: conflict.json.</p></details></section>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
