"""The documentation: a page for each public name, a docstring that names each argument, links that lead
somewhere on a code host and in the site alike. `make docs` builds the site itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

import voco_plugin as vp
from paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

# -- the pages -----------------------------------------------------------------------------------------------


def listed(nav: Any) -> list[str]:
    """The files of a table of contents."""
    if isinstance(nav, str):
        return [nav]
    return [name for item in (nav.values() if isinstance(nav, dict) else nav) for name in listed(item)]


def test_the_table_of_contents_has_every_page_once() -> None:
    assert sorted(listed(NAV)) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def test_every_public_name_stands_once_in_the_reference() -> None:
    found = [
        name
        for path in sorted((DOCS / "reference").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    modules = {name: f"voco_plugin{path}" for name, path in vp._MODULES.items()}
    wanted = [modules.get(name, f"voco_plugin.{name}") for name in vp.__all__ if name != "__version__"]
    assert sorted(found) == sorted(wanted), "put it on its page in docs/reference/"


def section(text: str, place: str) -> str:
    """What stands under the heading that a link calls ``place``, up to the next heading."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return next(
        under for heading, under in zip(parts[1::2], parts[2::2], strict=True) if host_place(heading) == place
    )


def test_the_landing_page_has_no_figure_of_its_own() -> None:
    """Each number of its table stands in the section that its row links."""
    rows = (DOCS / "index.md").read_text(encoding="utf-8").split("## What was measured")[1]
    table = re.findall(r"^\| (.+) \| (.+) \| \[\w+\]\((\S+?)#(\S+)\) \|$", rows, flags=re.MULTILINE)
    assert len(table) >= 5
    for label, told, page, place in table:
        text = section((DOCS / page).read_text(encoding="utf-8"), place)
        for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", told):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", text), (label, number)


# -- docstrings ----------------------------------------------------------------------------------------------


def arguments(function: Any) -> list[str]:
    """What a caller may give by name; not ``*args`` and ``**kwargs``, which are for what is called behind."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in several and p.name not in ("self", "cls")]


def unnamed(docstring: str | None, names: list[str]) -> list[str]:
    return [name for name in names if not re.search(rf"\b{name}\b", docstring or "")]


def gaps(name: str, thing: Any) -> list[str]:
    """What the docstrings of a public name leave out: themselves, or arguments; methods of a class too."""
    if inspect.isfunction(thing):
        return lacking(name, thing.__doc__, arguments(thing))
    if not inspect.isclass(thing):
        return lacking(name, thing.__doc__, [])
    own = vars(thing)
    if dataclasses.is_dataclass(thing):
        given = [f.name for f in dataclasses.fields(thing) if f.name in own.get("__annotations__", {})]
    else:
        given = arguments(own["__init__"]) if "__init__" in own else []
    made = getattr(own.get("__init__"), "__doc__", None) if not dataclasses.is_dataclass(thing) else None
    found = lacking(name, own.get("__doc__") and own["__doc__"] + (made or ""), given)
    for key, value in own.items():
        value = getattr(value, "fget", None) or inspect.unwrap(getattr(value, "__func__", value))
        if key.startswith("_") or not inspect.isfunction(value) or overrides(thing, key):
            continue
        found += lacking(f"{name}.{key}", value.__doc__, arguments(value))
    return found


def lacking(name: str, docstring: str | None, names: list[str]) -> list[str]:
    if not docstring:
        return [f"{name}: no docstring"]
    return [f"{name}: {argument}" for argument in unnamed(docstring, names)]


def overrides(thing: type, key: str) -> bool:
    """Whether a method is another library's, whose documentation holds."""
    return any(
        key in vars(base) for base in thing.__mro__[1:] if not base.__module__.startswith("voco_plugin")
    )


@pytest.mark.parametrize("name", [name for name in vp.__all__ if name != "__version__"])
def test_a_public_name_says_what_its_arguments_are(name: str) -> None:
    assert gaps(name, getattr(vp, name)) == []


def test_what_is_left_out_is_seen() -> None:
    def told(model: Any, depth: int = 1, **more: Any) -> None:
        """Of ``model`` and ``depth``."""

    def half(model: Any, depth: int = 1) -> None:
        """Of ``model``; deep as models are."""

    class Kept(dict):
        """Takes ``size``."""

        def __init__(self, size: int) -> None: ...

        def silent(self) -> None: ...

        def half(self, key: str) -> None:
            """Of something."""

        def get(self, key: Any, default: Any = None) -> Any: ...

    assert gaps("told", told) == []
    assert gaps("half", half) == ["half: depth"]
    assert gaps("Kept", Kept) == ["Kept.silent: no docstring", "Kept.half: key"]
    Kept.__init__.__doc__ = ""
    Kept.__doc__ = None
    assert gaps("Kept", Kept)[0] == "Kept: no docstring"


# -- links ---------------------------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```", flags=re.MULTILINE | re.DOTALL)


def host_place(heading: str) -> str:
    """The place that a code host gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def site_place(heading: str) -> str:
    """The place that Python-Markdown's ``toc`` gives it."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def places(text: str) -> set[str]:
    """Where a link may lead in a page: headings that both ways of reading it call the same."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {host_place(heading) for heading in plain} & {site_place(heading) for heading in plain}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in LINK.findall(FENCED.sub("", text)):
        path, _, place = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        inside = DOCS not in page.parents or DOCS in target.parents
        if not target.is_file() or not inside:
            dead.append(link)
        elif place and target.suffix == ".md" and place not in places(target.read_text(encoding="utf-8")):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_on_a_code_host_and_in_the_site(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "link",
    ["gone.md", "../README.md", "caches.md#nowhere", "results/gone.png", "#not-here", "../tests/conftest.py"],
)
def test_a_link_that_leads_nowhere_is_seen(link: str) -> None:
    assert dead_links(DOCS / "index.md", f"a [word]({link})") == [link]


def test_a_place_must_have_one_name_on_both_sides() -> None:
    assert places("# One, two\n## `voco` × two\n```\n# no heading\n```\n## A [link](x.md)") == {
        "one-two",
        "a-link",
    }


# -- what builds the site ------------------------------------------------------------------------------------


@pytest.fixture
def site_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    for name in ("check_links", "names"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_broken_link_of_the_built_site_is_found(site_tools: None, tmp_path: Path) -> None:
    from check_links import broken

    (tmp_path / "index.html").write_text(
        '<a href="a.html#here">x</a><a href="https://x.y/z">x</a><img src="p.png">'
    )
    (tmp_path / "a.html").write_text('<p id="here"><a href="#gone">x</a><a href="index.html">x</a>')
    (tmp_path / "p.png").write_bytes(b"")
    assert broken(tmp_path) == ["a.html: #gone"]
    (tmp_path / "p.png").unlink()
    (tmp_path / "b.html").write_text('<autoref identifier="voco_plugin.nothing">x</autoref>')
    assert broken(tmp_path) == [
        "a.html: #gone",
        "b.html: no reference for voco_plugin.nothing",
        "index.html: p.png",
    ]


def test_the_site_knows_the_public_names_and_the_roles(site_tools: None) -> None:
    from names import documented, linked, public_names

    names = public_names(ROOT / "voco_plugin")
    assert sorted([*names, *vp._MODULES, "__version__"]) == sorted(vp.__all__)
    text = (
        "a :class:`~voco_plugin.cache.VoCoCache`, :meth:`.fork` of :mod:`voco_plugin.files`, :func:`~a.told`"
    )
    assert (
        linked(text, names) == "a [`VoCoCache`][voco_plugin.VoCoCache], `fork` of `voco_plugin.files`, `told`"
    )
    lines = b"a.b py:class 1 x.html#$ -\na.c py:function 1 x.html#$ -\n"
    assert documented(b"# 1\n# 2\n# 3\n# 4\n" + zlib.compress(lines)) == {"a.b", "a.c"}
