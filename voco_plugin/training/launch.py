"""A launch that would not do what it was asked is refused before a model loads: fewer processes than started,
FSDP where it turns into DDP, ZeRO-3 whose checkpoints hold no weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun, accelerate and the MPI launchers say how many processes they started."""
PLAIN = ("NO", "MULTI_CPU")
"""accelerate's distributed types in which it drops FSDP (1.15)."""


class LaunchError(ValueError):
    """The processes that were asked for are not the processes that would train."""


def launched_processes(environment: Mapping[str, str]) -> int | None:
    """How many processes a launcher says it started; ``None`` where none did."""
    found = [environment.get(name, "") for name in WORLD_VARIABLES]
    return max((int(text) for text in found if text.isdigit()), default=None)


def check_launch(args: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Compare what ``args`` (``TrainingArguments``) made of the launch with what was launched.

    Raises:
        LaunchError: each process would train alone, or would hold the whole model although FSDP was asked
            for, or checkpoints would hold no weights; the message says the fix.
    """
    _check_processes(args.world_size, bool(args.use_cpu), environment)
    if _flag(environment, "ACCELERATE_USE_FSDP") or getattr(args, "fsdp", None):
        kind = str(getattr(args.distributed_state.distributed_type, "value", "NO"))
        if kind in PLAIN:
            raise LaunchError(
                f"FSDP was asked for, and accelerate would train without it here (distributed type {kind}), "
                "the whole model in each process: FSDP needs GPUs under torchrun or accelerate launch. On a "
                "CPU use DeepSpeed ZeRO-3 (accelerate_config: zero3) or ddp."
            )
    _check_zero3(getattr(args, "deepspeed_plugin", None))


def _check_processes(world: int, use_cpu: bool, environment: Mapping[str, str]) -> None:
    launched = launched_processes(environment)
    if launched is not None and launched != world:
        fix = "" if use_cpu else "; on a machine without GPUs give use_cpu=True (--use_cpu true)"
        raise LaunchError(
            f"{launched} processes were launched and the trainer sees {world}: each would train the whole "
            f"run alone and write the same files{fix}. Launch with torchrun, or accelerate launch "
            "with distributed_type MULTI_GPU, FSDP or DEEPSPEED."
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if launched is None and by_accelerate and world == 1:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one (it set MASTER_ADDR and no "
            "WORLD_SIZE): so it does with --cpu and with distributed_type NO or MULTI_CPU, without mpirun. "
            "Use torchrun --nproc_per_node N, or `voco train RECIPE --accelerate_config ddp --num_processes "
            "N --use_cpu true`. If one process is what you want, unset MASTER_ADDR."
        )


def _check_zero3(plugin: Any) -> None:
    config = getattr(plugin, "deepspeed_config", None) or {}
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise LaunchError(
            "ZeRO-3 without stage3_gather_16bit_weights_on_model_save saves checkpoints without weights: "
            'set it to true under "zero_optimization" (zero3_save_16bit_model: true in an accelerate config).'
        )


def check_sharded_head(model: Any, fsdp_version: int | None) -> None:
    """Refuse FSDP2 where the LM head trains: its gradient would be wrong, and the losses with it.

    accelerate 1.15 makes the head an FSDP unit of its own, and TRL 1.16 reads its weight without calling it,
    so that its gradient is not averaged over the processes (docs/decisions.md has the losses).

    Args:
        model: the transformers model, outside PEFT and other wrappers.
        fsdp_version: 1 or 2; ``None`` where FSDP is not in use.

    Raises:
        LaunchError: the head trains under FSDP2.
    """
    head = model.get_output_embeddings()
    own = next((p for n, p in head.named_parameters() if n == "weight"), None) if head is not None else None
    if fsdp_version == 2 and own is not None and own.requires_grad:
        raise LaunchError(
            "FSDP2 with a trainable LM head trains wrongly: TRL's fused loss does not average the head's "
            "gradient over the processes. Use DeepSpeed ZeRO-3 (accelerate_config: zero3) for full "
            "fine-tuning, or LoRA, which leaves the head frozen."
        )


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")
