"""Every tiny family measured against the contracts, written as docs/backbones.md.

    python benchmarks/backbones.py --out docs/backbones.md [--only llava_llama gemma3]

Random models of the real transformers classes (tests/helpers/tiny), rows with no, one and two images, both
padding sides.
Nothing is typed in by hand: a cell is what this run measured.
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402

PACKAGES = ("torch", "transformers", "peft")
HEAD = """# Backbones

Any pure-attention `AutoModelForImageTextToText` can be attached; a family has an adapter of its own only
where it differs from the rest. This page is written by

    {command}

on tiny random models of the real classes (no weights are downloaded), {versions}, {machine}. A batch has rows
with no, one and two images, text between them, padding on either side. Figures are the largest absolute
difference of text logits, whose standard deviation is about 1.6.

- **single pass**: layers whose attention mask, in the masked single pass, equals loops over the rule's table
  and the backbone's own mask, of all layers.
- **two-stage fp32, fp64**: compress and answer, against the single masked pass. Where fp64 is not below
  1e-9, the backbone itself computes a part in fp32 (its norms, its router, its eager softmax).
- **batched**: a row in a batch, against the row alone.
- **moved**: blocks reused at other positions, in another order, against a fresh pass.
- **LoRA**: two-stage fp32 under random LoRA weights on every linear layer of the decoder.
- **checkpointing**: gradients with and without gradient checkpointing, as a share of the largest.
- **window**: the sliding window or chunk that these figures were measured under, shorter than an image.

| family | class | single pass | two-stage fp32 | fp64 | batched | moved | LoRA | checkpointing | window |
|---|---|---|---|---|---|---|---|---|---|
"""
REFUSED = """
## Refused

By what a model is, not by its name. Each line is the error of `attach` on the family's config.

| family | error |
|---|---|
"""


def number(value: float | None) -> str:
    """A figure of the table; a dash where the measure does not apply."""
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def row(name: str) -> str:
    """Everything measured of one family."""
    from harness import shared
    from measure import (
        batched,
        checkpointed,
        layers_as_the_table,
        lora_two_stage,
        relocated,
        two_stage,
        window_of,
    )  # fmt: skip

    attn = "sdpa"
    same, layers = layers_as_the_table(name)
    cells = [
        name,
        f"`{type(shared(name)).__name__}`",
        f"{same}/{layers}",
        number(two_stage(shared(name, torch.float32, attn), name)),
        number(two_stage(shared(name, torch.float64, attn), name, torch.float64)),
        number(batched(name)),
        number(relocated(name)),
        number(lora_two_stage(name)[0]),
        number(checkpointed(name)),
        window_of(name),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page; printed only where it is not given")
    parser.add_argument("--only", nargs="+", help="these families only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    from refused import refusals
    from tiny import NAMES

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    page = HEAD.format(
        command="python benchmarks/backbones.py --out docs/backbones.md",
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        machine=f"on a CPU ({platform.machine()})",
    )
    for name in args.only or NAMES:
        line = row(name)
        print(line, flush=True)
        page += line + "\n"
    page += REFUSED
    for name, error in refusals().items():
        page += f"| {name} | {error} |\n"
    if args.out:
        before = args.out.read_text(encoding="utf-8") if args.out.is_file() else ""
        real = before.find("\n## Real weights\n")  # benchmarks/real_weights.py writes that section
        args.out.write_text(page + (before[real:] if real >= 0 else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
