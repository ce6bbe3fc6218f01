"""Packs a trained adapter as the package ships it: int8, compressed (`voco demo` unpacks it).

    python benchmarks/pack_demo.py gridworld runs/gridworld_demo
    python benchmarks/pack_demo.py pictures runs/pictures_demo --tower runs/pictures_tower \\
        --base runs/pictures_aligned

Written into the checkout: voco_plugin/gridworld/demos/NAME/voco, of `pictures` also parts/ (the tower and
the projector that the base is composed of). `provenance.json` beside them is written by hand: what was
measured of the unpacked model, and how it was made.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from voco_plugin.gridworld.shipped_demos import ASSETS
from voco_plugin.gridworld.shipped_weights import pack_weights_int8

LEFT_OUT = {"README.md", "train_results.json", "trainer_state.json", "training_args.bin"}
LARGE = 100_000


def pack(source: Path, target: Path, weights: str) -> None:
    """The files of a checkpoint folder, `weights` packed."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name == weights or file.name in LEFT_OUT:
            continue
        if file.stat().st_size > LARGE:  # a tokenizer's vocabulary
            (target / f"{file.name}.xz").write_bytes(lzma.compress(file.read_bytes(), preset=9))
        else:
            shutil.copyfile(file, target / file.name)
    pack_weights_int8(source / weights, target / f"{weights}.xz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("gridworld", "pictures"))
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--base", type=Path, help="the aligned model, for its projector")
    args = parser.parse_args()
    folder = ASSETS / args.name
    pack(args.adapter, folder / "voco", "adapter_model.safetensors")
    adapter, voco = folder / "voco" / "adapter_config.json", folder / "voco" / "voco_config.json"
    for file, key, value in (
        (adapter, "base_model_name_or_path", "base"),
        (voco, "base_relative_to_adapter", "../base"),
    ):
        facts = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**facts, key: value}, indent=2) + "\n", encoding="utf-8")
    if args.name == "pictures":
        pack(args.tower, folder / "parts", "model.safetensors")
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "projector.safetensors"
            mark = "multi_modal_projector."
            whole = load_file(args.base / "model.safetensors")
            save_file({k.split(mark)[1]: v.contiguous() for k, v in whole.items() if mark in k}, file)
            pack_weights_int8(file, folder / "parts" / f"{file.name}.xz")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size:,} bytes")


if __name__ == "__main__":
    main()
