"""``voco study``: a grid of runs, resumed where it stopped, then tables and plots."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from typing import Any

from . import output
from .evaluate import positive
from .recipe import summary
from .study_file import count_rows, load_study, resolve, shipped


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
        "--only", metavar="PATTERN", help="runs whose name has this, or matches it (`voco-k*-s0`)"
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
    from ..study.keys import fingerprint
    from ..study.plan import Planner

    planner = Planner(study, Path(args.work), resolve, fingerprint, count_rows)
    if args.tables_only:
        raise NotImplementedError
    if args.list:
        return _list(planner, args)
    if args.print_commands:
        from .study_commands import print_commands

        return print_commands(planner, args)
    return _run(planner, results, args)


def _run(planner: Any, results: Path, args: argparse.Namespace) -> int:
    from ..study.children import Children
    from ..study.runner import Runner

    check_inputs(planner)
    gpus = [part.strip() for part in (args.gpus or "").split(",") if part.strip()]
    jobs = args.jobs or len(gpus) or 1
    runner = Runner(
        planner, results, Children(args.threads), jobs=jobs, gpus=gpus, tell=output.note, only=args.only
    )
    with _terminated_as_interrupted():
        runner.run()
    for failure in runner.failures:
        output.error("voco study", f"{', '.join(failure.runs)}: {failure.stderr[-300:]}")
    return 1 if runner.failures else 0


def check_inputs(planner: Any) -> None:
    """Refuse a study whose base or data are not there, before anything starts.

    Raises:
        FileNotFoundError: with the key to change.
    """
    from .train import check_model_path

    if planner.model is not None:
        check_model_path(str(planner.model))
    sets = {"data": planner.data} | {f"eval_data.{n}": s.data for n, s in planner.study.eval_data.items()}
    if planner.study.search is not None and planner.study.search.data is not None:
        sets["search.data"] = planner.study.search.data
    for name, source in sets.items():
        if source and source.endswith((".json", ".jsonl")) and not Path(source).expanduser().is_file():
            raise FileNotFoundError(f"{name} {source} does not exist; write it, or give --set {name}=FILE.")


class _terminated_as_interrupted:
    """SIGTERM ends the children too, as Ctrl-C does."""

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._stop)

    def __exit__(self, *problem: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def _stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt


def _list(planner: Any, args: argparse.Namespace) -> int:
    from ..study.records import finished, has_checkpoint, trained
    from ..study.runner import choose, matches

    candidates = planner.candidates()
    chosen, _ = choose(candidates)
    known = [run for run in planner.runs(chosen)]
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
