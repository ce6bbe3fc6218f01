"""What an image and an answer cost, as Markdown tables for the page and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .picture_chat import Added, Answered


def megabytes(count: float) -> str:
    """Bytes as MB, small enough counts to a thousandth."""
    return f"{count / 1e6:,.3f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1e3 * value:,.0f} ms" if value < 10 else f"{value:,.1f} s"


def added_line(added: Added) -> str:
    """An image in one line."""
    tokens = f"{added.vision_tokens} vision tokens → {added.num_tokens}"
    return (
        f"{added.name}: {tokens}, {megabytes(added.vision_nbytes)} → {megabytes(added.nbytes)}, "
        f"compressed in {seconds(added.seconds)}"
    )


def answered_line(answered: Answered) -> str:
    """An answer in one line."""
    return f"{answered.text or '(empty)'}   [first token {seconds(answered.first_token_seconds) or 'none'}]"


def costs_table(
    added: Sequence[Added], answered: Answered | None = None, plain: Answered | None = None
) -> str:
    """Beside one another: the cached blocks, and every vision token; empty before there is an image.

    Args:
        answered: the latest answer from the blocks.
        plain: the same question, answered on every vision token.
    """
    if not added:
        return ""
    rows = [
        ("tokens of the image", sum(a.num_tokens for a in added), sum(a.vision_tokens for a in added)),
        (
            "keys and values",
            megabytes(sum(a.nbytes for a in added)),
            megabytes(sum(a.vision_nbytes for a in added)),
        ),
        ("compressed once in", seconds(sum(a.seconds for a in added)), ""),
    ]
    if answered is not None:
        rows += [
            ("first token after", seconds(answered.first_token_seconds), _of(plain, "first_token_seconds")),
            ("whole answer after", seconds(answered.seconds), _of(plain, "seconds")),
            ("positions in the KV cache", answered.slots or "", "" if plain is None else plain.slots),
        ]
    if plain is not None and answered is not None:
        rows.append(("answer", _cell(answered.text), _cell(plain.text)))
    lines = ["| | cached | every vision token |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {ours} | {theirs} |" for what, ours, theirs in rows)])


def _of(plain: Answered | None, name: str) -> str:
    return "" if plain is None else seconds(getattr(plain, name))


def _cell(text: str) -> str:
    """An answer in a table's cell, where a bar or a line break would end it."""
    return " ".join(text.replace("|", "\\|").split()) or "(empty)"


def read_table(read: Sequence[tuple[str, int]]) -> str:
    """What an answer could read, in order."""
    if not read:
        return ""
    return "\n".join(["| read | tokens |", "|---|---|", *(f"| {what} | {count} |" for what, count in read)])


__all__ = ["added_line", "answered_line", "costs_table", "megabytes", "read_table", "seconds"]
