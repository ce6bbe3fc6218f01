"""Imports point down: a module sees its own layer and lower ones; what stands outside sees only the public
API; and no file imports in a circle.

Function-level imports count too (being lazy is no excuse). Those under `if TYPE_CHECKING` count for circles
only: what a signature names is read with the file too.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from paths import ROOT

PACKAGE = ROOT / "voco_plugin"

LAYERS: dict[int, tuple[str, ...]] = {
    0: ("config", "registry", "files"),
    1: ("core",),
    2: ("data",),
    3: ("video",),
    4: ("cache",),
    5: ("inference",),
    6: ("models",),
    7: ("store",),
    8: ("training",),
    9: ("evaluation",),
    10: ("benchmark",),
    11: ("gridworld",),
    12: ("serving",),
    13: ("cli",),
}
ANYWHERE = ("_compat", "_moved")
SEES_GRIDWORLD = ("gridworld", "cli")
"""Rooms that may import the synthetic world. Recipes of studies name its data; benchmarks and tests, which
are not shipped, build its tiny models."""
OUTSIDE = ("examples", "recipes", "integrations")
PUBLIC_MODULES = (
    "benchmark",
    "cache.engine_file",
    "cache.engine_request",
    "cli",
    "config",
    "data",
    "evaluation.metrics",
    "evaluation.reporting",
    "evaluation.video_qa",
    "inference.answering",
    "inference.prompts",
    "inference.session",
    "registry",
    "store.bulk",
    "store.sources",
    "training",
    "video",
)
"""What stands outside may import of the package's modules; each stands for what is in it."""
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


OPEN_CIRCLES: frozenset[frozenset[str]] = frozenset()
"""Circles of imports that are still to be opened up; nothing is added here."""


def imports_of(source: str, module: str, is_package: bool, typing_too: bool = False) -> list[tuple[int, str]]:
    """`(line, dotted name)` of each import of `voco_plugin` in `source`; `from a import b` gives `a.b`."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if not typing_too and isinstance(node, ast.If) and _is_type_checking(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base] if base else parts)
            found.extend((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return [(line, name) for line, name in found if name.split(".")[0] == "voco_plugin"]


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def layer_errors(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, the text of `module`, imports against the direction."""
    own = LAYER_OF[module.split(".")[1]]
    errors = []
    for line, name in imports_of(source, module, is_package):
        part = name.split(".")[1] if "." in name else ""
        if part in ANYWHERE:
            continue
        if part not in LAYER_OF:
            errors.append(
                f"{module}:{line} imports {name}: use the module itself, not the package's public names"
            )
        elif LAYER_OF[part] > own:
            errors.append(f"{module}:{line} (layer {own}) imports {name} (layer {LAYER_OF[part]})")
    return errors


def outside_errors(source: str, where: str, public: tuple[str, ...]) -> list[str]:
    """What `source`, a file of examples, recipes or integrations, imports besides the public API."""
    errors = []
    for line, name in imports_of(source, where, False):
        parts = name.split(".")[1:]
        private = any(part.startswith("_") and not part.startswith("__") for part in parts)
        # a bridge's own files may see each other, under the name they have once installed
        known = not parts or parts[0] in (*public, *OUTSIDE, "__version__")
        known = known or any(f"{'.'.join(parts)}.".startswith(f"{module}.") for module in PUBLIC_MODULES)
        if private or not known:
            errors.append(f"{where}:{line} imports {name}, which is not public")
    return errors


def gridworld_errors(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, the text of `module`, imports of the synthetic world, unless `module` may."""
    if module.split(".")[1:2] and module.split(".")[1] in SEES_GRIDWORLD:
        return []
    return [
        f"{module}:{line} imports {name}: only {', '.join(SEES_GRIDWORLD)}, benchmarks and tests may"
        for line, name in imports_of(source, module, is_package)
        if name.startswith("voco_plugin.gridworld")
    ]


def _modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_its_own_layer_and_lower_ones(path: Path) -> None:
    module = _module_name(path)
    part = module.split(".")[1]
    if part in (*ANYWHERE, "__main__"):
        return
    assert part in LAYER_OF, f"{module} has no layer: put it into LAYERS and into docs/architecture.md"
    assert layer_errors(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


def _outside() -> list[Path]:
    found = [p for folder in OUTSIDE for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".ipynb")]
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def _source(path: Path) -> str:
    """The Python of a file; of a notebook its cells, one behind the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code")


@pytest.mark.parametrize("path", _outside(), ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_recipes_and_integrations_see_only_the_public_api(path: Path) -> None:
    import voco_plugin

    public = tuple(voco_plugin.__all__)
    assert outside_errors(_source(path), str(path.relative_to(ROOT)), public) == []


def test_only_the_command_line_imports_the_gridworld() -> None:
    shipped = {path: _module_name(path) for path in [*PACKAGE.rglob("*.py"), *_outside()]}
    errors = [
        error
        for path, module in shipped.items()
        for error in gridworld_errors(_source(path), module, path.name == "__init__.py")
    ]
    assert errors == []
    assert any(
        "voco_plugin.gridworld" in name
        for path in (PACKAGE / "cli").glob("*.py")
        for _, name in imports_of(path.read_text(encoding="utf-8"), _module_name(path), False)
    ), "the command line imports it: if it is called otherwise now, this test looks for the wrong name"


@pytest.mark.parametrize(
    ("source", "module", "count"),
    [
        ("from ..gridworld.scenes import Scene", "voco_plugin.serving.app", 1),
        ("def f():\n    from voco_plugin.gridworld import words", "voco_plugin.training.card", 1),
        ("from voco_plugin.gridworld.questions import DESCRIBE", "examples.quickstart", 1),
        ("from .gridworld import scenes", "voco_plugin", 1),
        ("from ..gridworld.dataset import write_gridworld", "voco_plugin.cli.gridworld", 0),
        ("from .scenes import Scene", "voco_plugin.gridworld.words", 0),
        ("from . import gridworld_video", "voco_plugin.cli.gridworld", 0),
    ],
)
def test_the_gridworld_checker_sees_who_imports_it(source: str, module: str, count: int) -> None:
    assert len(gridworld_errors(source, module, is_package=module == "voco_plugin")) == count


@pytest.mark.parametrize(
    ("source", "module", "is_package", "count"),
    [
        ("from ..cache import VoCoCache", "voco_plugin.video.reading", False, 1),
        ("from .masks import dense_mask", "voco_plugin.core.layout", False, 0),
        ("def f():\n    from voco_plugin.training import config", "voco_plugin.core.masks", False, 1),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..cli import main",
            "voco_plugin.core.masks",
            False,
            0,
        ),
        (
            "if TYPE_CHECKING:\n    pass\nelse:\n    from ..cli import main",
            "voco_plugin.core.masks",
            False,
            1,
        ),
        ("from .. import cli", "voco_plugin.core.masks", False, 1),
        ("from . import eager", "voco_plugin.core.attention", True, 0),
        ("from ... import inference", "voco_plugin.core.attention", True, 1),
        ("import voco_plugin as vp", "voco_plugin.evaluation.metrics", False, 1),
        ("from voco_plugin import VoCoConfig", "voco_plugin.evaluation.metrics", False, 1),
        ("from .._compat import x", "voco_plugin.core.masks", False, 0),
        ("import torch", "voco_plugin.core.masks", False, 0),
    ],
)
def test_the_checker_sees_every_form_of_import(
    source: str, module: str, is_package: bool, count: int
) -> None:
    assert len(layer_errors(source, module, is_package)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import voco_plugin as vp", 0),
        ("from voco_plugin import VoCoConfig", 0),
        ("from voco_plugin.evaluation.metrics import retention", 0),
        ("from voco_plugin.core.masks import isolation_predicate", 1),
        ("from voco_plugin.cli import _main", 1),
        ("def f():\n    from voco_plugin._compat import x", 1),
    ],
)
def test_the_outside_checker_sees_private_imports(source: str, count: int) -> None:
    assert len(outside_errors(source, "examples/x.py", ("VoCoConfig",))) == count


def circles(files: dict[str, tuple[str, bool]]) -> set[frozenset[str]]:
    """Groups of modules that all import one another, in one step or several.

    Args:
        files: module → (its source, whether it is a package's `__init__`).
    """
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, (source, is_package) in files.items():
        for _, name in imports_of(source, module, is_package, typing_too=True):
            while name not in files and "." in name:  # a.b.Class is in a.b
                name = name.rpartition(".")[0]
            if name in files and name != module:
                graph[module].add(name)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        return seen

    reach = {module: reached(module) for module in files}
    in_one = {module: {other for other in reach[module] if module in reach[other]} for module in files}
    return {frozenset(group) for group in in_one.values() if group}


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_import_names_a_module_that_is_there(path: Path) -> None:
    """None goes through an old path, which would cost users a warning that is not theirs."""
    lost = []
    found = imports_of(path.read_text(encoding="utf-8"), _module_name(path), path.name == "__init__.py", True)
    for line, name in found:
        place = ROOT.joinpath(*name.split(".")[:-1])  # the last part may be a class or function
        whole = ROOT.joinpath(*name.split("."))
        there = [p.with_suffix(".py").is_file() or (p / "__init__.py").is_file() for p in (place, whole)]
        if not any(there):
            lost.append((line, name))
    assert lost == []


def test_no_file_imports_in_a_circle() -> None:
    files = {
        _module_name(path): (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for path in _modules()
    }
    found = circles(files)
    assert not found - OPEN_CIRCLES, [sorted(circle) for circle in found - OPEN_CIRCLES]
    assert not OPEN_CIRCLES - found, "a circle is open now: take it out of OPEN_CIRCLES"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "from .b import x", "b": "from .c import x", "c": "import torch"}, []),
        ({"a": "from .b import x", "b": "from .a import y"}, ["ab"]),
        ({"a": "from .b import x", "b": "def f():\n    from . import a"}, ["ab"]),
        ({"a": "import voco_plugin.b", "b": "if TYPE_CHECKING:\n    from .a import A"}, ["ab"]),
        ({"a": "from .b import x", "b": "from .c import x", "c": "from .a import x"}, ["abc"]),
        ({"a": "from . import b", "b": "from . import a", "c": "from .d import x", "d": "from .c import y"},
         ["ab", "cd"]),
        ({"a": "from .b import x", "b": "from .b.deeper import x"}, []),
    ],
)  # fmt: skip
def test_the_circle_finder_sees_every_form_of_import(sources: dict[str, str], expected: list[str]) -> None:
    files = {f"voco_plugin.{name}": (source, False) for name, source in sources.items()}
    assert circles(files) == {frozenset(f"voco_plugin.{name}" for name in group) for group in expected}
