"""Messages of the package in the words of the command line: ``image_folder`` is ``--image-folder`` there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping


def as_flags(text: str, parser: argparse.ArgumentParser, keywords: Mapping[str, str] | None = None) -> str:
    """``text`` with the Python names of a command's options as what is typed: ``overwrite=True`` →
    ``--overwrite``, ``num_train=0`` → ``--num-train 0``. A word alone is changed where only an option is
    called so (it has an underscore), and nothing inside quotes, paths and dotted names.

    Args:
        keywords: further Python names → flags.
    """
    flags = dict(keywords or {})
    for action in parser._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        if long and action.dest not in ("help", "debug", "json"):
            flags.setdefault(action.dest, long[0])
    for name, flag in flags.items():
        start = rf"(?<![\w./'\"`-]){re.escape(name)}"
        text = re.sub(rf"{start}=True\b", flag, text)
        text = re.sub(rf"{start}=(?=\S)", f"{flag} ", text)
        if "_" in name:
            text = re.sub(rf"{start}: (?=\S)", f"{flag} ", text)
            text = re.sub(rf"{start}(?![\w/=-]|\.\w)", flag, text)
    return text
