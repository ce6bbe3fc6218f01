"""``voco inspect``: the layout and mask of a sequence, as text and PNG."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..config import BLOCK_CONTEXTS, POSITIONS, RULES, VoCoConfig
from ..models.model_paths import check_model_path, named
from . import output
from .inputs import find_images, open_image, positive
from .preconditions import check_target

_KINDS = {"t": "text", "v": "vision", "c": "VoCo", "p": "padding"}


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "inspect",
        parents=[common],
        help="draw the layout and the mask of a sequence",
        description="Draw what sees what. With --layout no model is needed: a letter and a count per run, "
        "t text,\n"
        "v vision, c VoCo, p padding. With MODEL (its processor and config are read, not its weights), "
        "--text and\n"
        "--image: the sequence that model would get.",
        epilog="examples:\n  voco inspect --layout 't3 v4 c2 t5' --out mask.png\n"
        "  voco inspect runs/gridworld_voco --text 'What is at b2?' --image a.png --out mask.png\n",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="path or hub id of a model, for --text and --image"
    )
    parser.add_argument("--layout", metavar="RUNS", help="e.g. 't3 v4 c2 t5'")
    parser.add_argument("--text", help="the question, in the model's chat template")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="an image before the text; may be repeated"
    )
    parser.add_argument("--num-tokens", type=positive, metavar="K", help="VoCo tokens after each image")
    parser.add_argument("--rule", choices=RULES)
    parser.add_argument(
        "--block-context", choices=BLOCK_CONTEXTS, help="what a block sees of what stands before it"
    )
    parser.add_argument("--positions", choices=POSITIONS)
    parser.add_argument("--hide-prefix", action="store_true", help="the official code's mask")
    parser.add_argument("--out", metavar="PNG", help="also draw it here")
    parser.add_argument("--json", action="store_true", help="print the layout as JSON")


def run(args: argparse.Namespace) -> int:
    if (args.layout is None) == (args.model is None):
        raise ValueError("give either --layout RUNS, or a MODEL with --text and --image.")
    check_target(args.out, "--out")
    if args.layout is not None:
        if args.text or args.image or args.num_tokens:
            raise ValueError(
                "--text, --image and --num-tokens need a MODEL; --layout says everything itself."
            )
        config, layout, positions = _from_runs(args)
    else:
        config, layout, positions = _from_model(args)

    from ..evaluation.reporting.mask import caption, draw_mask_png, mask_text

    if args.out:
        draw_mask_png(config, layout, args.out)
    if args.json:
        output.emit_json(_facts(config, layout, positions) | {"picture": args.out})
        return 0
    output.emit(caption(config))
    for line in _lines(layout, positions):
        output.emit(line)
    output.emit()
    output.emit(mask_text(config, layout))
    if args.out:
        output.emit(f"\n{args.out}")
    return 0


def parse_runs(text: str) -> list[tuple[str, int]]:
    """``"t3 v4 c2"`` → ``[("t", 3), ("v", 4), ("c", 2)]``.

    Raises:
        ValueError: something is not a run; it is named.
    """
    runs = []
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"([tvcpTVCP])(\d+)", word)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"--layout: {word!r} is no run; write a letter (t, v, c, p) and a count, as in 't3 v4 c2 t5'."
            )
        runs.append((match[1].lower(), int(match[2])))
    if not runs:
        raise ValueError("--layout is empty; write runs, as in 't3 v4 c2 t5'.")
    return runs


def _config(args: argparse.Namespace, **base: Any) -> VoCoConfig:
    given = {"rule": args.rule, "block_context": args.block_context, "positions": args.positions}
    given = {k: v for k, v in given.items() if v is not None}
    if given and "positions" not in given:
        base.pop("positions", None)  # the rule decides again
    more = {"hide_prefix": True} if args.hide_prefix else {}
    return VoCoConfig.from_dict({**base, **given, **more})


def _from_runs(args: argparse.Namespace) -> tuple[VoCoConfig, Any, Any]:
    import torch

    from ..core.layout import SequenceLayout, TokenVocabulary, compact_positions, sequential_positions

    runs = parse_runs(args.layout)
    ids_of = {"t": 0, "v": 1, "c": 2, "p": 0}
    ids = torch.tensor([[ids_of[kind] for kind, count in runs for _ in range(count)]])
    mask = torch.tensor([[int(kind != "p") for kind, count in runs for _ in range(count)]])
    layout = SequenceLayout.from_ids(ids, mask, TokenVocabulary(2, frozenset({1})))
    config = _config(args)
    positions = sequential_positions(mask)
    return (
        config,
        layout,
        compact_positions(layout, positions) if config.positions == "compact" else positions,
    )


def _from_model(args: argparse.Namespace) -> tuple[VoCoConfig, Any, Any]:
    if args.text is None:
        raise ValueError("give --text: what is asked (and --image FILE, once per image).")
    check_model_path(args.model)
    paths = find_images(args.image or [])
    images = [open_image(path) for path in paths]

    from pathlib import Path

    from transformers import AutoConfig, AutoProcessor

    from ..config import CONFIG_NAME
    from ..core.injection import insert_voco_tokens
    from ..core.layout import SequenceLayout, compact_positions, sequential_positions
    from ..inference.prompts import ask, encode
    from ..models.families import vocabulary_for
    from ..models.token_rows import add_token

    saved: dict[str, Any] = {}
    if Path(args.model).is_dir() and (Path(args.model) / CONFIG_NAME).is_file():
        saved = VoCoConfig.load(args.model)[0].to_dict()
    config = _config(args, **saved)
    with named(args.model):
        processor = AutoProcessor.from_pretrained(args.model)
    model_config = None
    if not (Path(args.model) / "adapter_config.json").is_file():
        model_config = AutoConfig.from_pretrained(args.model)
    config.token_id, _ = add_token(processor, config)
    vocab = vocabulary_for(processor=processor, config=model_config, voco=config)
    inputs = encode(processor, [ask(args.text, len(images))], [images] if images else None)
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = insert_voco_tokens(
        inputs,
        vocab,
        args.num_tokens or config.num_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        padding_side="left",
    )
    layout = SequenceLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], vocab)
    positions = sequential_positions(inputs["attention_mask"])
    return (
        config,
        layout,
        compact_positions(layout, positions) if config.positions == "compact" else positions,
    )


def _segments(layout: Any, positions: Any) -> list[dict[str, Any]]:
    """Each run of tokens of one kind and block: where it is, and the positions of its ends."""
    kind, block, position = layout.kind[0].tolist(), layout.block[0].tolist(), positions[0].tolist()
    names = {1: "text", 2: "vision", 3: "VoCo", 0: "padding"}
    found, start = [], 0
    for i in range(1, len(kind) + 1):
        if i == len(kind) or (kind[i], block[i]) != (kind[start], block[start]):
            found.append(
                {
                    "kind": names[kind[start]],
                    "block": block[start] if block[start] >= 0 else None,
                    "start": start,
                    "stop": i,
                    "tokens": i - start,
                    "positions": [position[start], position[i - 1]],
                }
            )
            start = i
    return found


def _lines(layout: Any, positions: Any) -> list[str]:
    rows = [
        [
            s["kind"],
            s["block"],
            s["tokens"],
            f"{s['start']}…{s['stop'] - 1}",
            f"{s['positions'][0]}…{s['positions'][1]}",
        ]
        for s in _segments(layout, positions)
    ]
    return output.table(rows, ("run", "block", "tokens", "index", "position (1-D)")).splitlines()


def _facts(config: VoCoConfig, layout: Any, positions: Any) -> dict[str, Any]:
    stream = int(layout.in_stream.sum())
    return {
        "voco": config.to_dict(),
        "tokens": layout.num_tokens,
        "stream_tokens": stream,
        "blocks": len(layout.spans),
        "runs": _segments(layout, positions),
    }
