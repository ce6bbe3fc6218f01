"""What `import voco_plugin` costs beyond Python, torch and transformers (seconds, median of fresh processes).

    python benchmarks/import_time.py [--repeats 7]

The promise: `import voco_plugin` stays under 0.5 s beyond torch + transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

_VLM = "from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration"
WAYS = {
    "python": "pass",
    "import voco_plugin": "import voco_plugin",
    "import torch, transformers": "import torch, transformers",
    "import torch, transformers, voco_plugin": "import torch, transformers, voco_plugin",
    "import torch, and a VLM's classes from transformers": f"import torch; {_VLM}",
    "the same, and attach, load, VoCoCache": (
        f"import torch; {_VLM}; import voco_plugin as vp; vp.attach, vp.load, vp.VoCoCache"
    ),
    "voco --help": "from voco_plugin.cli import build_parser; build_parser().format_help()",
}
_TIMED = "import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """Seconds that ``code`` takes in a fresh process, the interpreter's own start left out."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMED.format(code=code)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.repeats + 1):
        for name, code in WAYS.items():
            found = seconds(code)
            if turn:  # the first turn fills the file cache
                times[name].append(found)
    medians = {name: statistics.median(values) for name, values in times.items()}
    beyond = medians["import torch, transformers, voco_plugin"] - medians["import torch, transformers"]
    names = ("the same, and attach, load, VoCoCache", "import torch, and a VLM's classes from transformers")
    inference = medians[names[0]] - medians[names[1]]
    if args.json:
        print(
            json.dumps({"seconds": medians, "import_beyond": beyond, "inference_beyond": inference}, indent=2)
        )
        return
    for name, value in medians.items():
        print(f"{value:7.3f} s  {name}")
    print(f"{beyond:7.3f} s  import voco_plugin beyond torch + transformers")
    print(f"{inference:7.3f} s  all that inference needs, beyond torch + transformers with a VLM's classes")


if __name__ == "__main__":
    main()
