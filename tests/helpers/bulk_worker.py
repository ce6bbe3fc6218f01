"""A process of tests/store/test_bulk_processes.py and tests/store/test_ray.py that counts what it computes.

    python tests/helpers/bulk_worker.py LOG SECONDS ARGUMENTS…

Runs ``voco ARGUMENTS``; each image that goes through the model adds a line to LOG.PID before it does, and
takes SECONDS longer. Only ``model.compress`` is wrapped.
"""

from __future__ import annotations

import os
import sys
import time

from voco_plugin.inference.mixin import VoCoGenerationMixin


def count(log: str, seconds: float) -> None:
    """Wrap ``compress`` of every model of this process."""
    plain = VoCoGenerationMixin.compress

    def compress(self, *args, **inputs):
        rows = len(inputs["input_ids"])
        with open(f"{log}.{os.getpid()}", "a") as stream:
            stream.write("x\n" * rows)
            stream.flush()
            os.fsync(stream.fileno())
        time.sleep(seconds * rows)
        return plain(self, *args, **inputs)

    VoCoGenerationMixin.compress = compress


if __name__ == "__main__":
    count(sys.argv[1], float(sys.argv[2]))
    from voco_plugin.cli import main

    sys.exit(main(sys.argv[3:]))
