"""How the weights behind `voco pictures-demo` were made: a trained adapter, small enough to ship.

    python benchmarks/ship_pictures.py shrink runs/smollm2_pictures_base runs/demo_start --rank 8
    voco train smollm2_pictures_voco --model_name_or_path runs/demo_start --use_peft false …
    voco eval runs/demo_adapter --data runs/pictures/test_drawings.json … --out runs/demo_adapter.json
    python benchmarks/ship_pictures.py pack runs/demo_adapter --tower runs/pictures_tower \\
        --scores runs/demo_adapter.json --blind 0.25 --command "…"

`shrink` writes an adapter of a lower rank, the nearest of that rank (singular values), layer by layer; PEFT's
`convert_to_lora` does the same, and takes no adapter that holds a token's row. `pack` rounds weights to
bfloat16 and compresses them (`shipped_weights`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from voco_plugin.cli.output import emit, human_bytes
from voco_plugin.files import atomic_write_text
from voco_plugin.gridworld.pictures.shipped_reader import ASSETS
from voco_plugin.gridworld.shipped_weights import pack_weights

WEIGHTS = "adapter_model.safetensors"
LIMIT = 12 * 2**20
"""Bytes of all weights that are shipped."""


def shrink(source: Path, target: Path, rank: int) -> None:
    """The LoRA of ``source`` at a lower rank; what it saved whole (projector, token row) as it is.

    Raises:
        ValueError: it is no plain LoRA of one rank.
    """
    config = json.loads((source / "adapter_config.json").read_text())
    odd = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config["peft_type"] != "LORA" or odd:
        raise ValueError(f"{source} is no plain LoRA of one rank ({', '.join(odd) or config['peft_type']})")
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(source / WEIGHTS)
    for name in [key for key in weights if ".lora_A." in key]:
        other = name.replace(".lora_A.", ".lora_B.")
        weights[name], weights[other] = _nearest(weights[name], weights[other] * scale, rank)
    target.mkdir(parents=True)
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    config |= {"r": rank, "lora_alpha": rank}
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "processor", "chat_template", "voco_config")):
            shutil.copy(path, target)


def _nearest(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(r, in)``, ``(out, r)`` → ``(rank, in)``, ``(out, rank)``: the product nearest to ``b @ a``."""
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    root = s[:rank].sqrt()
    small_b, small_a = left @ u[:, :rank] * root, root[:, None] * (vh[:rank] @ right.T)
    return small_a.to(a.dtype).contiguous(), small_b.to(b.dtype).contiguous()


def pack(
    adapter: Path, tower: Path, scores: Path, mode: str, record: dict[str, Any], assets: Path = ASSETS
) -> None:
    """The files that ship, into ``assets``."""
    assets.mkdir(parents=True, exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unpack_reader writes it"
    (assets / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    rule = json.loads((adapter / "voco_config.json").read_text())
    rule["base_relative_to_adapter"] = "../base"  # where `unpack_reader` puts it
    (assets / "voco_config.json").write_text(json.dumps(rule, indent=2) + "\n")
    shutil.copy(tower / "config.json", assets / "tower.json")
    pack_weights(adapter / WEIGHTS, assets / f"{WEIGHTS}.xz")
    pack_weights(tower / "model.safetensors", assets / "tower.safetensors.xz")
    names = (f"{WEIGHTS}.xz", "tower.safetensors.xz", "adapter_config.json", "voco_config.json", "tower.json")
    hashes = {name: hashlib.sha256((assets / name).read_bytes()).hexdigest() for name in names}
    size = sum((assets / name).stat().st_size for name in names)
    if size > LIMIT:
        raise SystemExit(f"{human_bytes(size)} is more than {human_bytes(LIMIT)}: shrink to a lower rank.")
    measured = json.loads(scores.read_text())
    score = measured["scores"][mode]
    test = {
        "pictures": record.pop("pictures"), "questions": measured["questions"],
        "accuracy": 100 * score["accuracy"], "blind": 100 * record.pop("blind"),
    }  # fmt: skip
    whole = {"sha256": hashes, "bytes": size, "test": test, **record}
    atomic_write_text(assets / "record.json", json.dumps(whole, indent=2) + "\n")
    emit(f"{human_bytes(size)} in {len(names)} files")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("shrink")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("--rank", type=int, default=8)
    two = steps.add_parser("pack")
    two.add_argument("adapter", type=Path)
    two.add_argument("--tower", type=Path, required=True)
    two.add_argument("--scores", type=Path, required=True, help="`voco eval … --out`")
    two.add_argument("--mode", default="voco")
    two.add_argument("--blind", type=float, required=True, help="of the set's meta.json")
    two.add_argument("--pictures", type=int, default=300, help="of the set (default: %(default)s)")
    two.add_argument("--command", action="append", required=True, help="how it was trained; several")
    args = parser.parse_args()
    if args.step == "shrink":
        shrink(args.source, args.target, args.rank)
    else:
        record = {
            "blind": args.blind,
            "pictures": args.pictures,
            "compose": {"projector": "mlp2x_gelu", "seed": 0},
            "trained": args.command,
        }
        pack(args.adapter, args.tower, args.scores, args.mode, record)


if __name__ == "__main__":
    main()
