"""``stage1: streamed``: a training forward in two stages (paper, Sec. 3.4), inside the student's own forward.

    batch ──> model(**batch, stages=…)          through DDP or DeepSpeed, as any forward
      └─ the student's forward: stage 1, chunk by chunk ──> TRL's fused loss, whose backbone reads the stream
         on the blocks; its hidden states are laid out as the stream on their way to the head

Only the fused forward is cut in two: one that gives logits of a whole batch is one pass, as ever.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..cache.recomputed import recomputing
from ..cache.streamed import Stream, stream_of
from ..config import VoCoConfig
from ..modeling import attachment, unwrap

if TYPE_CHECKING:
    from trl import SFTTrainer as _Base
else:
    _Base = object

CHUNK = 8
"""Blocks a chunk, where the config does not say."""
_HEADS = ("fused_lm_head", "use_cache", "num_items_in_batch")
_NOT_INPUTS = (*_HEADS, "labels")


@dataclass(frozen=True)
class Streamed:
    """Stage 1 in chunks of ``chunk`` blocks, with gradients through the blocks' keys and values."""

    chunk: int

    def run(self, student: nn.Module, forward: Any, kwargs: dict[str, Any]) -> Any:
        """The student's fused ``forward`` over the batch ``kwargs``."""
        state = attachment(student)
        inputs = {k: v for k, v in kwargs.items() if k not in _NOT_INPUTS and v is not None}
        stream = stream_of(student, state, inputs, kwargs["labels"], self.chunk)
        if stream is None:
            return forward(**kwargs)
        heads = {k: v for k, v in kwargs.items() if k in _HEADS}
        return read_stream(student, forward, stream, heads)


def read_stream(student: nn.Module, forward: Any, stream: Stream, heads: dict[str, Any]) -> Any:
    """Stage 2: ``forward`` over the stream."""
    state = attachment(student)

    def lay_out(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = stream.hidden(output.last_hidden_state)
        return output

    handle = student.base_model.register_forward_hook(lay_out)
    try:
        with state.positions("own"), recomputing(state.family.text_model(student)):
            return forward(**stream.inputs, **heads, labels=stream.labels)
    finally:
        handle.remove()


def open_for_stages(student: nn.Module) -> None:
    """Let ``student.forward`` take ``stages=…``; without it, or without a fused head, it is what it was."""
    own = student.forward

    @functools.wraps(type(student).forward)
    def forward(self: nn.Module, *args: Any, stages: Streamed | None = None, **kwargs: Any) -> Any:
        if stages is None or not kwargs.get("fused_lm_head"):
            return own(*args, **kwargs)
        return stages.run(self, own, kwargs)

    student.forward = types.MethodType(forward, student)


class Staged(_Base):
    """For a ``VoCoSFTTrainer``: with ``args.stage1`` other than ``joint``, batches run in two stages, in
    training and for the loss of an evaluation.
    """

    _stages: Streamed | None = None

    def _prepare_stages(self) -> None:
        """Once the model is wrapped in PEFT.

        Raises:
            ValueError: something here does not go with two stages.
        """
        args = self.args
        if getattr(args, "stage1", "joint") == "joint":
            return
        check_stages(self, args.stage1)
        student = unwrap(self.accelerator.unwrap_model(self.model))
        open_for_stages(student)
        self._stages = Streamed(args.stage1_chunk or CHUNK)

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._stages is not None:
            inputs = {**inputs, "stages": self._stages}
        return super().compute_loss(model, inputs, *args, **kwargs)


def check_stages(trainer: Any, stage1: str) -> None:
    """Refuse what two stages cannot honour.

    Raises:
        ValueError: the message names it.
    """
    args, voco = trainer.args, trainer.voco
    if voco is None:
        raise ValueError(f"stage1={stage1!r}: voco is null, so there is nothing to compress; use joint.")
    check_rule(voco, stage1)
    student = unwrap(trainer.model)
    parallel = trainer.accelerator.parallelism_config
    cut = parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False))
    deepspeed = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    for wrong, why in (
        (args.packing, "packing=True puts conversations side by side; leave packing out"),
        (args.distill is not None, "distill compares the hidden states of one pass; leave distill out"),
        (trainer.compute_loss_func is not None, "compute_loss_func needs the logits of one pass"),
        (args.label_smoothing_factor > 0, "label_smoothing_factor needs whole logits; set it to 0"),
        (getattr(trainer, "aux_loss_enabled", False), "the router's balance loss counts one pass's tokens"),
        (cut, "context and sequence parallelism cut rows up"),
        (
            trainer.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3),
            "FSDP and ZeRO-3 gather weights forward by forward, and processes whose batches hold other "
            "numbers of images run other numbers of forwards; use DDP, ZeRO-1 or ZeRO-2",
        ),
        (
            args.gradient_checkpointing and reentrant,
            "gradient_checkpointing_kwargs: use_reentrant=true loses gradients through the blocks; set it "
            "false",
        ),
        (
            getattr(student.config.get_text_config(), "num_kv_shared_layers", 0),
            f"layers of {type(student).__name__} share keys and values",
        ),
        (
            attachment(student).family.backbone(student) is student,
            f"{type(student).__name__} has no backbone below its head",
        ),
    ):
        if wrong:
            raise ValueError(f"stage1={stage1!r} cannot go with this: {why}.")


def check_rule(voco: VoCoConfig, stage1: str) -> None:
    """Refuse a rule whose blocks are not made alone.

    Raises:
        ValueError: it names the option, and what to set.
    """
    for name, wanted in (("rule", "isolated"), ("block_context", "self"), ("compressor", "voco")):
        value = getattr(voco, name)
        if value != wanted:
            raise ValueError(
                f"stage1={stage1!r} needs voco.{name}={wanted!r}, not {value!r}: it computes each block "
                "alone, by the language model; change it, or use stage1=joint."
            )


__all__ = ["CHUNK", "Staged", "Streamed", "check_rule", "open_for_stages", "read_stream"]
