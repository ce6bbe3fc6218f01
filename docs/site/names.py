"""The public names of the package, and the roles of Sphinx by which docstrings name other objects."""

from __future__ import annotations

import ast
import re
import zlib
from pathlib import Path

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)([\w.]+)`")


def public_names(package: Path) -> list[str]:
    """The names of ``voco_plugin`` that load when first used, read off its source without importing it."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_NAMES":
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{package / '__init__.py'} has no _NAMES")


def linked(text: str, public: list[str]) -> str:
    """``text`` with its roles as Markdown."""

    def one(found: re.Match[str]) -> str:
        short, path = found.groups()
        last = path.rsplit(".", 1)[-1]
        if last in public:
            return f"[`{last}`][voco_plugin.{last}]"
        return f"`{last if short else path.lstrip('.')}`"

    return ROLE.sub(one, text)


def documented(inventory: bytes) -> set[str]:
    """The names in an ``objects.inv`` of Sphinx: four lines of text, then a line a name, compressed."""
    body = inventory.split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(body).decode("utf-8").splitlines() if line}
