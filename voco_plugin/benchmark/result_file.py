"""What a result records besides its figures: machine, versions, settings, command. No paths."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..files import atomic_write_text

FORMAT_VERSION = 1
PACKAGES = ("voco_plugin", "torch", "transformers", "peft")
TRAINING_PACKAGES = (*PACKAGES, "trl", "accelerate", "datasets")
DTYPES = ("float32", "bfloat16", "float16")


def check_device(device: str) -> None:
    """Raises ``ValueError`` where torch has no such device."""
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device!r} is not known; use cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here; use --device cpu.")


def device_name(device: str) -> str:
    """The name of the GPU or of the processor."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def record(
    name: str, figures: Mapping[str, Any], *, command: str, device: str, dtype: str, **settings: Any
) -> dict[str, Any]:
    """The whole result of one benchmark, as JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        "benchmark": name,
        "command": command,
        "dtype": dtype,
        **environment(device),
        "settings": settings,
        **figures,
    }


def environment(device: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine and versions, as JSON values."""
    import torch

    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        module = sys.modules.get(package)
        return str(getattr(module, "__version__", "unknown"))


def write(result: Mapping[str, Any], path: str | os.PathLike) -> None:
    """The result as a JSON file, whole or not there."""
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
