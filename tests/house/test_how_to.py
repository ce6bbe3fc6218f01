"""The pages "I want to …" in docs/how-to/: their commands and their Python run as they stand, on a small
gridworld.

Of a page, in order: each line of a block ``sh`` is a command; blocks ``python`` are one program; a block
``python title="…"`` is a file. Sizes of data and steps are made small.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import voco_plugin as vp
from commands import SHORT
from paths import ROOT
from tiny.parts import write_encoder, write_llm
from voco_plugin.cli import main

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r'^```(sh|python)(?: title="(\S+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
SMALLER = {"4000": "12", "200": "6"}


def words(line: str) -> list[str]:
    """A line of a page as the arguments of `voco`."""
    name, *rest = shlex.split(line)
    assert name == "voco", f"{line}: a block sh has `voco` commands alone"
    rest = [SMALLER.get(word, word) for word in rest]
    return [*rest, *SHORT] if rest[0] == "train" and "--check" not in rest else rest


def parts(here: Path) -> None:
    """The encoder and language model that a page composes, in the folders that it names."""
    for made, name in ((write_encoder(here, "clip"), "encoder"), (write_llm(here, "llama"), "llm")):
        (here / "runs/parts").mkdir(exist_ok=True)
        Path(made).rename(here / "runs/parts" / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_says_runs(
    page: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for made in (world / "runs").iterdir():  # as links, so that a page finds what the tuning page makes
        (here / "runs").mkdir(exist_ok=True)
        (here / "runs" / made.name).symlink_to(made) if page.stem != "tune" else None
    monkeypatch.chdir(here)
    for registry in (vp.registry.encoders, vp.registry.families):  # what a page registers goes with it
        registry.list()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    parts(here) if page.stem == "swap" else None
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    program: dict[str, object] = {"__name__": "page"}
    for kind, title, text in blocks:
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, str(page), "exec"), program)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                capsys.readouterr()
                assert main(words(line)) == 0, (line, capsys.readouterr().err)


def test_every_page_is_one_of_the_table_of_contents() -> None:
    names = [path.stem for path in PAGES]
    assert names == sorted(["try", "tune", "cache", "serve", "evaluate", "swap", "family"])
