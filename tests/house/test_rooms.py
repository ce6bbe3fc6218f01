"""The tests follow the package: a folder for each room; what they share stands in `tests/helpers` alone."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from paths import HELPERS, ROOT

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def imported(source: str) -> set[str]:
    """The first parts of all names that ``source`` imports, inside functions and texts that it runs too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", [*TESTS, *sorted(HELPERS.rglob("*.py"))], ids=lambda p: p.stem)
def test_nothing_imports_a_test_file(path: Path) -> None:
    names = {test.stem for test in TESTS}
    assert not imported(path.read_text(encoding="utf-8")) & names, "move what is shared into tests/helpers"


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n    from c.d import e\n    import g as h"
    assert imported(source) == {"a", "c", "g"}


def test_no_two_test_files_have_one_name() -> None:
    """They are in no package, so that pytest imports each by its name alone."""
    assert [name for name, count in Counter(path.name for path in TESTS).items() if count > 1] == []


def test_every_room_of_the_package_has_its_tests() -> None:
    rooms = {p.parent.name for p in (ROOT / "voco_plugin").glob("*/__init__.py")}
    tested = {path.parent.name for path in TESTS}
    assert rooms - tested == set(), "`make test PART=<room>` runs nothing"
    assert tested - rooms == {"house", "legacy"}, "a folder of tests that is no room"
