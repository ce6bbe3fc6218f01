"""LoRA by stage (``VoCoConfig.adapter_stages``): which tokens of a forward an adapter acts on.

                          both        compress    separate
    V and C of a block    adapter     adapter     adapter "compress"
    text                  adapter     base        adapter "read"

In two stages that is the whole forward: stage 1 holds blocks alone, stage 2 and decoding text alone. In a
single pass one forward holds both, so a layer of the language model adds LoRA's part at the rows of some
tokens only, and the other rows are the base's, bit for bit. What runs before the language model (vision
tower, projector) sees images alone, and belongs to stage 1.

A layer asks which tokens its own thread's forward is about (:func:`block_tokens`); a layer that gradient
checkpointing runs again, in a backward pass, is told what it was told the first time (:func:`carried`).

Shapes: ``B`` rows, ``N`` tokens, ``H`` width of a layer's input, ``n`` tokens an adapter acts on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .extension import Extension, extend
from .model_parts import LANGUAGE, ModelParts
from .peft_layers import is_tuner, what_changed_the_base

BOTH, COMPRESS, SEPARATE = "both", "compress", "separate"
"""``adapter_stages``. The last two are also the names of the adapters of ``separate``, beside ``read``."""
READ = "read"


class BlockTokens:
    """Which tokens of one forward belong to blocks.

    Args:
        stages: ``adapter_stages``, not ``both``.
        inside: ``(B, N)`` bool on the CPU, or one bool for all tokens.
        shape: ``(B, N)`` where ``inside`` is one bool; ``None`` where layers are cut to some tokens.
    """

    def __init__(self, stages: str, inside: torch.Tensor | bool, shape: Sequence[int] | None = None) -> None:
        if isinstance(inside, torch.Tensor):
            shape = inside.shape
            if bool(inside.all() == inside.any()):
                inside = bool(inside.any())
        self.stages, self.inside = stages, inside
        self.shape = None if shape is None else tuple(shape)
        self._sent: dict[tuple[bool, torch.device], torch.Tensor] = {}

    def rows(self, of_blocks: bool, x: torch.Tensor, layer: str) -> torch.Tensor | bool:
        """The rows of ``x`` that are tokens of blocks (or of text): indices ``(n,)`` into the flattened
        leading dimensions, or whether all of them are.

        Args:
            x: ``(…, B, N, H)`` or ``(B · N, H)``, in the sequence's order; dimensions of 1 may stand between.

        Raises:
            ValueError: it has another shape, so that rows cannot be told apart.
        """
        inside, shape = self.inside, self.shape
        if shape is None:
            return inside == of_blocks
        tokens = math.prod(shape)
        lead, wanted = (tuple(size for size in sizes if size != 1) for sizes in (x.shape[:-1], shape))
        if lead[len(lead) - len(wanted) :] != wanted and lead != (tokens,):
            raise ValueError(
                f"adapter_stages={self.stages!r}: {layer} is given {tuple(x.shape)} in a forward of "
                f"{shape[0]} x {shape[1]} tokens, so it cannot be told which of them belong to an image; "
                "leave it out of target_modules."
            )
        if isinstance(inside, bool):
            return inside == of_blocks
        found = self._sent.get((of_blocks, x.device))
        if found is None:
            found = (inside == of_blocks).flatten().nonzero().flatten().to(x.device)
            self._sent[of_blocks, x.device] = found
        copies = math.prod(lead) // tokens
        if copies > 1:
            found = (torch.arange(copies, device=x.device)[:, None] * tokens + found).flatten()
        return found


_TOKENS: ContextVar[BlockTokens | None] = ContextVar("voco_block_tokens", default=None)


def set_block_tokens(tokens: BlockTokens | None) -> Token:
    """What :func:`block_tokens` gives from here on in this thread; ``reset_block_tokens`` takes it back."""
    return _TOKENS.set(tokens)


def reset_block_tokens(token: Token) -> None:
    _TOKENS.reset(token)


def block_tokens() -> BlockTokens | None:
    """The tokens of the attached model's forward that runs in this thread; ``None`` outside of one."""
    return _TOKENS.get()


def carried(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which sees the tokens of the forward that runs now wherever it is called."""
    tokens = _TOKENS.get()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _TOKENS.set(tokens)
        try:
            return call(*args, **kwargs)
        finally:
            _TOKENS.reset(before)

    return run


# -- layers


class StageAdapter(Extension):
    """What a PEFT layer is extended by where its adapter acts by stage. In itself it says that the layer sees
    images alone, and is never merged.
    """

    def merge(self, *args: Any, **kwargs: Any) -> None:
        _refuse_merging()


class StageModule(StageAdapter):
    """The same of a module that PEFT merges in a way of its own (rows, whole modules): before it comes to a
    layer that refuses, it would have written these.
    """

    def unload_and_optionally_merge_module(self, merge: bool, *args: Any, **kwargs: Any) -> Any:
        if merge:
            _refuse_merging()
        return super().unload_and_optionally_merge_module(merge, *args, **kwargs)  # type: ignore[misc]


class ActsByStage(StageAdapter):
    """What a LoRA layer of the language model is extended by: its adapter acts on some tokens only."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self
        if layer.disable_adapters:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        tokens = _TOKENS.get()
        _check_runs(layer, tokens, kwargs)
        assert tokens is not None
        result = layer.base_layer(x, *args, **kwargs)
        for adapter, of_blocks in acting_adapters(layer, tokens.stages):
            rows = tokens.rows(of_blocks, x, type(layer).__name__)
            if rows is False:
                if not (torch.is_grad_enabled() and layer.lora_B[adapter].weight.requires_grad):
                    continue
                # a batch without an image has gradients, of 0, as any other has (DDP waits for them)
                rows = torch.empty(0, dtype=torch.long, device=x.device)
            result = _added(layer, adapter, x, result, rows)
        return result


def acting_adapters(layer: Any, stages: str) -> Iterator[tuple[str, bool]]:
    """The active adapters of a LoRA layer, and whether each acts on the tokens of blocks (or of text).

    Raises:
        ValueError: with ``separate``, others than the two are active.
    """
    active = list(layer.active_adapters)
    if stages == SEPARATE and sorted(active) != [COMPRESS, READ]:
        raise ValueError(
            f"adapter_stages='separate' runs two adapters, {COMPRESS} for images and {READ} for text, and "
            f"{', '.join(active) or 'none'} is active; load the checkpoint with voco_plugin.load, or "
            f"base_model.set_adapter(['{COMPRESS}', '{READ}'])."
        )
    for adapter in active:
        if adapter in layer.lora_A:
            yield adapter, adapter != READ or stages != SEPARATE


def _added(
    layer: Any, adapter: str, x: torch.Tensor, result: torch.Tensor, rows: torch.Tensor | bool
) -> torch.Tensor:
    """``result`` with the part of one adapter at ``rows`` of ``x`` (``True``: all of them), as PEFT adds it;
    the other rows stay as they are, bit for bit.
    """
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    taken = x if isinstance(rows, bool) else x.reshape(-1, x.shape[-1]).index_select(0, rows)
    taken = layer._cast_input_dtype(taken, down.weight.dtype)
    part = up(down(layer.lora_dropout[adapter](taken))) * layer.scaling[adapter]
    if isinstance(rows, bool):
        return (result + part).to(result.dtype)
    flat = result.reshape(-1, result.shape[-1])
    summed = (flat.index_select(0, rows) + part).to(result.dtype)
    return flat.index_copy(0, rows, summed).view(result.shape)


def _check_runs(layer: Any, tokens: BlockTokens | None, kwargs: dict[str, Any]) -> None:
    """Refuse a forward in which the layer cannot act by stage.

    Raises:
        ValueError: it runs outside the attached model's forward, or is merged, or is not plain LoRA.
    """
    if tokens is None:
        raise ValueError(
            "adapter_stages: a LoRA layer was run outside the forward of the attached model, or again by a "
            "checkpointing that is not transformers' own, where it cannot be told which tokens belong to an "
            "image; call the model itself, and use gradient_checkpointing."
        )
    if layer.merged:
        raise ValueError(
            f"adapter_stages={tokens.stages!r}: the adapter is merged into the weights, where it acts on "
            "text too; call unmerge_adapter() first."
        )
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_stages={tokens.stages!r}: adapter_names chooses adapters row by row, and here they are "
            "chosen token by token; leave adapter_names out."
        )
    if any(adapter in getattr(layer, "lora_variant", ()) for adapter in layer.active_adapters):
        raise ValueError(_not_plain(tokens.stages))


def _not_plain(stages: str) -> str:
    return (
        f"adapter_stages={stages!r} runs plain LoRA token by token, and a variant (DoRA, aLoRA) changes more "
        "than what it adds; leave use_dora and its like out."
    )


def _refuse_merging() -> None:
    raise ValueError(
        "adapter_stages: this adapter acts on some tokens only (images, or text), and merged into the "
        "weights it would act on all of them; save the adapter itself (save_pretrained), or take it off "
        "(unload)."
    )


class CarriesBlockTokens(Extension):
    """What a checkpointing layer is extended by: run again in a backward pass, it sees the same tokens."""

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        stock = vars(self).get("_gradient_checkpointing_func")
        if stock is None:
            raise AttributeError("_gradient_checkpointing_func")
        return lambda call, *args, **kwargs: stock(carried(call), *args, **kwargs)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        vars(self)["_gradient_checkpointing_func"] = value


# -- a model


def act_by_stage(root: nn.Module, stages: str, voco_id: int) -> bool:
    """Let the adapters of ``root``, a model or its backbone, act by ``stages`` (idempotent).

    Returns:
        whether there are any.

    Raises:
        ValueError: an adapter does what cannot be told apart token by token; the message names it.
    """
    found, new = False, False
    module: Any
    for module in root.modules():
        if is_tuner(module.__class__):
            found = True
            new = new or not isinstance(module, StageAdapter)
    if not new:
        return found
    parts = ModelParts(root)  # type: ignore[arg-type]
    extensions: list[tuple[nn.Module, type[Extension]]] = []
    for name, module in root.named_modules():
        if is_tuner(module.__class__) and not isinstance(module, StageAdapter):
            of_language = parts.of(name) == LANGUAGE
            _check_layer(name, module, stages, voco_id, parts, of_language)
            kind: type[Extension] = StageAdapter
            if hasattr(module, "lora_A") and of_language:
                kind = ActsByStage
            elif hasattr(module, "unload_and_optionally_merge_module"):
                kind = StageModule
            extensions.append((module, kind))
        elif isinstance(module, GradientCheckpointingLayer):
            extensions.append((module, CarriesBlockTokens))
    for module, extension in extensions:
        extend(module, extension)
    return found


def check_model(model: Any, stages: str) -> None:
    """Refuse what of an attached model is seen from outside its backbone only.

    Raises:
        ValueError: an adapter on the head, or one that changes the weights it stands on.
    """
    if stages == BOTH:
        return
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise ValueError(f"adapter_stages={stages!r}: {_ON_HEAD}; leave it out of target_modules.")
    check_configs(getattr(model, "peft_config", None) or {}, stages)


_ON_HEAD = "an adapter is on the head, which reads text"


def check_configs(configs: Any, stages: str) -> None:
    """Refuse PEFT configs whose adapters change the weights they stand on, which text is to be read with.

    Args:
        configs: as :func:`~voco_plugin.core.peft_layers.what_changed_the_base` takes them.

    Raises:
        ValueError: it names the setting.
    """
    changed = what_changed_the_base(configs)
    if changed is not None:
        raise ValueError(
            f"adapter_stages={stages!r}: {changed} changes the weights under the adapter, and text would be "
            "read with these; use plain LoRA (init_lora_weights=True, bias='none')."
        )


def _check_layer(
    name: str, layer: Any, stages: str, voco_id: int, parts: ModelParts, of_language: bool
) -> None:
    what = f"adapter_stages={stages!r}:"
    lora = hasattr(layer, "lora_A")
    held = {key for part in layer.children() if hasattr(part, "keys") for key in part.keys()}  # noqa: SIM118
    if stages == SEPARATE and READ in held and not (lora and of_language):
        raise ValueError(
            f"{what} the adapter {READ} holds {name}, which sees no text; let {COMPRESS} hold it alone."
        )
    if not lora:
        _check_no_lora(what, name, layer, voco_id, of_language)
    elif of_language:
        reason = _not_by_token(name, layer, parts)
        if reason is not None:
            raise ValueError(f"{what} {name} {reason}; leave it out of target_modules.")
        if getattr(layer, "lora_variant", None):
            raise ValueError(_not_plain(stages))


def _check_no_lora(what: str, name: str, layer: Any, voco_id: int, of_language: bool) -> None:
    """What PEFT holds beside LoRA: whole modules that see images alone, and the VoCo token's row."""
    rows = getattr(getattr(layer, "token_adapter", layer), "token_indices", None)
    if rows is not None:
        more = sorted({int(row) for indices in rows.values() for row in indices} - {voco_id})
        if more:
            raise ValueError(
                f"{what} the adapter trains the rows of tokens {', '.join(map(str, more))} of {name}, which "
                "stand in text; let it train the VoCo token's row alone."
            )
    elif not hasattr(layer, "modules_to_save"):
        raise ValueError(f"{what} {name} is a {type(layer).__name__}; only LoRA acts token by token.")
    elif of_language:
        raise ValueError(
            f"{what} modules_to_save copies {name}, which reads text too; leave it out (the projector may be "
            "in it)."
        )


def _not_by_token(name: str, layer: Any, parts: ModelParts) -> str | None:
    """Why a LoRA layer of the language model cannot act on some tokens only; ``None`` where it can."""
    from peft.tuners.lora import layer as layers

    if name == parts.head:
        return "is the head, which reads text"
    others = ("Embedding", "_ConvNd", "MultiheadAttention", "ParamWrapper")
    if isinstance(layer, tuple(getattr(layers, kind) for kind in others if hasattr(layers, kind))):
        return f"is a {type(layer).__name__} and not a linear layer"
    if name.endswith(".kv_b_proj"):  # of latent attention (DeepSeek), whose cache holds what goes into it
        return "is applied to what a KV cache holds, so a block would be read through it again"
    inside = name.removeprefix(f"{parts.layers}.").split(".")[1:]
    if any(part.isdigit() for part in inside):
        return "is one of several (an expert), given tokens in an order of its own"
    return None


__all__ = [
    "BOTH",
    "COMPRESS",
    "READ",
    "SEPARATE",
    "ActsByStage",
    "BlockTokens",
    "StageAdapter",
    "act_by_stage",
    "acting_adapters",
    "block_tokens",
    "carried",
    "check_configs",
    "check_model",
    "reset_block_tokens",
    "set_block_tokens",
]
