"""A one-page Markdown report: headings, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import atomic_write_text


class Report:
    """Collects parts in order; ``write`` puts them into one file, pictures by relative path."""

    def __init__(self, title: str) -> None:
        self.parts: list[str] = [f"# {title}"]
        self.pictures: list[Path] = []

    def heading(self, text: str) -> Report:
        self.parts.append(f"## {text}")
        return self

    def text(self, text: str) -> Report:
        self.parts.append(text)
        return self

    def code(self, text: str) -> Report:
        self.parts.append(f"```\n{text}\n```")
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Report:
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
        self.parts.append("\n".join(lines))
        return self

    def picture(self, path: str | Path, alt: str) -> Report:
        self.pictures.append(Path(path))
        self.parts.append(f"![{alt}]({{picture:{len(self.pictures) - 1}}})")
        return self

    def write(self, path: str | Path) -> Path:
        """Write the report; pictures must lie next to it or below.

        Raises:
            ValueError: a picture lies elsewhere.
        """
        target = Path(path)
        text = "\n\n".join(self.parts) + "\n"
        for number, picture in enumerate(self.pictures):
            try:
                relative = picture.resolve().relative_to(target.resolve().parent)
            except ValueError:
                raise ValueError(f"picture {picture} is not below {target.parent}: put it there.") from None
            text = text.replace(f"{{picture:{number}}}", relative.as_posix())
        atomic_write_text(target, text)
        return target


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
