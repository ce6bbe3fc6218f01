"""LoRA adapters trained one after another on one model, as one adapter of a lower rank.

    python benchmarks/smaller_adapter.py BASE OUT --adapter runs/first --adapter runs/second --rank 16

The second was trained on the first's merged weights, so the sum of both is what they make of BASE. PEFT's own
`add_weighted_adapter(combination_type="svd")` keeps the largest singular values of that sum; how much of its
norm they hold is printed. What is written is an ordinary adapter folder with BASE as its base.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor


def kept_share(model: PeftModel, names: list[str], small: str) -> float:
    """The share of the squared norm of the summed updates that the small adapter holds."""
    whole = kept = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and small in module.lora_A:
            total = sum(module.get_delta_weight(name).float() for name in names)
            whole += float(total.square().sum())
            kept += float(module.get_delta_weight(small).float().square().sum())
    return kept / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--adapter", action="append", required=True, metavar="DIR", help="in order")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; give a new folder")
    names = [f"adapter_{number}" for number in range(len(args.adapter))]
    base = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter[0], adapter_name=names[0])
    for name, folder in zip(names[1:], args.adapter[1:], strict=True):
        model.load_adapter(folder, name)
    model.add_weighted_adapter(names, [1.0] * len(names), "small", combination_type="svd", svd_rank=args.rank)
    print(
        f"rank {args.rank} keeps {100 * kept_share(model, names, 'small'):.1f} % of the updates' squared norm"
    )
    model.save_pretrained(args.out, selected_adapters=["small"])
    for file in (args.out / "small").iterdir():  # PEFT writes a named adapter into a folder of its own
        shutil.move(file, args.out / file.name)
    (args.out / "small").rmdir()
    AutoProcessor.from_pretrained(args.adapter[-1]).save_pretrained(args.out)


if __name__ == "__main__":
    main()
