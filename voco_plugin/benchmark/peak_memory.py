"""The most memory that was held: of a CUDA device as torch counts it, else of this process (Linux)."""

from __future__ import annotations

from pathlib import Path


def _status(field: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak(device: str) -> int:
    """Start the high-water mark anew; the bytes that are held now."""
    if not device.startswith("cpu"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return _status("VmRSS")


def peak(device: str) -> int:
    """The most bytes held since :func:`reset_peak`."""
    if not device.startswith("cpu"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")
