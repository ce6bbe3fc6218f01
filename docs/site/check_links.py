"""Fails where a page of the built site leads to nothing: a page, a place in a page, a picture, a style.

    python docs/site/check_links.py build/site

zensical checks the links of Markdown; this reads what came out, so docstrings and pictures count too.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page leads to, and the places that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.places |= {values[key] for key in ("id", "name") if key in values}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        if tag == "autoref":  # mkdocstrings leaves it where a name leads nowhere
            self.links.append(f"unknown:{values.get('identifier', '')}")


def broken(site: Path) -> list[str]:
    """``page: link`` of each that leads to nothing; what leads out of the site is not followed."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses count from the server's root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme == "unknown":
                found.append(f"{path.relative_to(site)}: no reference for {parts.path}")
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            places = pages[target].places if target in pages else None
            if not target.is_file() or (
                parts.fragment and places is not None and parts.fragment not in places
            ):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def main(argv: list[str]) -> int:
    site = Path(argv[0]).resolve()
    if not (site / "index.html").is_file():
        sys.stderr.write(f"{site} is no built site: it has no index.html; run `make docs`\n")
        return 2
    found = broken(site)
    sys.stdout.write("".join(f"{line}\n" for line in found) + f"{len(found)} broken links in {site}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
