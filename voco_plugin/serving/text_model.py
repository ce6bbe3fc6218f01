"""The language model of an attached vision-language model as an ordinary ``…ForCausalLM``: what an engine
runs for text, beside blocks that stage 1 made.

    LlavaForConditionalGeneration            LlamaForCausalLM
      model.vision_tower, projector            -
      model.language_model   (LoRA)      →     model       (merged, the weights shared where there is no LoRA)
      lm_head                            →     lm_head
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ..core.adapter_stages import COMPRESS, READ, SEPARATE
from ..core.attachment import attachment, evaluating, input_device, unwrap
from ..core.extension import is_extended, restore
from ..core.peft_layers import is_tuner

_PROBE = 24
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDED = 3e-2
"""Of the logits' largest, in 16 bits: a merged LoRA is rounded once more."""
_ONE_AXIS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {}),
    "glm46v_text": ("glm4", {}),
    "glm4v_moe_text": ("glm4_moe", {}),
}
"""Text models with positions on three axes, and those that compute the same where the three are equal, with
what these leave open and those do not.
"""


class NotExportableError(ValueError):
    """This language model cannot answer outside its vision-language model; the message says why."""


def refusal(model: Any) -> str | None:
    """Why the language model of an attached model cannot stand alone beside blocks, or ``None``."""
    inner: Any = unwrap(model)
    state: Any = attachment(model)
    family, config = state.family, state.config
    text = family.text_model(inner).config
    name = inner.config.model_type
    if config.rule == "causal":
        return "rule='causal' has no blocks: text reads the vision tokens"
    if state.embeddings is not None and state.embeddings.compressor.reads_question:
        return f"compressor={config.compressor!r} reads the question, so its blocks answer one prompt only"
    if config.positions != "compact":
        return (
            f"positions={config.positions!r}: an engine counts the stream's tokens, without the vision "
            "tokens, which is positions='compact'"
        )
    if config.hide_prefix:
        return "hide_prefix=true: text would have to be hidden from text, which an engine does not"
    if family.prefix_lm:
        return f"{name} reads its prompt both ways, and an engine reads it causally"
    if _plain_rope(inner, text) is None:
        return f"{name} counts positions on three axes (mrope), and has no twin that counts on one"
    if getattr(text, "num_kv_shared_layers", 0):
        return f"{name} has layers that use the keys and values of others"
    if getattr(text, "hidden_size_per_layer_input", 0):
        return f"{name} has inputs of its own for every layer"
    if family.windowed(inner):
        return f"{name} has layers that attend within a window or a chunk, which count vision tokens"
    own = type_of_text(text)
    if own is not None and isinstance(inner, own):
        return f"{name} encodes images inside its language model, which does not stand alone"
    if getattr(text, "kv_lora_rank", None):
        return f"{name} caches a latent (MLA), not keys and values by head"
    if getattr(inner, "is_quantized", False):
        return f"the weights of {name} are quantised; merge and load it in 16 or 32 bits"
    return None


def text_model_of(model: Any) -> PreTrainedModel:
    """The language model of ``model`` (attached; with its adapter or without) as a ``…ForCausalLM`` of its
    own, in evaluation mode. Its logits are those of the attached model on text; this is checked here.

    Weights are shared with ``model``, those that an adapter changes apart. ``model`` does not change.

    Raises:
        NotExportableError: it cannot stand alone.
    """
    why = refusal(model)
    if why is not None:
        raise NotExportableError(f"this model has no language model of its own for an engine: {why}.")
    inner: Any = unwrap(model)
    state = attachment(model)
    text: Any = state.family.text_model(inner)
    head = inner.get_output_embeddings()
    config = _plain_rope(inner, text.config)
    made = _shell(inner, config, state.restore["implementation"])
    base = getattr(made, made.base_model_prefix)
    copied, its_head = _merged(text, head, state.config.adapter_stages)
    tied = config.tie_word_embeddings
    weights = {f"{made.base_model_prefix}.{n}": w for n, w in copied.state_dict().items()}
    if not tied:
        place = _head_name(made)
        weights |= {f"{place}.{n}": w for n, w in its_head.state_dict().items()}
        bias = getattr(made.get_output_embeddings(), "bias", None)
        if bias is not None and f"{place}.bias" not in weights:  # LLaVA's head has none, whatever Phi's has
            weights[f"{place}.bias"] = torch.zeros(len(bias), dtype=made.dtype, device=its_head.weight.device)
    own = {name for name in made.state_dict() if not tied or not name.startswith(f"{_head_name(made)}.")}
    if own != set(weights):
        odd = sorted(own ^ set(weights))[0]
        raise NotExportableError(
            f"the language model of {type(inner).__name__} is not that of {type(made).__name__}: {odd} is in "
            "one of them alone."
        )
    _check_shapes(made, weights)
    made.load_state_dict(weights, strict=False, assign=True)
    _take_buffers(base, copied)
    made.tie_weights()
    made.requires_grad_(False)
    made.eval()
    if inner.generation_config is not None:
        made.generation_config = copy.deepcopy(inner.generation_config)
    _check_same(model, made)
    return made


def _check_shapes(made: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in made.state_dict().items():
        if name in weights and tensor.shape != weights[name].shape:
            raise NotExportableError(
                f"{name} is {tuple(weights[name].shape)} in this language model and {tuple(tensor.shape)} in "
                f"a {type(made).__name__} of its config."
            )


def _head_name(made: PreTrainedModel) -> str:
    head = made.get_output_embeddings()
    return next((name for name, module in made.named_modules() if module is head), "lm_head")


def _plain_rope(inner: Any, config: Any) -> Any:
    """A copy of the text config; of a model with positions on three axes, that of its twin with one, or
    ``None``. In a compressed stream the three are equal, where both rotate alike.
    """
    if not hasattr(inner.base_model, "get_rope_index"):
        return copy.deepcopy(config)
    twin = _ONE_AXIS.get(config.model_type)
    if twin is None:
        return None
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    rope = dict(values.pop("rope_parameters", None) or {})
    rope = {k: v for k, v in rope.items() if not k.startswith("mrope")}
    rope["rope_type"] = "default" if rope.get("rope_type") in (None, "mrope") else rope["rope_type"]
    kind, fixed = twin
    values.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    make: Any = CONFIG_MAPPING[kind]
    return make(**{**values, **fixed}, rope_parameters=rope)


def type_of_text(config: Any) -> type | None:
    """The ``…ForCausalLM`` of a text config, or ``None`` where transformers has none."""
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[attr-defined]
    except KeyError:
        return None
    return found if isinstance(found, type) else None


def _shell(inner: Any, config: Any, implementation: str) -> PreTrainedModel:
    """The ``…ForCausalLM`` of a text config, without weights."""
    cls: Any = type_of_text(config)
    if cls is None:
        raise NotExportableError(
            f"{config.model_type}, the language model of {type(inner).__name__}, has no ForCausalLM class in "
            "transformers."
        )
    rows, head = inner.get_input_embeddings().weight, inner.get_output_embeddings()
    config.vocab_size = rows.shape[0]
    config.tie_word_embeddings = head is not None and _plain(head) is _plain(inner.get_input_embeddings())
    config._attn_implementation_internal = implementation
    config.architectures = [cls.__name__]
    dtype = rows.dtype
    config.dtype = dtype
    with torch.device("meta"):
        return cls(config).to(dtype)


def _plain(module: Any) -> Any:
    """The weight under an adapter's layers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return getattr(module, "original_module", module).weight


def _merged(text: nn.Module, head: Any, stages: str) -> tuple[nn.Module, Any]:
    """Copies of the decoder and its head with what acts on text merged and the rest left out. Weights are
    shared, but those that are merged into.
    """
    parts: list[Any] = [*text.modules(), *head.modules()]
    written = {
        id(tensor)
        for part in parts
        if is_tuner(part.__class__) or hasattr(part, "unload_and_optionally_merge_module")
        for tensor in part.parameters()
    }
    tensors = [t for module in (text, head) for t in (*module.parameters(), *module.buffers())]
    memo = {id(t): t for t in tensors if id(t) not in written}
    holder = nn.ModuleDict({"text": text, "head": head})
    try:
        copied = copy.deepcopy(holder, memo)
    finally:
        holder._modules.clear()
    for module in copied.modules():
        if is_extended(module):
            restore(module)
    # text is the base's with "compress", and the reader's with "separate"
    names = [READ] if stages == SEPARATE else None
    _unload(copied, merge=stages != COMPRESS, names=names)
    return copied["text"], copied["head"]


def _unload(root: nn.Module, merge: bool, names: list[str] | None) -> None:
    """Put merged modules in the places of PEFT's layers. With ``names``, only of these adapters."""
    with torch.no_grad():
        for place, module in list(root.named_modules()):
            if not _is_there(root, place, module):
                continue  # inside one that went
            merges = merge and not getattr(module, "disable_adapters", False)
            if hasattr(module, "unload_and_optionally_merge_module"):
                # rows and whole modules belong to one adapter, which "separate" trains as the compressor
                alone = merges and (names is None or set(names) & set(module.active_adapters))
                plain = module.unload_and_optionally_merge_module(bool(alone), False, names)
            elif is_tuner(module.__class__) and hasattr(module, "base_layer"):
                if merges:
                    held = [n for n in names if n in module.active_adapters] if names else None
                    module.merge(safe_merge=False, adapter_names=held)
                plain = module.get_base_layer()
            else:
                continue
            root.set_submodule(place, plain)


def _is_there(root: nn.Module, place: str, module: nn.Module) -> bool:
    with contextlib.suppress(AttributeError):
        return root.get_submodule(place) is module
    return False


def _take_buffers(base: nn.Module, text: nn.Module) -> None:
    """Buffers that are not saved (the rope's frequencies) lie on no device in the shell."""
    saved = set(text.state_dict())
    for name, buffer in text.named_buffers():
        if name not in saved:
            owner, _, last = name.rpartition(".")
            base.get_submodule(owner).register_buffer(last, buffer, persistent=False)


@torch.no_grad()
def _check_same(model: Any, made: PreTrainedModel) -> None:
    """Compare logits on a text of random ids.

    Raises:
        NotExportableError: they differ.
    """
    state = attachment(model)
    special = {state.vocab.voco_id, *state.vocab.placeholders, *state.vocab.markers}
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(made.config.vocab_size, (4 * _PROBE,), generator=draw).tolist()
    text = [i for i in drawn if i not in special][:_PROBE]
    ids = torch.tensor([text or [0]], device=input_device(unwrap(model)))
    with evaluating(model):
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    ours = made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    width = min(theirs.shape[-1], ours.shape[-1])
    apart = (theirs[..., :width] - ours[..., :width]).abs()
    apart[..., state.vocab.voco_id : state.vocab.voco_id + 1] = 0  # input only; an adapter by stage has it
    off = float(apart.max())
    allowed = _TOLERANCE.get(made.dtype, _ROUNDED) * max(1.0, float(theirs.abs().max()))
    if not off <= allowed:
        raise NotExportableError(
            f"the language model of {type(unwrap(model)).__name__} as a {type(made).__name__} gives other "
            f"logits (by {off:.2g}), so it cannot stand alone."
        )


__all__ = ["NotExportableError", "refusal", "text_model_of"]
