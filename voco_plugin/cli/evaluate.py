"""``voco eval``: exact-match accuracy on a visual question answering set, per question type."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.text_before import read_text_before
from ..models.model_paths import ADAPTER
from . import eval_suite, eval_video, output
from .eval_modes import MODES, check_lower, evaluate_modes, is_plain_adapter, voco_of
from .inputs import add_bad_sample_option, add_model_options, load_model, positive
from .preconditions import check_target


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "eval",
        parents=[common],
        help="accuracy of a model on a data set",
        description="Ask every question of a visual question answering set alone, and compare with the "
        "exact answer.\n" + "\n".join(f"  {name:7} {text}" for name, text in MODES.items()),
        epilog="examples:\n  voco eval runs/gridworld_voco --data runs/gridworld/test.json\n"
        "  voco eval runs/gridworld_base --data runs/gridworld/test.json --mode base --mode lower --json\n"
        "  voco eval runs/gridworld_k4 --data runs/gridworld/test.json --num-tokens 1,2,4\n"
        "  voco eval runs/gridworld_k4 --data runs/gridworld/test.json --num-tokens 4 --first 1,2,4\n"
        "  voco eval runs/gridworld_voco --data runs/gridworld/test.json --steps 100,200,500 --limit 100\n"
        "  voco eval runs/video --data runs/videos/test.json --image-folder runs/videos/images "
        "--frames all,single,shuffled\n"
        "  voco eval runs/video --data MSVD-QA/test_qa.json --video-qa msvd --videos MSVD-QA/videos "
        "--judge http://localhost:8000/v1 --judge-model judge\n"
        "  voco eval runs/gridworld_voco --data runs/gridworld/test.json --turns --mode voco --mode base\n"
        "  voco eval runs/upper --data runs/gridworld/train.json --rows=-500: --mode single\n"
        "  voco eval paper-image runs/voco --data-root data/ --upper runs/up --lower runs/up --limit 100\n"
        "  voco eval gridworld runs/gridworld_voco --data-root runs/gridworld --mode voco --mode base\n",
    )
    add_model_options(parser)
    parser.add_argument(
        "--data",
        metavar="SET",
        help="LLaVA JSON, datasets folder, hub id or package:easy_vqa",
    )
    parser.add_argument("--split", help="its split")
    parser.add_argument("--image-folder", help="where the image names of a LLaVA file start")
    parser.add_argument(
        "--mode", action="append", choices=tuple(MODES), help="default: voco; may be repeated"
    )
    parser.add_argument(
        "--num-tokens",
        type=counts,
        metavar="K[,K…]",
        help="VoCo tokens an image (default: the model's); several give one row each",
    )
    parser.add_argument(
        "--first",
        type=counts,
        metavar="K[,K…]",
        help="compress into --num-tokens, read the first K of each image only: one row each",
    )
    parser.add_argument(
        "--turns",
        action="store_true",
        help="ask each question after the turns before it, with their reference answers; accuracy by turn",
    )
    parser.add_argument(
        "--text-before",
        metavar="TEXT|FILE",
        help="text that stands before the image in the message: what text in front costs",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N images only")
    parser.add_argument(
        "--rows",
        type=rows,
        metavar="A:B",
        help="these rows only, as Python slices (the last 500: --rows=-500:)",
    )
    parser.add_argument(
        "--steps",
        type=counts,
        metavar="N[,N…]",
        help="the checkpoints that MODEL, a training's output folder, holds of these steps: one row each",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        help="length of an answer (default: 16; of a suite, what each task says, else 1024)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="prompts at a time (default: %(default)s)"
    )
    add_bad_sample_option(parser, "its questions are not asked")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="also write the JSON here, with every answer; of a suite the folder of its table, answers and "
        "data links, where a run that ended early goes on (default: eval_SUITE)",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    eval_video.add_options(parser)
    eval_suite.add_options(parser)


def counts(text: str) -> list[int]:
    """``1,2,4`` as a list of whole numbers of at least 1, for argparse; a repeated one counts once."""
    return list(dict.fromkeys(positive(part.strip()) for part in text.split(",")))


def rows(text: str) -> slice:
    """``A:B`` as a slice, for argparse; either may be left out."""
    parts = text.split(":")
    try:
        if len(parts) == 2:
            return slice(*(int(part) if part.strip() else None for part in parts))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no range of rows; write A:B, :B or A:")


def check_counts(args: argparse.Namespace, modes: list[str]) -> None:
    """Refuse ``--first`` where it means nothing.

    Raises:
        ValueError: several ``--num-tokens`` with it, or a mode that reads no cache.
    """
    if args.first is None:
        return
    if args.num_tokens is not None and len(args.num_tokens) > 1:
        raise ValueError("--first cuts what one --num-tokens K compressed; give one K, or leave --first out.")
    if args.num_tokens is not None and max(args.first) > args.num_tokens[0]:
        raise ValueError(
            f"--first {max(args.first)} is more than --num-tokens {args.num_tokens[0]}; compress into more."
        )
    if "single" in modes:
        raise ValueError("--first reads a cache, and --mode single has none; leave one of the two out.")


def checkpoints(args: argparse.Namespace) -> dict[int | None, str]:
    """Optimizer step → folder to read; ``None`` for the model itself, without ``--steps``.

    Raises:
        FileNotFoundError: there is no checkpoint of a step; those that are there are named.
    """
    if args.steps is None:
        return {None: args.model}
    folders = {step: Path(args.model) / f"checkpoint-{step}" for step in args.steps}
    for step, folder in folders.items():
        if not folder.is_dir():
            found = sorted(
                int(f.name[11:]) for f in Path(args.model).glob("checkpoint-*") if f.name[11:].isdigit()
            )
            there = f"it has {', '.join(map(str, found))}" if found else "it has none"
            raise FileNotFoundError(
                f"{args.model} has no checkpoint of step {step}; {there} (save_at_steps)."
            )
    return {step: str(folder) for step, folder in folders.items()}


def load_rows(args: argparse.Namespace) -> Any:
    """The rows asked for, their images not decoded yet."""
    from ..data.lazy_images import undecoded
    from ..data.loaders import load_vision_dataset

    skip = args.on_bad_sample == "skip"
    if args.video_qa is not None:
        dataset = eval_video.load_videos(args, skip)
    else:
        dataset = load_vision_dataset(args.data, args.split, args.image_folder, missing_images=skip)
        dataset = undecoded(dataset)
    if args.rows is not None:
        chosen = range(*args.rows.indices(len(dataset)))
        if not len(chosen):
            raise ValueError(f"--rows leaves none of the {len(dataset)} rows of {args.data}; give others.")
        dataset = dataset.select(chosen)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    return dataset


def run(args: argparse.Namespace) -> int:
    if eval_suite.is_suite(args):
        return eval_suite.run(args)
    eval_suite.check_no_suite(args)
    args.max_new_tokens = args.max_new_tokens or 16
    modes = list(dict.fromkeys(args.mode or ["voco"]))
    check_counts(args, modes)
    check_target(args.out, "--out")
    eval_video.check(args)
    if args.text_before is not None:
        read_text_before(args.text_before)  # before a model is loaded
    judge = eval_video.judge_of(args)
    folders = checkpoints(args)
    for folder in folders.values():
        check_lower(folder, modes)
    dataset = load_rows(args)
    skipped: dict[int, str] = {}
    result: dict[str, Any] = {}
    for step, folder in folders.items():
        model, processor = load_model(args, voco_of(folder, args.num_tokens, modes), folder)
        if args.on_bad_sample == "skip" and not result:
            skipped = bad_rows(dataset, processor)
            dataset = without(dataset, skipped, args.data)
        found = evaluate_modes(
            model, processor, dataset, modes, args, quiet=args.json, judge=judge,
            plain_adapter=is_plain_adapter(folder),
        )  # fmt: skip
        if step is not None:
            found["scores"] = {f"{k} at {step}": {**v, "step": step} for k, v in found["scores"].items()}
        result = {**found, "scores": {**result.get("scores", {}), **found["scores"]}}
    hint = base_hint(result["scores"], args.model)
    if hint:
        output.note(hint)
    result["skipped_samples"] = len(skipped)
    result["skipped"] = list(skipped.values())
    if hasattr(dataset, "match_rule"):
        result["match"] = dataset.match_rule
    if args.out:
        import json

        from ..benchmark.result_file import environment
        from ..files import atomic_write_text

        result["environment"] = environment(str(next(model.parameters()).device))
        atomic_write_text(args.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if args.json:
        for entry in (result, *result["scores"].values()):
            for key in ("types", "rows", "answers", "correct"):
                entry.pop(key, None)
            entry.get("judge", {}).pop("verdicts", None)
        output.emit_json(result)
        return 0
    output.emit(_table(result, args))
    scores = result["scores"]
    numbered = (eval_video.numbers_table(scores, by) for by in ("frames", "turn"))
    for more in (*numbered, eval_video.judge_table(scores)):
        if more:
            output.emit(f"\n{more}")
    if skipped:
        output.emit(f"{len(skipped)} rows skipped (--on-bad-sample skip): their questions are not counted")
    return 0


def base_hint(scores: dict[str, Any], model: str) -> str | None:
    """What to say of an upper bound of 0: the base of an adapter may never have learnt to answer."""
    silent = any(entry["mode"] == "base" and entry["accuracy"] == 0 for entry in scores.values())
    if not silent:
        return None
    adapter = (Path(model) / ADAPTER).is_file()
    what = "the model that this adapter was trained on, without it," if adapter else "the model without VoCo"
    return (
        f"base: {what} answers no question right: it may not have been trained for this data (a composed "
        "model's projector starts from random weights), and is then no upper bound. That is a model trained "
        "on the same data with --voco.rule causal, read with --mode single."
    )


def _table(result: dict[str, Any], args: argparse.Namespace) -> str:
    kinds = sorted({kind for entry in result["scores"].values() for kind in entry["by_type"]})
    kinds = [] if kinds == ["all"] else kinds
    several = args.first is not None or (args.num_tokens is not None and len(args.num_tokens) > 1)
    lines = [
        [
            entry["mode"],
            *([entry["step"]] if args.steps else []),
            *([entry["num_tokens"] or "-"] if several else []),
            *([entry["frames"] if entry["mode"] != "blind" else "-"] if args.frames != ["all"] else []),
            100 * entry["accuracy"],
            *(100 * entry["by_type"][kind] for kind in kinds),
        ]
        for entry in result["scores"].values()
    ]
    header = ("mode", *(["step"] if args.steps else []), *(["K"] if several else []))
    header += (*(["frames"] if args.frames != ["all"] else []), "all", *kinds)
    return output.table(lines, header)


def without(dataset: Any, skipped: dict[int, str], name: str) -> Any:
    """``dataset`` without the rows in ``skipped``, which are named on stderr.

    Raises:
        ValueError: none is left.
    """
    for problem in skipped.values():
        output.note(f"skipped: {problem}")
    if len(skipped) == len(dataset):
        raise ValueError(f"{name}: no row has images that can be used: {skipped[0]}")
    return dataset.select([row for row in range(len(dataset)) if row not in skipped]) if skipped else dataset


def bad_rows(dataset: Any, processor: Any) -> dict[int, str]:
    """Rows with an image that cannot be read, or that the image processor refuses: row → reason."""
    from ..data.images import BadImageError, find_refused
    from ..evaluation.metrics import images_of

    found: dict[int, str] = {}
    for number in range(len(dataset)):
        try:
            images = images_of(dataset[number])
        except BadImageError as problem:
            found[number] = f"row {number}: {problem}"
            continue
        for which, reason in find_refused(getattr(processor, "image_processor", processor), images).items():
            found[number] = f"row {number}: image {which} cannot be used: {reason}."
    return found
