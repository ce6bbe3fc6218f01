"""``voco study``: a grid of runs, resumed where it stopped, then tables and plots."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from ..config import nearest
from ..evaluation.study.definition import Study
from ..evaluation.study.runner import matches
from ..evaluation.text_before import read_text_before
from . import output
from .evaluate import positive
from .preconditions import check_inputs, commands_before
from .recipe import named_inputs, summary
from .study_file import count_rows, load_study, resolve, shipped

_SHOWN = 12


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "study",
        parents=[common],
        help="compare methods over K and seeds: runs, tables, plots",
        description="Run a study: a YAML file, or the bare name of a shipped one (`voco study --list`).\n"
        "Each run is `voco train` and `voco eval` in processes of their own. What is finished is not\n"
        "computed again, a killed run goes on from its checkpoint, a changed definition is a new run.",
        epilog="examples:\n"
        "  voco study gridworld_table1 --jobs 2\n"
        "  voco study gridworld_table1 --set seeds=[0] --set overrides.max_steps=50 --work runs/short\n"
        "  voco study table2 --print-commands > jobs.txt     # one line a run, for a cluster\n"
        "  voco study table2 --tables-only                   # from what is finished\n",
    )
    parser.add_argument("study", nargs="?", metavar="STUDY", help="a path, or the name of a shipped study")
    parser.add_argument("--out", metavar="FOLDER", help="its results (default: runs/results/NAME)")
    parser.add_argument(
        "--work", metavar="FOLDER", default="runs/study",
        help="trainings and readings, shared by every study that needs the same (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, help="runs at a time (default: 1, or one for each of --gpus)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--gpus", metavar="N[,N…]", help="devices that jobs take in turn, one each")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change a key of the study, as in --set overrides.max_steps=50; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--only", metavar="PATTERN", help="a method; or runs whose name has this or matches it (`voco-k*-s0`)"
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument(
        "--list", action="store_true", help="list the runs and what is done; without STUDY, studies"
    )
    does.add_argument("--print-commands", action="store_true", help="print the commands; run nothing")
    does.add_argument("--tables-only", action="store_true", help="tables and plots of what is there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    if args.study is None:
        if not args.list:
            raise ValueError(f"give a STUDY: a path, or one of {', '.join(shipped())}.")
        found = {name: summary(path) for name, path in shipped().items()}
        if args.json:
            output.emit_json([{"name": n, "summary": s, "path": str(shipped()[n])} for n, s in found.items()])
        else:
            output.emit(output.table(found.items(), ("study", "what it compares")))
        return 0
    path, study = load_study(args.study, args.changes)
    results = Path(args.out or Path("runs/results") / path.stem)
    if args.tables_only and args.only is not None:
        raise ValueError("--only chooses runs, and --tables-only makes tables of all: leave one of them out.")
    if not (args.tables_only or args.list or args.print_commands):
        check_files(study, path)  # at once: the plan imports what the recipe's keys belong to
    from ..evaluation.study.plan import Planner
    from ..evaluation.study.results import read_search
    from ..evaluation.study.run_keys import fingerprint

    if args.tables_only:
        rows, tried = read_search(results)
        chosen = {one["method"]: one["tried"] for one in tried if one["chosen"]}
        count = count_rows if rows is None else (lambda data, split: rows)
        planner = Planner(study, Path(args.work), resolve, _by_name, count)
        return _finish(args, planner, results, path, planner.runs(chosen), tried, by="values_key")
    counted = functools.partial(count_rows, before=commands_before(path))
    planner = Planner(study, Path(args.work), resolve, fingerprint, counted)
    args.only = checked_only(planner, args.only)
    if args.list:
        return _list(planner, args)
    if args.print_commands:
        from .study_commands import print_commands

        return print_commands(planner, args)
    return _run(args, planner, results, path)


def _by_name(source: str) -> str:
    """Stands in for a fingerprint where base and data may not be there."""
    return f"name:{source}"


def _run(args: argparse.Namespace, planner: Any, results: Path, path: Path) -> int:
    from ..evaluation.study.child_processes import Children, terminated_as_interrupted
    from ..evaluation.study.results import read_search, write_search
    from ..evaluation.study.runner import Runner

    if planner.study.search is None:
        (results / "search.json").unlink(missing_ok=True)
    gpus = [part.strip() for part in (args.gpus or "").split(",") if part.strip()]
    jobs = args.jobs or len(gpus) or 1
    runner = Runner(
        planner, results, Children(args.threads), jobs=jobs, gpus=gpus, tell=output.note, only=args.only,
        found=lambda tried: write_search(results, planner.rows, tried),
    )  # fmt: skip
    with terminated_as_interrupted():
        runs = runner.run()
    status = _finish(args, planner, results, path, runs, read_search(results)[1], failures=runner.failures)
    for failure in runner.failures:
        last = failure.stderr.splitlines()[-1] if failure.stderr else "it printed nothing"
        log = f" (log: {failure.log})" if failure.log else ""
        output.error("voco study", f"{', '.join(failure.runs)} failed: {last}{log}")
    return 1 if runner.failures else status


def _finish(
    args: argparse.Namespace, planner: Any, results: Path, path: Path, runs: Any, tried: Any, *,
    failures: Any = (), by: str = "key",
) -> int:  # fmt: skip
    """Tables and pictures of what is finished; printed, or as JSON."""
    import dataclasses

    from ..evaluation.study.results import TABLES, write_results

    command = "voco study " + " ".join([path.stem, *(f"--set {change}" for change in args.changes)])
    result = write_results(
        results, path.stem, planner.study, runs, command=command,
        definition=dataclasses.asdict(planner.study), search=tried, failures=failures, by=by,
        tell=output.note,
    )  # fmt: skip
    if args.json:
        output.emit_json(result)
        return 0
    rows = [
        [
            row["label"],
            row["num_tokens"],
            100 * row["accuracy"],
            _percent(row["raw"]),
            _percent(row["retention"]),
        ]
        for row in result["rows"]
    ]
    if rows:
        output.emit(output.table(rows, ("method", "K", "accuracy %", "raw ratio %", "retention %")))
    if result["missing"]:
        output.emit(f"{len(result['missing'])} of {len(runs)} runs are not finished")
    output.emit(str(results / TABLES))
    return 0


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def check_files(study: Study, path: Path) -> None:
    """Refuse a study whose base or data are local and not there, before anything is planned.

    Raises:
        FileNotFoundError: with the key to change, and the commands that make them.
    """
    recipe, own = named_inputs(study.recipe)
    changed = {"model": "model_name_or_path", "data": "dataset_name"}
    named = {
        key: getattr(study, key) or study.overrides.get(name) or own[name] for key, name in changed.items()
    }
    sets = {"data": named["data"]} | {f"eval_data.{n}": s.data for n, s in study.eval_data.items()}
    for one in study.eval_data.values():
        if one.text_before is not None:
            read_text_before(one.text_before)
    if study.search is not None:
        sets["search.data"] = study.search.data
    before = commands_before(path) or commands_before(recipe)
    if "model" not in study.overrides:  # a section that composes one
        check_inputs({"model": named["model"]}, {}, before)
    check_inputs({}, sets, before, "--set {}=FILE")


def checked_only(planner: Any, pattern: str | None) -> str | None:
    """``--only`` as it is matched: a whole name of a method or run takes no other.

    Raises:
        ValueError: it chooses nothing; the runs there are are named.
    """
    from ..evaluation.study.runner import narrowed

    runs = [*planner.candidates(), *planner.runs({})]
    names = [run.name for run in runs]
    if not any(matches(name, pattern) for name in names):
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise ValueError(
            f"--only {pattern!r} matches none of the {len(names)} runs{nearest(pattern or '', names)}: "
            f"{shown}."
        )
    return narrowed(pattern, runs)


def _list(planner: Any, args: argparse.Namespace) -> int:
    from ..evaluation.study.records import finished, has_checkpoint, trained
    from ..evaluation.study.runner import choose

    candidates = planner.candidates()
    chosen, _ = choose(candidates)
    known = planner.runs(chosen)
    rows = []
    for one in [*candidates, *known]:
        if not matches(one.name, args.only):
            continue
        training = one.readings[0].training
        if not one.searching and planner.study.search and training and not one.tried:
            state = "waits for the search"
        elif finished(one):
            state = "finished"
        elif training is not None and trained(training):
            state = "trained"
        elif training is not None and has_checkpoint(training):
            state = "begun"
        else:
            state = "to do"
        rows.append({"run": one.name, "state": state, "training": training.key if training else None})
    if args.json:
        output.emit_json(rows)
    else:
        output.emit(output.table([list(row.values()) for row in rows], ("run", "state", "training")))
    return 0
