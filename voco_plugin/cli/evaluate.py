"""``voco eval``: exact-match accuracy on a visual question answering set, per question type."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import output
from .inputs import add_bad_sample_option, add_model_options, load_model, positive

K_MODES = ("voco", "lower", "single")
"""Modes that read VoCo tokens, and so take a K."""

MODES = {
    "voco": "compress each image once, ask every question from the cache",
    "single": "the masked single pass over image and question (equals voco, slower)",
    "base": "the model with VoCo taken off, on all vision tokens: the upper bound of a plain VLM",
    "lower": "a plain VLM, or one trained with voco.rule causal, read through the mask: the lower bound",
    "blind": "the plain model with no image",
}


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
        "  voco eval runs/upper --data runs/gridworld/train.json --rows=-500: --mode single\n",
    )
    add_model_options(parser)
    parser.add_argument("--data", required=True, metavar="SET", help="LLaVA JSON, datasets folder or hub id")
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
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N images only")
    parser.add_argument(
        "--rows",
        type=rows,
        metavar="A:B",
        help="these rows only, as Python slices (the last 500: --rows=-500:)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=16, help="length of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="prompts at a time (default: %(default)s)"
    )
    add_bad_sample_option(parser, "its questions are not asked")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON here, with every answer")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


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


def run(args: argparse.Namespace) -> int:
    modes = list(dict.fromkeys(args.mode or ["voco"]))
    check_counts(args, modes)
    check_lower(args.model, modes)
    from ..data.loaders import load_vision_dataset
    from ..data.undecoded import undecoded

    skip = args.on_bad_sample == "skip"
    dataset = load_vision_dataset(args.data, args.split, args.image_folder, missing_images=skip)
    dataset = undecoded(dataset)
    if args.rows is not None:
        chosen = range(*args.rows.indices(len(dataset)))
        if not len(chosen):
            raise ValueError(
                f"--rows {args.rows.start}:{args.rows.stop}: {args.data} has {len(dataset)} rows."
            )
        dataset = dataset.select(chosen)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    model, processor = load_model(args, _voco_of(args, modes))
    skipped = bad_rows(dataset, processor) if skip else {}
    for problem in skipped.values():
        output.note(f"skipped: {problem}")
    if len(skipped) == len(dataset):
        raise ValueError(f"{args.data}: no row has images that can be used: {skipped[0]}")
    if skipped:
        dataset = dataset.select([row for row in range(len(dataset)) if row not in skipped])
    result = evaluate_modes(model, processor, dataset, modes, args, quiet=args.json)
    result["skipped_samples"] = len(skipped)
    result["skipped"] = list(skipped.values())
    if args.out:
        import json

        from ..benchmark.record import environment
        from ..files import atomic_write_text

        result["environment"] = environment(str(next(model.parameters()).device))
        atomic_write_text(args.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if args.json:
        result.pop("types")
        result.pop("rows")
        for entry in result["scores"].values():
            entry.pop("answers")
            entry.pop("correct")
        output.emit_json(result)
        return 0
    kinds = sorted({kind for entry in result["scores"].values() for kind in entry["by_type"]})
    kinds = [] if kinds == ["all"] else kinds
    several = args.first is not None or (args.num_tokens is not None and len(args.num_tokens) > 1)
    rows = [
        [
            entry["mode"],
            *([entry["num_tokens"] or "-"] if several else []),
            100 * entry["accuracy"],
            *(100 * entry["by_type"][kind] for kind in kinds),
        ]
        for entry in result["scores"].values()
    ]
    output.emit(output.table(rows, ("mode", *(["K"] if several else []), "all", *kinds)))
    if skipped:
        output.emit(f"{len(skipped)} rows skipped (--on-bad-sample skip): their questions are not counted")
    return 0


def bad_rows(dataset: Any, processor: Any) -> dict[int, str]:
    """Rows with an image that cannot be read, or that the image processor refuses: row → reason."""
    from ..images import BadImageError, find_refused
    from ..metrics import images_of

    found: dict[int, str] = {}
    for number, row in enumerate(dataset):
        try:
            images = images_of(row)
        except BadImageError as problem:
            found[number] = f"row {number}: {problem}"
            continue
        for which, reason in find_refused(getattr(processor, "image_processor", processor), images).items():
            found[number] = f"row {number}: image {which} cannot be used: {reason}."
    return found


def saved_config(source: str) -> Any:
    """The ``VoCoConfig`` of a local checkpoint of this package; ``None`` where there is none."""
    from ..config import CONFIG_NAME, VoCoConfig

    here = Path(source).is_dir() and (Path(source) / CONFIG_NAME).is_file()
    return VoCoConfig.load(source)[0] if here else None


def check_lower(source: str, modes: list[str]) -> None:
    """Refuse a lower bound of a model that was trained under the mask.

    Raises:
        ValueError: its rule isolates, or ``lower`` of a causal model is asked for together with another mode
            that reads VoCo tokens, which reads it causally.
    """
    saved = saved_config(source) if "lower" in modes else None
    if saved is None:
        return
    if saved.isolates:
        raise ValueError(
            f"{source} is trained with VoCo tokens under rule {saved.rule!r}; the lower bound is its base "
            "model's, or that of a model trained with voco.rule causal, read through the mask without "
            "training: give that model."
        )
    others = [mode for mode in modes if mode in K_MODES and mode != "lower"]
    if others:
        raise ValueError(
            f"{source} is read under rule 'causal' by --mode {others[0]} and under 'isolated' by --mode "
            "lower: run `voco eval` once for each."
        )


def _voco_of(args: argparse.Namespace, modes: list[str]) -> Any:
    """The config to load with: the checkpoint's, unless K is given (of several, the largest), or the lower
    bound of a model trained under the causal rule (paper, Sec. 4.2: its positions, and text isolated)."""
    saved = saved_config(args.model)
    lower = saved is not None and "lower" in modes
    if args.num_tokens is None and not lower:
        return None
    from ..config import VoCoConfig

    values = {} if saved is None else saved.to_dict()
    if args.num_tokens is not None:
        values["num_tokens"] = max(args.num_tokens)
    if lower:
        values["rule"] = "isolated"
    return VoCoConfig.from_dict(values)


def evaluate_modes(
    model: Any, processor: Any, dataset: Any, modes: list[str], args: argparse.Namespace, *, quiet: bool
) -> dict[str, Any]:
    """The scores of each mode, those that need VoCo attached first: ``base`` and ``blind`` take it off."""
    from ..metrics import evaluate, questions_of
    from ..modeling import detach, is_attached

    questions = questions_of(
        dataset.remove_columns("images") if "images" in dataset.column_names else dataset
    )
    if not questions:
        raise ValueError(f"{args.data} holds no question with an answer.")
    ways = {"voco": "cache", "lower": "cache", "single": "images", "base": "images", "blind": "blind"}
    scores: dict[str, Any] = {}
    for mode in sorted(modes, key=lambda m: m in ("base", "blind")):
        if mode in ("base", "blind") and is_attached(model):
            model = _plain(model, detach)
        takes_k = mode in K_MODES
        listed = (args.first or args.num_tokens) if takes_k else None
        caches = CutCaches(model, processor, dataset, questions, args)
        for k in listed or [None]:
            name = mode if k is None or len(listed or []) == 1 and args.first is None else f"{mode} K={k}"
            with output.progress(total=len(questions), unit="question", quiet=quiet) as bar:
                bar.set_description(name)
                if mode == "single" and k is not None:
                    set_num_tokens(model, k)
                found = evaluate(
                    model, processor, dataset, questions, mode=ways[mode],
                    caches=caches.of(k) if ways[mode] == "cache" and name != mode else None,
                    max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, tick=bar.update,
                )  # fmt: skip
            shown = k or (own_num_tokens(model) if takes_k else None)
            made = (caches.compressed_with or shown) if ways[mode] == "cache" else shown
            scores[name] = {
                "mode": mode, "num_tokens": shown, "compressed_with": made, **found.to_dict(),
                "answers": found.answers, "correct": "".join(str(int(hit)) for hit in found.correct),
            }  # fmt: skip
    order = sorted(scores, key=lambda name: modes.index(scores[name]["mode"]))
    return {
        "model": args.model, "data": args.data, "images": len(dataset), "questions": len(questions),
        "types": [question.type for question in questions], "rows": [question.row for question in questions],
        "scores": {name: scores[name] for name in order},
    }  # fmt: skip


class CutCaches:
    """The images of every row, compressed once into the largest K, and cut to the first k as asked.

    Attributes:
        compressed_with: that K, once images were compressed here.
    """

    def __init__(self, model: Any, processor: Any, dataset: Any, questions: Any, args: argparse.Namespace):
        self.parts = (model, processor, dataset, questions)
        self.args = args
        self.compressed_with: int | None = None
        self._made: dict[int, Any] = {}

    def of(self, k: int) -> dict[int, Any]:
        """Per row the cache with ``k`` VoCo tokens an image.

        ``--first`` cuts a compression into more. ``--num-tokens`` asks for one into ``k``, which is the same
        under causal attention (a VoCo token sees none after it); a backbone that reads its prompt both ways
        compresses again.
        """
        from ..metrics import compress_rows

        largest = max(self.args.num_tokens) if self.args.num_tokens else own_num_tokens(self.parts[0])
        if self.args.first is not None and k > largest:
            raise ValueError(f"--first {k}: this model compresses into {largest}; give --num-tokens {k}.")
        if not self._made:
            self._made = self._compressed(compress_rows, largest)
        both_ways = any(c.fingerprint.get("attention") == "prefix" for c in self._made.values())
        if both_ways and self.args.first is None and k != self.compressed_with:
            self._made = self._compressed(compress_rows, k)
        return {row: cache.first(k) for row, cache in self._made.items()}

    def _compressed(self, compress_rows: Any, num_tokens: int) -> dict[int, Any]:
        self.compressed_with = num_tokens
        return compress_rows(*self.parts, num_tokens=num_tokens, batch_size=self.args.batch_size)


def own_num_tokens(model: Any) -> int:
    """K of an attached model."""
    from ..modeling import attachment

    return attachment(model).config.num_tokens


def set_num_tokens(model: Any, num_tokens: int) -> None:
    """Let an attached model put ``num_tokens`` VoCo tokens after each image of a prompt."""
    import dataclasses

    from ..modeling import attachment

    state = attachment(model)
    state.config = dataclasses.replace(state.config, num_tokens=num_tokens)


def _plain(model: Any, detach: Any) -> Any:
    """The model without VoCo: an adapter comes off too, so that what is left is what it was trained from."""
    if hasattr(model, "unload"):
        model = model.unload()
    return detach(model)
