"""TRL is an extra: what to install, where training is asked for and TRL is missing or too old."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

MINIMUM = "1.16"
EXTRA = "pip install 'voco_plugin[train]'"
NEED_IT = frozenset({"VoCoDataCollator", "VoCoSFTConfig", "VoCoSFTTrainer"})
"""Public names whose modules import TRL."""


def check_trl(what: str = "training") -> None:
    """
    Raises:
        ImportError: TRL is not installed, or older than what the trainer stands on.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"{what} needs TRL, which is not installed: {EXTRA}.") from None
    if Version(found) < Version(MINIMUM):
        raise ImportError(f"{what} needs TRL {MINIMUM} or later, and {found} is installed: {EXTRA}.")
