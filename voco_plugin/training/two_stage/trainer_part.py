"""``stage1: streamed | frozen``: a training forward in two stages (paper, Sec. 3.4), inside the student's own
forward.

    batch ──> model(**batch, training_step=…)   through DDP or DeepSpeed, as any forward
      └─ the student's forward: stage 1, chunk by chunk ──> TRL's fused loss, whose backbone reads the stream
         on the blocks; its hidden states are laid out as the stream on their way to the head

``streamed`` computes the blocks with gradients; ``frozen`` takes them from a store, or computes them without
gradient and without the adapter (``frozen.py``).
Only the fused forward is cut in two: one that gives logits of a whole batch is one pass, as ever.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...cache.fingerprint import as_told, differences, without_adapter
from ...config import VoCoConfig
from ...core.attachment import attachment, evaluating, unwrap
from ...core.forward import ForwardMode
from ...store.keys import fingerprint_of
from ...store.store import VoCoCacheStore
from ..fused_step import FusedStep
from .frozen_blocks import IMAGE_KEYS, FrozenBlocks
from .frozen_checks import check_frozen, check_trained
from .layer_checkpointing import can_checkpoint_with_cache
from .streamed import Stream, stream_of

if TYPE_CHECKING:
    from trl import SFTTrainer as _Base
else:
    _Base = object

CHUNK = 8
"""Blocks a chunk, where the config does not say."""
_HEADS = ("fused_lm_head", "use_cache", "num_items_in_batch")
_NOT_INPUTS = (*_HEADS, "labels", IMAGE_KEYS)


@dataclass(frozen=True)
class Streamed:
    """Stage 1 in chunks of ``chunk`` blocks, with gradients through the blocks' keys and values."""

    chunk: int
    step: FusedStep

    def run(self, student: Any, **kwargs: Any) -> Any:
        """The student's fused forward over the batch ``kwargs``."""
        state = attachment(student)
        inputs = {k: v for k, v in kwargs.items() if k not in _NOT_INPUTS and v is not None}
        stream = stream_of(student, state, inputs, kwargs["labels"], self.chunk)
        if stream is None:
            return self.step.run(student, **kwargs)
        heads = {k: v for k, v in kwargs.items() if k in _HEADS}
        return read_stream(student, self.step, stream, heads)


@dataclass(frozen=True)
class Frozen:
    """Stage 1 without gradient, as inference runs it: in evaluation mode, the weights' dtype and without the
    adapter; or not at all, where the store has the blocks.
    """

    blocks: FrozenBlocks
    step: FusedStep

    def run(self, student: Any, **kwargs: Any) -> Any:
        """The student's fused forward over the batch ``kwargs``."""
        inputs = {k: v for k, v in kwargs.items() if k not in _NOT_INPUTS and v is not None}
        inputs = {k: _as_weights(v, student) for k, v in inputs.items()}
        with evaluating(student), torch.autocast(inputs["input_ids"].device.type, enabled=False):
            stream = self.blocks.stream_of(
                student, attachment(student), inputs, kwargs["labels"], kwargs.get(IMAGE_KEYS)
            )
        if stream is None:
            return self.step.run(student, **{k: v for k, v in kwargs.items() if k != IMAGE_KEYS})
        heads = {k: v for k, v in kwargs.items() if k in _HEADS}
        return read_stream(student, self.step, stream, heads)


def _as_weights(value: Any, model: Any) -> Any:
    """Pixels in the weights' dtype, as :func:`~voco_plugin.inference.answering.compress_images` gives
    them.
    """
    return value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def read_stream(student: Any, step: FusedStep, stream: Stream, heads: dict[str, Any]) -> Any:
    """Stage 2: the fused forward over the stream, its hidden states laid out as the stream."""

    def lay_out(output: Any) -> Any:
        output.last_hidden_state = stream.hidden(output.last_hidden_state)
        return output

    mode = ForwardMode("own", checkpoint_cached_layers=True, output=lay_out)
    return step.run(student, **stream.inputs, **heads, labels=stream.labels, voco_mode=mode)


class Staged(_Base):
    """For a ``VoCoSFTTrainer``: with ``args.stage1`` other than ``joint``, batches run in two stages, in
    training and for the loss of an evaluation.
    """

    _fused: FusedStep | None = None
    _stages: Streamed | Frozen | None = None
    _start: dict[str, Any] | None = None

    def _note_start(self, model: Any, args: Any, peft_config: Any) -> None:
        """Before the model is wrapped in PEFT: what it is then, which stage 1 is to stay.

        Raises:
            ValueError: its stage 1 is frozen and ``args`` would train it, or nothing would be an adapter.
        """
        stage1 = getattr(args, "stage1", "joint")
        check_frozen(model, self.voco, stage1, peft_config)
        if stage1 == "frozen" and self.voco is not None:
            self._start = without_adapter(fingerprint_of(model))

    def _prepare_stages(self) -> None:
        """Once the model is wrapped in PEFT.

        Raises:
            ValueError: something here does not go with two stages.
            VoCoCacheError: ``stage1_store`` is another model's.
        """
        args = self.args
        if getattr(args, "stage1", "joint") == "joint":
            return
        check_stages(self, args.stage1)
        student = unwrap(self.accelerator.unwrap_model(self.model))
        if self._fused is None:
            raise ValueError(
                f"stage1={args.stage1!r} needs TRL's fused loss, which is off here (use_liger_kernel, or "
                "another loss)."
            )
        can_checkpoint_with_cache(student)
        chunk = args.stage1_chunk or CHUNK
        frozen = args.stage1 == "frozen"
        self._stages = self._frozen(student, chunk) if frozen else Streamed(chunk, self._fused)

    def _frozen(self, student: nn.Module, chunk: int) -> Frozen:
        check_trained(student)
        if self.compute_metrics is not None:
            raise ValueError(
                "stage1='frozen' cannot go with this: compute_metrics needs the logits of one pass."
            )
        made_by = without_adapter(fingerprint_of(student))
        changed = differences(self._start or made_by, made_by)
        if changed:
            raise ValueError(
                f"stage1='frozen': the adapter's initialization changed the weights it stands on "
                f"({'; '.join(changed)}), so stage 1 would not be the starting model; set "
                "init_lora_weights=True."
            )
        store = None
        if self.args.stage1_store is not None:
            store = open_store(self.args.stage1_store, made_by)
            weakref.finalize(self, store.close)
        return Frozen(FrozenBlocks(made_by, chunk, store), self._fused)

    @property
    def _image_keys_of(self) -> dict[str, Any] | None:
        """The fingerprint that the collator makes keys with; ``None`` where no store asks for them."""
        frozen = self._stages.blocks if isinstance(self._stages, Frozen) else None
        if frozen is None or frozen.store is None:
            return None
        return as_told(frozen.made_by, [frozen.store.fingerprint])


def open_store(folder: str, made_by: dict[str, Any]) -> VoCoCacheStore:
    """The store of the starting model's blocks; made where there is none, only read where it cannot be
    written to.

    Raises:
        VoCoCacheError: another model's.
        ValueError: its values are of 8 bits.
    """
    readonly = os.path.isdir(folder) and not os.access(folder, os.W_OK)
    store = VoCoCacheStore(folder, fingerprint=made_by, readonly=readonly)
    if store.values != "keep":
        store.close()
        raise ValueError(
            f"stage1_store {folder} keeps {store.values} values, so training would read other blocks than "
            "those it computes; make one with values=keep."
        )
    return store


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
        (args.torch_compile, "torch_compile follows one pass, not the chunks before it; set it to false"),
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


__all__ = ["CHUNK", "Staged", "Streamed", "check_rule", "read_stream"]
