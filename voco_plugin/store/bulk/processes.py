"""The processes that share a job: who this one is, and one report from all of them.

``torchrun`` and ``accelerate launch`` say so in the environment (RANK, LOCAL_RANK, WORLD_SIZE).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among ``world``.

    Attributes:
        rank: number of this process, from 0.
        world: how many share the job.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> Processes:
        """As the launcher says; one process where there was none.

        Raises:
            ValueError: a launcher was asked for several processes and started one, which would do the whole
                job.
        """
        if "WORLD_SIZE" in environment and "RANK" in environment:
            local = environment.get("LOCAL_RANK", environment["RANK"])
            return Processes(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(local))
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
            raise ValueError(
                "accelerate launch was asked for several processes and started one (so it does with --cpu): "
                "use torchrun --nproc_per_node N -m voco_plugin compress …, or --workers N."
            )
        return Processes()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Meet the other processes; one that cannot start is then found at once, not at the end."""
        import torch.distributed as dist

        if self.world > 1 and not dist.is_initialized():
            # gloo on a GPU, too: only reports travel. One share may take days longer than another
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def gather(self, report: Any) -> list[Any] | None:
        """Every process's report, in order, in the first; ``None`` in the others."""
        if self.world == 1:
            return [report]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world if self.first else None
        try:
            dist.gather_object(report, found)
        except RuntimeError:
            raise ValueError(
                f"another process of this job ended early; what process {self.rank} made is written. Start "
                "the command again to go on."
            ) from None
        return found

    def leave(self) -> None:
        """The end of the group that :meth:`join` made."""
        import torch.distributed as dist

        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
