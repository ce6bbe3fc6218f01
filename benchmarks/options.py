"""What becomes of every option of generation, training and the rule, written as docs/options.md.

    python benchmarks/options.py --out docs/options.md

The names come from the installed transformers, TRL and this package; what is said of each is in options.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
TABLE = Path(__file__).with_name("options.yaml")
STATUSES = ("honoured", "refused", "upstream", "nothing", "unchanged")
OUR_ARGUMENTS = ("voco_cache", "prefix_cache", "two_stage")
HEAD = """# Options

What becomes of each option where a prompt has images. Written by

    python benchmarks/options.py --out docs/options.md

- **honoured**: it does what transformers or TRL says of it. In generation: the tokens of two stages are those
  of one pass (`pytest -m "" tests/inference/test_generation_options.py` runs each on a tiny model).
- **refused**: an error in one line, before anything runs.
- **upstream**: transformers or TRL refuse it themselves, with and without images.
- **nothing**: it says nothing here, and nothing is lost; the reason says why.
- **unchanged**: transformers' own, and nothing of this package comes near.

A prompt without images, and a model without `voco`, are transformers' and TRL's own.
"""


def table() -> dict[str, Any]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def names() -> dict[str, list[str]]:
    """The fields of the installed packages, by section of the table."""
    from transformers import GenerationConfig, GenerationMixin

    from voco_plugin import VoCoConfig, VoCoSFTConfig

    arguments = list(inspect.signature(GenerationMixin.generate).parameters)
    return {
        "generation": [name for name in vars(GenerationConfig()) if not name.startswith("_")],
        "arguments": [name for name in arguments if name not in ("self", "kwargs")],
        "training": [field.name for field in dataclasses.fields(VoCoSFTConfig)],
        "voco": [field.name for field in dataclasses.fields(VoCoConfig)],
    }


def training_rows(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Field → status, reason and the version it came with."""
    rows: dict[str, dict[str, Any]] = {}
    for group in groups:
        fields = group["fields"]
        for name in fields:
            if name in rows:
                raise ValueError(f"{TABLE.name}: {name} is listed twice")
            said = fields[name] if isinstance(fields, dict) else group["reason"]
            row = said if isinstance(said, dict) else {"reason": said}
            rows[name] = {"since": None, **row, "status": group["status"]}
    return rows


def page(said: dict[str, Any]) -> str:
    lines = [HEAD, "## Generation", "", "### Settings (`GenerationConfig`)", ""]
    head = ["| option | one pass | two stages | |", "|---|---|---|---|"]
    lines += [*head, *(_row(name, cells) for name, cells in said["generation"].items())]
    lines += ["", "### Arguments of `generate`", "", *head]
    lines += [_row(name, cells) for name, cells in said["arguments"].items()]
    lines += ["", "Of this package: `voco_cache`, `prefix_cache`, `two_stage` (the docstring of `generate`)."]
    lines += ["", "## Training (`VoCoSFTConfig`)", ""]
    for group in said["training"]:
        if not isinstance(group["fields"], dict):
            listed = ", ".join(f"`{name}`" for name in group["fields"])
            lines += [f"**{group['status']}**: {group['reason']}: {listed}.", ""]
            continue
        title = "Of this package" if group.get("own") else group["status"].capitalize()
        lines += [f"### {title}", "", "| option | |", "|---|---|"]
        for name, row in training_rows([group]).items():
            since = f" (transformers {row['since']} and newer)" if row["since"] else ""
            lines.append(f"| `{name}` | {row['reason']}{since} |")
        lines.append("")
    lines += ["Arguments of the trainer: `formatting_func` is refused for rows with images."]
    lines += ["", "## The rule (`VoCoConfig`)", ""]
    lines += ["| option | one pass | two stages | training | |", "|---|---|---|---|---|"]
    lines += [_row(name, cells) for name, cells in said["voco"].items()]
    return "\n".join(lines) + "\n"


def _row(name: str, cells: list[str]) -> str:
    shown = name if " " in name else f"`{name}`"
    return "| " + " | ".join([shown, *(" ".join(str(cell).split()) for cell in cells)]) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the page goes; standard output without it")
    args = parser.parse_args(arguments)
    said = table()
    for section, found in names().items():
        known = training_rows(said[section]) if section == "training" else said[section]
        for name in found:
            if name not in known:
                newer = ", ".join(f"{one} {version(one)}" for one in ("transformers", "trl"))
                raise SystemExit(f"{TABLE.name} does not know {name} ({section}; {newer}): say what it does.")
    if args.out:
        args.out.write_text(page(said), encoding="utf-8")
    else:
        print(page(said), end="")


if __name__ == "__main__":
    main()
