"""What upstream versions need from us, each piece with its "remove when"; any layer may import this file.

Nothing here changes upstream at import: a piece is a context manager that puts back what it changed, or a
call that does nothing where the trouble is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from .core.extension import Extension, extend

# -- transformers
# ---------------------------------------------------------------------------------------------------------


@functools.cache
def cache_names() -> tuple[str, ...]:
    """The names by which transformers' models and ``generate`` take a KV cache; the first is the one to use,
    and the field of an output that holds it.

    transformers 5.24 renamed ``past_key_values`` to ``cache`` and takes the old name with a warning until
    5.40. Read off the library's own output class. Remove when 5.24 is the oldest version supported.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    renamed = any(field.name == "cache" for field in dataclasses.fields(BaseModelOutputWithPast))
    return ("cache", "past_key_values") if renamed else ("past_key_values",)


@functools.cache
def chunks_forget_the_cache() -> bool:
    """Whether ``generate(prefill_chunk_size=…)`` counts its chunks from zero where a KV cache is given, and
    cuts the attention mask wrongly, as transformers before 5.21. Remove when 5.21 is the oldest supported.
    """
    return _transformers() < Version("5.21")


@functools.cache
def checkpointed_layers_drop_caches() -> bool:
    """Whether a layer with gradient checkpointing on, in training mode, is never given its KV cache, also
    where no gradients are computed, as transformers before 5.24. Remove when 5.24 is the oldest supported.
    """
    return _transformers() < Version("5.24")


@functools.cache
def answers_are_marked_wrongly() -> bool:
    """Whether a processor's ``apply_chat_template(return_assistant_tokens_mask=True)`` marks other tokens
    than the answers' where an image stands before them, as transformers before 5.18: it looks for them where
    they stood before the image's placeholder was expanded. Remove when 5.18 is the oldest supported.
    """
    return _transformers() < Version("5.18")


@functools.cache
def _transformers() -> Version:
    import transformers

    return Version(transformers.__version__)


class _GivesImageOutputs(Extension):
    """Llama 4's language model, whose output has the attribute that its outer model asks for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not hasattr(output, "image_outputs") and not isinstance(output, tuple):
            output.image_outputs = None
        return output


def patch_llama4(model: nn.Module) -> None:
    """Extend the language model of a ``Llama4ForConditionalGeneration``, no forward of which works otherwise.

    transformers 5.24.0 reads ``image_outputs`` of what its language model gives, which has none
    ("'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'", with VoCo and without). The output
    gets the attribute, ``None``: so the model's own ``image_outputs`` is ``None`` too. On this one object.
    Remove when 5.24.0 is not supported.
    """
    if type(model).__name__ != "Llama4ForConditionalGeneration":
        return
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast
    from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast

    if hasattr(Llama4CausalLMOutputWithPast, "image_outputs") and not hasattr(
        MoeCausalLMOutputWithPast, "image_outputs"
    ):
        extend(model.language_model, _GivesImageOutputs)


# -- torch
# ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def former_names_are_fine() -> Iterator[None]:
    """PEFT asks a model by transformers' former names (``is_gradient_checkpointing``), which warns whoever
    loads an adapter of what they cannot change.

    Remove when: PEFT uses the new names (0.21 does not; transformers 5.24 has both).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
        )
        yield


def cpu_attention_flops() -> dict[Any, Any]:
    """Formulas for ``FlopCounterMode(custom_mapping=…)``: attention on a CPU, counted as on a GPU.

    torch 2.14's counter does not know the CPU's kernel and takes its work for nothing. Empty where it does.
    Remove when 2.14 is not supported.
    """
    from torch.utils import flop_counter

    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward in flop_counter.flop_registry:
        return {}

    def forward_flops(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

    return {forward: forward_flops, backward: backward_flops}


# -- DeepSpeed ZeRO-3
# ---------------------------------------------------------------------------------------------------------


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has split ``parameter`` over the processes (its own tensor is then empty)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of ``parameter``, also where ZeRO-3 has split it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Inside the block, ``parameters`` are whole in every process.

    Every process must enter it. With ``write`` what is written to them stays (rank 0's values are kept);
    without it, DeepSpeed raises where they were changed. Tensors that ZeRO-3 has not split, and without
    ``write`` those that it has gathered for a forward, are left alone.
    """
    split = [p for p in parameters if is_partitioned(p) and (write or p.ds_status.name != "AVAILABLE")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def introduce_deepspeed_to_the_process_group() -> None:
    """Tell DeepSpeed of the process group that is there, before a model is built under ZeRO-3.

    On a CPU accelerate makes the (gloo) group itself, and DeepSpeed, asked to split a model while it loads,
    takes the world for one process: "Check batch related parameters … 4 != 2 * 1 * 1" (accelerate 1.15,
    deepspeed 0.19). On other devices accelerate makes the group through DeepSpeed, and this does nothing.
    Remove when accelerate calls ``deepspeed.comm.init_distributed`` on a CPU too.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not (is_deepspeed_zero3_enabled() and torch.distributed.is_initialized()):
        return
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(torch.distributed.get_backend(), verbose=False)


# -- PEFT
# ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def token_rows_on_any_device() -> Iterator[None]:
    """Inside the block, PEFT can add ``trainable_token_indices`` under ZeRO-3 without CUDA.

    PEFT 0.21 collects the rows into a tensor on ``torch.cuda.current_device()``. Where CUDA is there, or the
    method is gone, nothing is changed. Remove when ``TrainableTokensLayer._collect_token_weights`` takes the
    weight's device.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    name = "_collect_token_weights"
    stock = TrainableTokensLayer.__dict__.get(name)
    if stock is None or torch.cuda.is_available():
        yield
        return

    @functools.wraps(stock)
    def collect(self: Any, weight: torch.Tensor, rows: Any, embed_dim: int) -> torch.Tensor:
        with gathered([weight]), torch.no_grad():
            return weight[rows].detach().clone()

    setattr(TrainableTokensLayer, name, collect)
    try:
        yield
    finally:
        setattr(TrainableTokensLayer, name, stock)


# -- accelerate
# ---------------------------------------------------------------------------------------------------------


def name_present_layers(model: nn.Module) -> None:
    """Take from ``model._no_split_modules`` the classes that the model has no module of.

    accelerate 1.15 wraps these for FSDP and raises where one is missing ("Could not find the transformer
    layer class CLIPTextEmbeddings in the model": every LLaVA with a CLIP tower). Set on this one object.
    Remove when accelerate skips missing classes.
    """
    named = getattr(model, "_no_split_modules", None)
    if named:
        present = {type(module).__name__ for module in model.modules()}
        model._no_split_modules = type(named)(name for name in named if name in present)


# -- TRL
# ---------------------------------------------------------------------------------------------------------


def patch_tied_head(model: nn.Module) -> None:
    """Give an LM head that PEFT wrapped (tied embeddings with trainable rows) the ``bias`` that TRL's loss
    reads.

    The wrapper forwards ``weight`` only (peft 0.21, trl 1.16). The attribute is set on this one object; a
    state dict does not see it. Remove when PEFT's wrapper forwards ``bias``.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and "bias" not in head.__dict__:
        head.__dict__["bias"] = getattr(head.original_module, "bias", None)
