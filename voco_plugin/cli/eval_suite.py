"""``voco eval SUITE MODEL``: published benchmarks through lmms-eval, and the table that papers print."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import nearest
from ..evaluation.suites import SUITES, Benchmark
from ..files import atomic_write_text
from ..models.model_paths import check_model_path
from . import eval_video, output
from .accelerate_launch import load_integration
from .eval_modes import K_MODES, check_lower, saved_config

_ONLY_SETS = (
    "data", "split", "image_folder", "first", "turns", "text_before", "rows", "steps", "video_qa", "videos",
    "answers", "mapping",
)  # fmt: skip
"""Options of ``voco eval MODEL --data SET`` that a suite has no use for."""


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("suites (docs/evaluation.md): voco eval SUITE MODEL --data-root DIR")
    group.add_argument("suite_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    group.add_argument("--data-root", metavar="DIR", help="the data sets, as their repositories have them")
    group.add_argument("--only", metavar="NAME[,NAME…]", help="these benchmarks of the suite alone")
    group.add_argument(
        "--upper", metavar="MODEL", help="the upper bound: a model trained with voco.rule causal, or a VLM"
    )
    group.add_argument("--lower", metavar="MODEL", help="the lower bound: that model, read through the mask")
    group.add_argument("--store", metavar="DIR", help="keep the compressed images of MODEL, over runs")
    group.add_argument(
        "--prepare", action="store_true", help="lay the data out for lmms-eval's own command, and stop"
    )


def is_suite(args: argparse.Namespace) -> bool:
    """Whether the command names a suite, and not a model of that name.

    Raises:
        ValueError: a suite without a model, or two models.
    """
    if args.suite_model is not None:
        if args.model not in SUITES:
            raise ValueError(
                f"{args.model!r} is no suite{nearest(args.model, SUITES)}: {', '.join(SUITES)}; or give one "
                "MODEL and --data SET."
            )
        return True
    if args.data is not None:
        return False
    if args.model in SUITES:
        raise ValueError(
            f"voco eval {args.model} needs a model: voco eval {args.model} MODEL --data-root DIR (a model in "
            f"a folder of that name: ./{args.model})."
        )
    raise ValueError(
        f"give a data set for {args.model}: --data SET; or a suite before the model: {', '.join(SUITES)}."
    )


def check_no_suite(args: argparse.Namespace) -> None:
    """Refuse a suite's options beside ``--data``."""
    for name in ("data_root", "only", "upper", "lower", "store", "prepare"):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} goes with a suite ({', '.join(SUITES)}), not with --data; leave "
                "one of the two out."
            )


def run(args: argparse.Namespace) -> int:
    suite, chosen = args.model, _chosen(args)
    _check(args)
    bridge = load_integration("lmms_eval.harness")
    harness = "" if args.prepare else bridge.check_installed()
    rows = _rows(args)
    work, out = _folders(args)
    from ..evaluation.suite_data import prepare

    prepare(chosen, args.data_root, work)
    if args.prepare:
        tasks = ",".join(one.task for one in chosen)
        source = _absolute(args.suite_model)
        source = f'"{source}"' if "," in source else source
        command = [
            "python", "-m", "lmms_eval", "--model", "voco", "--model_args", f"pretrained={source}", "--tasks",
            tasks, "--include_path", bridge.TASKS, "--batch_size", str(args.batch_size), "--output_path",
            str(out / "lmms_eval"), "--log_samples",
        ]  # fmt: skip
        output.emit(f"cd {shlex.quote(str(work))} && HF_HUB_OFFLINE=1 {shlex.join(command)}")
        return 0
    judge = eval_video.judge_of(args)
    runs: dict[str, dict[str, Any]] = {}
    tokens: dict[str, int | None] = {}
    started = time.perf_counter()
    for name, source, mode in rows:
        runs[name], tokens[name] = _run_row(args, chosen, name, source, mode, work, out, harness)
    if judge is not None:
        for name, found in runs.items():
            for one in found:
                found[one]["judge"] = _judged(judge, found[one]["samples"], f"{name}, {one}", args.json)
    report = _report(args, suite, chosen, runs, tokens, out, harness, time.perf_counter() - started)
    if args.json:
        output.emit_json(report)
    else:
        output.emit((out / "table.md").read_text(encoding="utf-8"))
        output.note(f"written: {out}/table.md, table.json{', table.png' if report['plot'] else ''}")
    return 0


def _chosen(args: argparse.Namespace) -> list[Benchmark]:
    listed = SUITES[args.model]
    if args.only is None:
        return list(listed)
    by_name = {one.name.lower(): one for one in listed} | {one.task: one for one in listed}
    found: list[Benchmark] = []
    for name in args.only.split(","):
        one = by_name.get(name.strip().lower(), by_name.get(name.strip()))
        if one is None:
            names = [one.name for one in listed]
            raise ValueError(
                f"--only {name.strip()!r} is not in {args.model}{nearest(name.strip().lower(), by_name)}: "
                f"{', '.join(names)}."
            )
        found.append(one)
    return [one for one in listed if one in found]


def _check(args: argparse.Namespace) -> None:
    """Refuse what a suite has no use for, before data or models are looked at."""
    for name in _ONLY_SETS:
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} goes with --data SET, not with a suite; leave it out."
            )
    if args.frames != ["all"]:
        raise ValueError("--frames goes with --data SET, not with a suite; leave it out.")
    if args.on_bad_sample != "raise":
        raise ValueError("a suite asks every question: --on-bad-sample skip would change its figures.")
    if args.num_tokens is not None and len(args.num_tokens) > 1:
        raise ValueError("a suite takes one --num-tokens K; run it once for each, with an --out of its own.")
    if args.data_root is None:
        raise ValueError(f"voco eval {args.model} needs --data-root DIR, where its data sets are.")
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME go together; give both.")
    if args.judge is not None and args.model != "paper-video":
        raise ValueError(f"--judge goes with paper-video, whose answers are open; {args.model} is matched.")
    for model in (args.suite_model, args.upper, args.lower):
        if model is not None:
            check_model_path(model)


def _rows(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """``(name, model, mode)`` of each row, upper bound first, lower bound last.

    Raises:
        ValueError: two upper or two lower bounds.
    """
    modes = list(dict.fromkeys(args.mode or ["voco"]))
    check_lower(args.suite_model, modes)
    rows = [(mode, args.suite_model, mode) for mode in modes]
    for which, given in (("base", args.upper), ("lower", args.lower)):
        if given is None:
            continue
        if which in modes:
            flag = "--upper" if which == "base" else "--lower"
            raise ValueError(f"--mode {which} and {flag} {given} are two bounds of one kind; give one.")
        saved = saved_config(given)
        if which == "base" and saved is not None and saved.isolates:
            raise ValueError(
                f"--upper {given} is trained under rule {saved.rule!r}; the upper bound is a plain VLM, or "
                "a model trained with voco.rule causal."
            )
        check_lower(given, ["lower"] if which == "lower" else [])
        mode = which if which == "lower" or saved is None else "single"
        rows.append(("upper" if which == "base" else "lower", given, mode))
    order = {"upper": 0, "base": 0, "lower": 2}
    return sorted(rows, key=lambda row: order.get(row[0], 1))


def _folders(args: argparse.Namespace) -> tuple[Path, Path]:
    out = Path(args.out or f"eval_{args.model}").expanduser().resolve()
    if out.is_file():
        raise ValueError(f"--out {args.out} is a file; a suite writes a folder.")
    work = out / "data"
    work.mkdir(parents=True, exist_ok=True)
    return work, out


def _run_row(
    args: argparse.Namespace,
    chosen: Sequence[Benchmark],
    name: str,
    source: str,
    mode: str,
    work: Path,
    out: Path,
    harness: str,
) -> tuple[dict[str, Any], int | None]:
    """What one model gives on each benchmark; what was finished before is read, not run."""
    loading = load_integration("lmms_eval.loading")
    given = load_integration("lmms_eval.arguments").ModelArgs(
        pretrained=_absolute(source), mode=mode, batch_size=args.batch_size,
        num_tokens=args.num_tokens[0] if args.num_tokens and mode in K_MODES else None,
        store=str(Path(args.store).expanduser().resolve()) if args.store and name in ("voco", "lower")
        and source == args.suite_model else None,
        answers=str(out / name / "answers.jsonl"), dtype=args.dtype, device=args.device,
        num_frames=args.num_frames, fps=args.fps, time_text=args.time_text,
        **({} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}),
    )  # fmt: skip
    for file in args.plugin or []:
        load_integration("lmms_eval.loading").load_plugin(file)
    output.status(f"{name}: loading {source}", quiet=args.json)
    reader = loading.load_reader(given)
    options = {"max_new_tokens": given.max_new_tokens, "num_frames": given.num_frames, "fps": given.fps,
               "time_text": given.time_text}  # fmt: skip
    found: dict[str, Any] = {}
    try:
        for one in chosen:
            limit = args.limit + args.limit % 2 if args.limit and one.pairs else args.limit
            facts = {
                "made_by": reader.fingerprint, "mode": mode, "num_tokens": reader.num_tokens, "limit": limit,
                "task": one.task, "harness": harness, "data": _data_facts(work, one), **options,
            }  # fmt: skip
            key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
            file = out / name / f"{one.task}.json"
            kept = _kept(file, key)
            if kept is None:
                began = (reader.asked, reader.compressed, time.perf_counter())
                with output.progress(total=None, unit="question", quiet=args.json) as bar:
                    bar.set_description(f"{name}, {one.name}")
                    kept = load_integration("lmms_eval.harness").run_task(
                        reader, one.task, one.metric, work, limit=limit, tick=bar.update, **options
                    )
                kept |= {
                    "key": key, "asked": reader.asked - began[0], "compressed": reader.compressed - began[1],
                    "seconds": time.perf_counter() - began[2],
                }  # fmt: skip
                atomic_write_text(file, json.dumps(kept, ensure_ascii=False, default=_plain) + "\n")
            else:
                output.note(f"{name}, {one.name}: taken from {file}")
            found[one.name] = kept
        return found, reader.tokens
    finally:
        reader.close()


def _plain(value: Any) -> Any:
    """numpy's numbers as numbers; anything else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else str(value)


def _absolute(source: str) -> str:
    """A local path as it is from everywhere: the harness runs in another folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _data_facts(work: Path, one: Benchmark) -> list[Any]:
    """What tells one state of a benchmark's files from another: names, sizes and times."""
    from ..evaluation.suite_data import set_file

    files = [f for want in one.wanted for f in sorted((work / want.repository).glob("*.parquet"))]
    files += [f for f in [set_file(work, one.task)] if f.is_file()]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns if f.is_symlink() else
             hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]  # fmt: skip


def _kept(file: Path, key: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return kept if kept.get("key") == key else None


def _judged(judge: Any, samples: Sequence[dict[str, Any]], name: str, quiet: bool) -> dict[str, Any]:
    from ..evaluation.metrics import Question

    asked = [Question(n, s["doc"]["question"], s["doc"]["answer"]) for n, s in enumerate(samples)]
    return eval_video.judged(judge, asked, [s["filtered_resps"][0] for s in samples], name, quiet)


def _report(
    args: argparse.Namespace,
    suite: str,
    chosen: Sequence[Benchmark],
    runs: dict[str, Any],
    tokens: dict[str, int | None],
    out: Path,
    harness: str,
    seconds: float,
) -> dict[str, Any]:
    """Write the table as Markdown, JSON and, where matplotlib is there, a picture."""
    from ..benchmark.result_file import environment
    from ..evaluation.published import ROWS
    from ..evaluation.suite_table import build_rows, markdown

    roles = {name: "upper" if name in ("upper", "base") else "lower" for name in runs
             if name in ("upper", "base", "lower")}  # fmt: skip
    rows = build_rows(chosen, runs, roles, tokens)
    notes = _notes(args, suite, rows, chosen)
    atomic_write_text(out / "table.md", markdown(suite, chosen, rows, notes))
    counts = {
        name: {one: {k: found[one].get(k) for k in ("asked", "compressed", "seconds")} for one in found}
        for name, found in runs.items()
    }
    report: dict[str, Any] = {
        "suite": suite, "model": args.suite_model, "lmms_eval": harness, "limit": args.limit,
        "rows": [dataclasses.asdict(row) for row in rows],
        "published": [dataclasses.asdict(row) for row in ROWS[suite]], "notes": notes, "runs": counts,
        "seconds": seconds, "environment": environment(args.device or "cpu"),
    }  # fmt: skip
    report["plot"] = _draw(suite, chosen, rows, out / "table.png")
    atomic_write_text(
        out / "table.json", json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
    )
    return report


def _notes(
    args: argparse.Namespace, suite: str, rows: Sequence[Any], chosen: Sequence[Benchmark]
) -> list[str]:
    notes = []
    if args.limit:
        notes.append(
            f"the first {args.limit} questions of each benchmark only (--limit): no published figure"
        )
    for row in rows:
        for one in chosen:
            cell = row.cells.get(one.name)
            own = cell.harness if cell is not None else None
            # OCRBench's own sum is kept over runs and divided by 1000 whatever the number of questions
            if own is not None and one.task != "ocrbench" and abs(own - cell.score) > 0.01:
                notes.append(
                    f"{row.name}, {one.name}: the harness itself says {own:.2f}, the count here "
                    f"{cell.score:.2f}: do not use this figure before it is known why"
                )
    if suite == "paper-video":
        notes.append(
            "answers are matched after VQA's normalisation; published figures come from a judge, and "
            "compare with --judge only"
        )
    if any(one.name == "MMB" for one in chosen):
        notes.append("MMB: the dev set, letters read from answers without a judge (mmbench_en_dev_static)")
    if any(one.name == "VQA-v2" for one in chosen):
        notes.append("VQA-v2: the validation set; published figures are of test-dev")
    return notes


def _draw(suite: str, chosen: Sequence[Benchmark], rows: Sequence[Any], path: Path) -> bool:
    """Bars of retention where there are bounds, else of scores; without matplotlib none, and a word."""
    from ..evaluation.published import ROWS
    from ..evaluation.suite_table import published_shares

    names = [one.name for one in chosen if any(one.name in row.cells for row in rows)]
    bounded = any(cell.retention is not None for row in rows for cell in row.cells.values())
    what = "retention" if bounded else "score"
    scales = {one.name: 1.0 if one.scale == 100 else 0.05 for one in chosen}  # MME's 2000 points as per cent
    series: dict[str, list[float]] = {}
    for row in rows:
        if bounded and row.role:
            continue
        values = [getattr(row.cells.get(name), what, None) for name in names]
        series[row.name] = [
            _finite(v, 1.0 if bounded else scales[n]) for v, n in zip(values, names, strict=True)
        ]
    for row in ROWS[suite]:
        if row.bound is not None or not set(row.scores) & set(names):
            continue
        shown = published_shares(ROWS[suite], row, "retention") if bounded else row.scores
        label = f"{row.name}, {row.tokens}"
        series[label] = [_finite(shown.get(n), 1.0 if bounded else scales[n]) for n in names]
    try:
        from ..evaluation.reporting.charts import draw_bars

        draw_bars(names, series, path, title=f"{suite}: {what}")
    except ImportError as problem:
        output.note(f"no picture of the table: {problem}")
        return False
    return True


def _finite(value: float | None, scale: float) -> float:
    return 0.0 if value is None else max(0.0, value * scale)
