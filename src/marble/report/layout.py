"""What all of our pages have in common: one style, no script unless given one, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from html import escape

STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#222;background:#f6f6f8;margin:0}
main{max-width:1020px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;margin:0 0 4px} h2{font-size:18px;margin:0 0 4px}
section{background:#fff;border:1px solid #e4e4ea;border-radius:10px;padding:18px 22px;margin-top:18px}
p{margin:6px 0} .note{color:#666;font-size:13.5px} .lead{font-size:17px}
table{border-collapse:collapse;font-size:14px}
td,th{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left} th{color:#666;font-weight:600}
.up{color:#1c7c54;font-weight:600} .down{color:#b3261e;font-weight:600} .same{color:#777}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px}
.pair{border:1px solid #eee;border-radius:8px;padding:8px 10px}
.pair b{display:block;font-size:13px;font-weight:600;margin-bottom:4px}
.row{display:flex;gap:4px;align-items:center;margin-top:3px} .row span{width:44px;font-size:11.5px;color:#777}
.row img{width:76px;height:76px;object-fit:cover;border-radius:3px;image-rendering:pixelated}
svg{max-width:100%;height:auto}
details summary{cursor:pointer;font-weight:600}
pre{font-size:12.5px;overflow:auto;background:#f6f6f8;padding:10px;border-radius:6px}
"""


def page(title: str, *parts: str, script: str = "") -> str:
    """A whole HTML page; empty parts are left out.

    Args:
        title: plain text.
        parts: HTML, escaped by who made it.
        script: JavaScript of our own; none of it may hold what a user wrote.
    """
    body = "\n".join(part for part in parts if part)
    code = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main>{code}</body></html>\n"
    )


def section(title: str, note: str, *content: str) -> str:
    """A box with a heading and a note over its content; `note` and `content` are HTML."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{note}</p>{"".join(content)}</section>'


def inline_png(png: bytes) -> str:
    """A picture as the `src` of an `img`."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
