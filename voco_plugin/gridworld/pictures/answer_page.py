"""Pictures, questions and answers as one HTML file with nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#222}"
    "article{display:flex;gap:1.5rem;flex-wrap:wrap;border-top:1px solid #ddd;padding:1.5rem 0}"
    "img{width:224px;height:224px;border-radius:8px}table{border-collapse:collapse;flex:1 1 20rem}"
    "td{padding:.15rem .6rem;vertical-align:top}.no{color:#a11;font-weight:600}.yes{color:#161}"
    "small,footer{color:#666}"
)


def answer_page(
    title: str,
    intro: str,
    pictures: Sequence[Path],
    rows: Sequence[Sequence[tuple[str, str, str | None]]],
    credit: str,
) -> str:
    """The page.

    Args:
        title, intro, credit: one line each.
        pictures: PNG files, which the page holds itself.
        rows: per picture `(question, answer, what would be right)`, the last `None` where it is right.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>",
    ]
    for number, (path, asked) in enumerate(zip(pictures, rows, strict=True)):
        image = base64.b64encode(path.read_bytes()).decode()
        cells = [
            f"<tr><td>{html.escape(question)}</td><td>{html.escape(answer)}</td>{_mark(right)}</tr>"
            for question, answer, right in asked
        ]
        parts.append(
            f"<article><img alt='picture {number}' src='data:image/png;base64,{image}'>"
            f"<table>{''.join(cells)}</table></article>"
        )
    return "\n".join([*parts, f"<footer>{html.escape(credit)}</footer></body></html>"]) + "\n"


def _mark(right: str | None) -> str:
    if right is None:
        return "<td class='yes'>✓</td>"
    return f"<td class='no'>✗ <small>{html.escape(right)}</small></td>"
