"""How an LLM that was never trained on images reads vision tokens that are words.

    python benchmarks/picture_words.py runs/pictures_aligned --data runs/pictures

The model is one that `voco pictures-align` wrote. Its vision tokens are replaced by exact targets of an
alignment: what would the best projector bring? Asked is what is at a place, the answer begun with its
article. Told is how often the first token is that of a name which the scene shows.

    name      the name's embedding, a line break's where nothing is (what `voco pictures-align` fits)
    nothing   the name's, that of " nothing" elsewhere
    mean      the name's, the mean of all embeddings elsewhere
    sum       as `nothing`, and the embedding of the token's place added
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from voco_plugin.cli.output import emit
from voco_plugin.gridworld.pictures.picture_align import _tokens_of, _Words
from voco_plugin.gridworld.pictures.picture_scenes import GRID, PLACES
from voco_plugin.gridworld.pictures.vocabulary import article

TARGETS = ("name", "nothing", "mean", "sum")
SIZES = ((1, 2), (3, 5), (6, 9))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="what `voco pictures` wrote")
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--side", type=int, default=8, help="vision tokens a side (default: %(default)s)")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    scenes = json.loads((args.data / "scenes.json").read_text())
    words = _Words(model, processor, json.loads((args.data / "meta.json").read_text())["names"])
    rows = model.get_input_embeddings().weight.detach().float()
    tokenizer = processor.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def first(name: str) -> tuple[str, int]:
        """The article, and the first token of the name behind it."""
        before = article(name)[: -len(name)].strip()
        return before, ids(f" {name}" if before else name)[0]

    def cell(token: int) -> int:
        row, column = (int((at + 0.5) * GRID / args.side) for at in divmod(token, args.side))
        return row * GRID + column

    cells = [cell(token) for token in range(args.side**2)]
    places = torch.stack([rows[ids(f" {place}")].mean(0) for place in PLACES])[cells]
    empty = {"name": words.empty, "nothing": rows[ids(" nothing")].mean(0), "mean": rows.mean(0)}
    empty["sum"] = empty["nothing"]
    names = torch.tensor(sorted({first(name)[1] for name in words.number}))
    asked = []
    for row in json.loads((args.data / "train.json").read_text()):
        for turn, kind in enumerate(row["types"]):
            if kind == "place" and len(asked) < args.questions:
                question = row["conversations"][2 * turn]["value"].removeprefix("<image>\n")
                place = re.sub("^(at|in) the ", "", question[len("What is ") : -1])
                name = scenes[row["id"]]["places"][place]["name"]
                if first(name)[0]:
                    asked.append((row["id"], question, name))
                break
    start = ids("<|im_start|>user\n")
    for target in TARGETS:
        found: dict[tuple[int, int], list[tuple[bool, bool]]] = {size: [] for size in SIZES}
        for key, question, name in asked:
            shown = torch.tensor(_tokens_of(scenes[key], args.side, words))
            vision = torch.where(shown[:, None] >= 0, words.table[shown.clamp_min(0)], empty[target])
            vision = vision + places if target == "sum" else vision
            rest = ids(f"\n{question}<|im_end|>\n<|im_start|>assistant\n{first(name)[0]}")
            embeds = torch.cat([rows[start], vision, rows[rest]])[None]
            with torch.no_grad():
                logits = model.lm_head(model.model.language_model(inputs_embeds=embeds)[0][0, -1])[names]
            best = int(names[logits.argmax()])
            there = {first(thing["name"])[1] for thing in scenes[key]["places"].values()}
            (size,) = [size for size in SIZES if size[0] <= len(scenes[key]["places"]) <= size[1]]
            found[size].append((best == first(name)[1], best in there))
        told = []
        for (low, high), got in found.items():
            right, there = (100 * sum(column) / max(len(got), 1) for column in zip(*got, strict=True))
            told.append(f"{low}-{high} things: right {right:.0f} %, one of them {there:.0f} % of {len(got)}")
        emit(f"{target:8} {'; '.join(told)}")


if __name__ == "__main__":
    main()
