"""A study's results folder: ``results.json``, ``tables.md`` and the pictures.

Made of ``runs/*.json``, ``questions.json`` and ``search.json`` alone, so it is made again anywhere from the
folder itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import atomic_write_text
from .definition import Study
from .figures import Figures
from .plan import Run
from .records import FORMAT_VERSION, RunFolder, read_json
from .runner import Failure
from .tables import page

SEARCH = "search.json"
RESULTS = "results.json"
TABLES = "tables.md"


def write_results(
    folder: Path,
    name: str,
    study: Study,
    runs: Sequence[Run],
    *,
    command: str,
    definition: Mapping[str, Any],
    search: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[Failure] = (),
    by: str = "key",
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write everything that the finished ones of ``runs`` say; returns what ``results.json`` holds.

    Args:
        definition: the YAML's values, as changed.
        search: every value tried, with its validation accuracy.
        by: how a record is known to be of this definition: ``key``, or ``values_key`` where base and data are
            not at hand.
        tell: gets a line for what is left out.
    """
    folder = Path(folder)
    kept = RunFolder(folder)
    records = kept.current(runs, by=by)
    search = [one for one in search if one["method"] in study.methods]  # one may be the study's no longer
    known = {record["name"] for record in records}
    missing = [run.name for run in runs if run.name not in known]
    stale = [run.name for run in runs if run.name in missing and kept.read(run) is not None]
    if stale:
        tell(f"left out, made under another definition: {', '.join(stale)}")
    asked = kept.questions()
    environments = _distinct(
        e for r in records for e in ((r["training"] or {}).get("environment"), r["environment"]) if e
    )
    figures = Figures(study, records, asked)
    result = {
        "format_version": FORMAT_VERSION,
        "study": name,
        "command": command,
        "definition": definition,
        "environments": environments,
        "commands": {record["name"]: record["commands"] for record in records},
        "missing": missing,
        "failed": [vars(failure) for failure in failures],
        "search": list(search),
        "intervals": {"resample": study.resample, "level": 0.95},
        **figures.to_dict(),
    }
    atomic_write_text(folder / RESULTS, json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    pictures = _pictures(figures, folder, tell)
    page(
        name, study, figures, command=command, search=search, missing=missing, failures=failures,
        environments=environments, pictures=pictures,
    ).write(folder / TABLES)  # fmt: skip
    return result


def write_search(folder: Path, rows: int | None, tried: Sequence[Mapping[str, Any]]) -> None:
    """What the search tried and found, and how many rows the training set has, the last ones held out."""
    value = {"rows": rows, "tried": list(tried)}
    atomic_write_text(Path(folder) / SEARCH, json.dumps(value, indent=1, default=str) + "\n")


def read_search(folder: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """What :func:`write_search` wrote; nothing where there was no search."""
    found = read_json(Path(folder) / SEARCH) or {"rows": None, "tried": []}
    return found["rows"], found["tried"]


def _pictures(figures: Figures, folder: Path, tell: Callable[[str], None]) -> list[tuple[Path, str]]:
    from .charts import draw_study

    if not figures.rows:
        return []
    try:
        return draw_study(figures, folder)
    except ImportError as problem:
        tell(f"no pictures: {problem}")
        return []


def _distinct(environments: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each machine and set of versions once: of two that say the same, the one that says more."""
    found: list[Mapping[str, Any]] = []
    for one in environments:
        slim = {**one, "versions": dict(one["versions"])}
        for other in found:
            same = all(other[k] == slim[k] for k in slim if k != "versions")
            if same and all(slim["versions"].get(p, v) == v for p, v in other["versions"].items()):
                other["versions"].update(slim["versions"])  # type: ignore[union-attr]
                break
        else:
            found.append(slim)
    return found
