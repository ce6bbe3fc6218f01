"""The modes of ``voco eval``: what each loads, and its scores at each K."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from ..data.conversations import image_times
from . import output
from .eval_video import judged

K_MODES = ("voco", "lower", "single")
"""Modes that read VoCo tokens, and so take a K."""

MODES = {
    "voco": "compress each image once, ask every question from the cache",
    "single": "the masked single pass over image and question (equals voco, slower)",
    "base": "the model with VoCo taken off, on all vision tokens: the upper bound of a plain VLM",
    "lower": "a plain VLM, or one trained with voco.rule causal, read through the mask: the lower bound",
    "blind": "the plain model with no image",
}


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


def voco_of(source: str, num_tokens: list[int] | None, modes: list[str]) -> Any:
    """The config to load with: the checkpoint's, unless K is given (of several, the largest), or the lower
    bound of a model trained under the causal rule (paper, Sec. 4.2: its positions, and text isolated)."""
    saved = saved_config(source)
    lower = saved is not None and "lower" in modes
    if num_tokens is None and not lower:
        return None
    from ..config import VoCoConfig

    values = {} if saved is None else saved.to_dict()
    if num_tokens is not None:
        values["num_tokens"] = max(num_tokens)
    if lower:
        values["rule"] = "isolated"
    return VoCoConfig.from_dict(values)


def evaluate_modes(
    model: Any,
    processor: Any,
    dataset: Any,
    modes: list[str],
    args: argparse.Namespace,
    *,
    quiet: bool,
    judge: Any = None,
    plain_adapter: bool = False,
) -> dict[str, Any]:
    """The scores of each mode, those that need VoCo attached first: ``base`` and ``blind`` take it off.

    Args:
        plain_adapter: the model holds an adapter that was trained without VoCo (:func:`is_plain_adapter`).
        judge: a :class:`~voco_plugin.evaluation.judge.Judge` of the answers, in addition to the match.
    """
    from ..core.attachment import is_attached
    from ..evaluation.metrics import evaluate, questions_of
    from ..evaluation.text_before import read_text_before
    from ..models import detach

    opened = [name for name in ("images", "times") if name in dataset.column_names]
    questions = questions_of(dataset.remove_columns(opened) if opened else dataset, turns=args.turns)
    if not questions:
        raise ValueError(f"{args.data} holds no question with an answer.")
    is_video = getattr(dataset, "is_video", False)  # then only reading a video tells how many frames it gives
    lengths = [] if is_video else frame_counts(dataset)
    has_videos = is_video or max(lengths, default=0) > 1
    if args.frames != ["all"] and not has_videos:
        raise ValueError(f"--frames {','.join(args.frames)}: no row of {args.data} has more than one image.")
    ways = {"voco": "cache", "lower": "cache", "single": "images", "base": "images", "blind": "blind"}
    if "voco" in modes and is_attached(model) and reads_question(model):
        ways["voco"] = "images"  # such tokens are made anew for each question
    text_before = None if args.text_before is None else read_text_before(args.text_before)
    scores: dict[str, Any] = {}
    for mode in sorted(modes, key=lambda m: m in ("base", "blind")):
        if mode in ("base", "blind") and is_attached(model):
            model = plain_model(model, detach, keep_adapter=plain_adapter)
        takes_k = mode in K_MODES
        listed = (args.first or args.num_tokens) if takes_k else None
        caches = CutCaches(model, processor, dataset, questions, args)
        orders = ["all"] if mode == "blind" else args.frames
        for k, frames in itertools.product(listed or [None], orders):
            name = mode if k is None or len(listed or []) == 1 and args.first is None else f"{mode} K={k}"
            reuse = name != mode or len(orders) > 1
            name = name if frames == "all" else f"{name} frames={frames}"
            with output.progress(total=len(questions), unit="question", quiet=quiet) as bar:
                bar.set_description(name)
                if ways[mode] == "images" and k is not None:
                    set_num_tokens(model, k)
                found = evaluate(
                    model, processor, dataset, questions, mode=ways[mode],
                    caches=caches.of(k) if ways[mode] == "cache" and reuse else None,
                    max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, tick=bar.update,
                    frames=frames, seed=args.shuffle_seed, match=getattr(dataset, "match", None),
                    text_before=text_before,
                )  # fmt: skip
            shown = k or (own_num_tokens(model) if takes_k else None)
            made = (caches.compressed_with or shown) if ways[mode] == "cache" else shown
            scores[name] = {
                "mode": mode, "num_tokens": shown, "compressed_with": made, **found.to_dict(),
                **({"frames": frames} if has_videos else {}),
                "answers": found.answers, "correct": "".join(str(int(hit)) for hit in found.correct),
            }  # fmt: skip
            if judge is not None:
                scores[name]["judge"] = judged(judge, questions, found.answers, name, quiet)
    if len(set(lengths)) > 1:
        for entry in scores.values():
            entry["by_frames"] = accuracy_by(entry["correct"], [lengths[q.row] for q in questions])
    asked: dict[str, Any] = {} if text_before is None else {"text_before": text_before}
    if args.turns:
        asked["turns"] = [question.turn for question in questions]
        for entry in scores.values():
            entry["by_turn"] = accuracy_by(entry["correct"], asked["turns"])
    order = sorted(scores, key=lambda name: modes.index(scores[name]["mode"]))
    return {
        "model": args.model, "data": args.data, "images": len(dataset), "questions": len(questions),
        "types": [question.type for question in questions], "rows": [question.row for question in questions],
        **asked,
        "scores": {name: scores[name] for name in order},
    }  # fmt: skip


def frame_counts(dataset: Any) -> list[int]:
    """Per row its number of images, as its messages have them; nothing is opened."""
    rows = dataset.select_columns("messages") if hasattr(dataset, "select_columns") else dataset
    if "messages" not in (getattr(rows, "column_names", None) or ["messages"]):
        return []
    return [len(image_times(row["messages"])) for row in rows]


def accuracy_by(correct: str, numbers: list[int]) -> dict[int, float]:
    """Accuracy over the questions of each number: of their video's frames, or their turn."""
    hits: dict[int, list[int]] = {}
    for hit, number in zip(correct, numbers, strict=True):
        hits.setdefault(number, []).append(int(hit))
    return {number: sum(found) / len(found) for number, found in sorted(hits.items())}


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

    def of(self, k: int | None) -> dict[int, Any]:
        """Per row the cache with ``k`` VoCo tokens an image; ``None``: the model's K.

        ``--first`` cuts a compression into more. ``--num-tokens`` asks for one into ``k``, which is the same
        under causal attention (a VoCo token sees none after it); a backbone that reads its prompt both ways
        compresses again, and so does a model whose tokens are made for their whole number.
        """
        from ..evaluation.metrics import compress_rows

        largest = max(self.args.num_tokens) if self.args.num_tokens else own_num_tokens(self.parts[0])
        k = largest if k is None else k
        if self.args.first is not None and k > largest:
            raise ValueError(f"--first {k}: this model compresses into {largest}; give --num-tokens {k}.")
        if not self._made:
            self._made = self._compressed(compress_rows, largest)
        again = any(not is_nested(c.fingerprint) for c in self._made.values())
        if self.args.first is None and k == self.compressed_with:
            return self._made
        if again and self.args.first is None:
            if k != self.compressed_with:
                self._made = self._compressed(compress_rows, k)
            return self._made
        return {row: cache.first(k) for row, cache in self._made.items()}

    def _compressed(self, compress_rows: Any, num_tokens: int) -> dict[int, Any]:
        self.compressed_with = num_tokens
        return compress_rows(*self.parts, num_tokens=num_tokens, batch_size=self.args.batch_size)


def reads_question(model: Any) -> bool:
    """Whether the model's compressor looks at the question before it compresses (LLaMA-VID's)."""
    from ..core.attachment import attachment

    embeddings = attachment(model).embeddings
    return embeddings is not None and embeddings.compressor.reads_question


def is_nested(fingerprint: dict[str, Any]) -> bool:
    """Whether the first k of K VoCo tokens are what a compression into k gives."""
    from ..cache.fingerprint import check_nested

    try:
        check_nested(fingerprint)
    except ValueError:
        return False
    return fingerprint.get("attention") != "prefix"


def own_num_tokens(model: Any) -> int:
    """K of an attached model."""
    from ..core.attachment import attachment

    return attachment(model).config.num_tokens


def set_num_tokens(model: Any, num_tokens: int) -> None:
    """Let an attached model put ``num_tokens`` VoCo tokens after each image of a prompt."""
    import dataclasses

    from ..core.attachment import attachment

    state = attachment(model)
    state.config = dataclasses.replace(state.config, num_tokens=num_tokens)


def _wrapped_modules(model: Any) -> list[tuple[Any, str, Any]]:
    """The modules that an adapter has trained copies of (a projector): what holds each, its name there, and
    the module as it was.
    """
    from ..cache.adapters import WHOLE_MODULES

    return [
        (place, name, child.original_module)
        for place in model.get_base_model().modules()
        for name, child in place.named_children()
        if hasattr(child, WHOLE_MODULES)
    ]


def is_plain_adapter(source: str) -> bool:
    """Whether ``source`` is an adapter that was trained without VoCo (``voco: null``): it makes its base the
    plain VLM that is asked about, where one with VoCo is what is compared with that.
    """
    from ..config import CONFIG_NAME
    from ..models.loading import find_file
    from ..models.model_paths import ADAPTER

    return find_file(source, ADAPTER) is not None and find_file(source, CONFIG_NAME) is None


def plain_model(model: Any, detach: Any, *, keep_adapter: bool = False) -> Any:
    """The model without VoCo: an adapter comes off too, so that what is left is what it was trained from.

    Args:
        keep_adapter: it was trained without VoCo, and is part of the plain model.

    Raises:
        ValueError: the adapter has changed the weights under it.
    """
    from ..core.peft_layers import what_changed_the_base

    if keep_adapter and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    elif hasattr(model, "unload"):
        changed = what_changed_the_base(model.peft_config)
        if changed is not None:
            raise ValueError(
                f"modes base and blind take the adapter off, and {changed} has changed the weights under it, "
                "so what is left is not the base model; evaluate the base model itself by its path."
            )
        originals = _wrapped_modules(model)
        model = model.unload()
        for place, name, original in originals:  # PEFT leaves the trained copies in their place
            setattr(place, name, original)
    return detach(model)
