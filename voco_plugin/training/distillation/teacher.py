"""The teacher of a distillation: LM_o of Eq. 1, the plain model that sees every vision token.

    base      the student itself, its adapter switched off: no second model in memory
    frozen    a copy of the student as it was when training started
    PATH      another checkpoint of the same family, tokenizer and image processor

Whichever it is, it reads with the rule lifted (:data:`~voco_plugin.core.forward.UNTOUCHED`), without dropout
and without a graph; what it changes on a shared model is put back.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..._compat import is_partitioned
from ...config import CONFIG_NAME
from ...core.attachment import attachment, evaluating, is_attached, unwrap
from ...core.extension import Extension, extend
from ...core.forward import UNTOUCHED
from ...core.layout import TokenVocabulary
from ...core.peft_layers import what_changed_the_base
from ...models.loading import auto_class, find_file, load
from ..parts import COMPRESSOR, ModelParts
from .config import DistillConfig
from .divergence import Head


class Teacher:
    """Reads prompts as the plain model.

    Attributes:
        model: the transformers model inside its wrappers.
        rows: rows of its vocabulary before VoCo's were added, as far as is known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.rows = original_rows(self.model)

    @torch.no_grad()
    def read(self, inputs: dict[str, Any], **head: bool) -> tuple[Any, Head]:
        """The backbone's output for ``inputs``, and the head that goes with it (``head``: of ``Head.of``)."""
        with evaluating(self.model):
            return self._run(inputs), Head.of(self.model, **head)

    def _run(self, inputs: dict[str, Any]) -> Any:
        return read_untouched(self.model, inputs)


class BaseTeacher(Teacher):
    """The student without its adapter.

    Args:
        wrapped: the ``PeftModel`` around the student, or the student where its VoCo row alone trains.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(wrapped)
        self.wrapped = wrapped

    def _run(self, inputs: dict[str, Any]) -> Any:
        with adapters_off(self.wrapped):
            return super()._run(inputs)


class OtherTeacher(Teacher):
    """A model of its own, which never trains.

    Args:
        module: the model, wrapped (PEFT, a DeepSpeed engine) or not. Its forward becomes its backbone's
            (:class:`Headless`), so that a wrapper's forward makes no logits.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module = module
        self.model.eval().requires_grad_(False)  # an engine's own methods return nothing
        extend(self.model, Headless)

    def _run(self, inputs: dict[str, Any]) -> Any:
        return self.module(**inputs)


class Headless(Extension):
    """What a teacher of its own is extended by: its forward is its backbone's, as the plain model reads."""

    def forward(self, **inputs: Any) -> Any:
        return read_untouched(self, inputs)  # type: ignore[arg-type]


def read_untouched(model: Any, inputs: dict[str, Any]) -> Any:
    """The output of the backbone of ``model``, as it was before :func:`voco_plugin.attach`."""
    if not is_attached(model):
        return model.base_model(**inputs)
    return model.base_model(**inputs, voco_mode=UNTOUCHED)


def original_rows(model: nn.Module) -> int | None:
    """The vocabulary's rows before :func:`voco_plugin.attach` added any to ``model``; ``None`` where it added
    none here.
    """
    record = attachment(model).restore.get("rows") if is_attached(model) else None
    return record["rows"] if record and record["resized"] else None


# -- what a shared model must look like meanwhile
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A ``PeftModel`` without its adapters inside the block; any other model as it is.

    PEFT lets every adapter's weights train when it switches them on again, also those that were frozen: what
    trained before trains after.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, did in trains:
            if parameter.requires_grad != did:
                parameter.requires_grad_(did)


# -- which teacher
# ------------------------------------------------------------------------------------------------------------


class Witness:
    """A few values of every weight of a model, to tell later whether it was written to.

    Args:
        model: before it is wrapped in PEFT. A weight that ZeRO-3 has split has no values here.
    """

    SAMPLE = 256

    def __init__(self, model: nn.Module) -> None:
        self.seen = [(name, p, self._values(p)) for name, p in model.named_parameters()]

    def changed(self) -> str | None:
        """The name of a weight whose values are others now, or ``None``. Its dtype may be another."""
        for name, parameter, values in self.seen:
            now = self._values(parameter)
            if values is not None and now is not None and not torch.equal(values, now):
                return name
        return None

    def _values(self, parameter: torch.Tensor) -> torch.Tensor | None:
        if is_partitioned(parameter) or not parameter.is_floating_point() or parameter.is_meta:
            return None
        flat = parameter.detach().reshape(-1)
        return flat[:: max(1, flat.numel() // self.SAMPLE)].float().cpu()


def check_base(
    model: nn.Module, config: DistillConfig, row_only: bool, before: Witness | None = None
) -> None:
    """Refuse ``teacher: base`` where switching the adapter off does not give the original model back.

    Args:
        model: the trainer's, PEFT-wrapped or not.
        row_only: whether of the input embeddings only the VoCo token's row moves.
        before: of the model before its adapter was made, where that was done here.

    Raises:
        ValueError: weights train that no adapter holds, or making the adapter changed those under it.
    """
    way_out = "set distill.teacher to frozen (a copy in memory) or to a checkpoint"
    inner = unwrap(model)
    if hasattr(model, "disable_adapter"):
        reason = what_changed_the_base(model.peft_config)
        written = before.changed() if before is not None else None
        if written is not None and reason is None:
            reason = "making it"
        if reason is not None and not reason.startswith("bias"):  # which trains in place: said below
            raise ValueError(
                f"distill.teacher='base' switches the adapter off, and {reason} has changed the weights "
                f"under it{f' ({written})' if written else ''}, so that is not the model training starts "
                f"from; set init_lora_weights=True, or {way_out}."
            )
        own = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens_")
        for name, parameter in inner.named_parameters():
            if parameter.requires_grad and not any(part.startswith(own) for part in name.split(".")):
                raise ValueError(
                    f"distill.teacher='base' switches the adapter off, and {name} trains in place beside it; "
                    f"{way_out}."
                )
        return
    parts, rows = ModelParts(inner), inner.get_input_embeddings().weight
    for name, parameter in inner.named_parameters():
        harmless = parameter is rows and row_only and not config.teacher_tokens
        if parameter.requires_grad and not harmless and parts.of(name) != COMPRESSOR:
            raise ValueError(
                f"distill.teacher='base' needs an adapter to switch off, and the model's own weights train "
                f"({name}); use LoRA (use_peft), or {way_out}."
            )


def load_teacher(
    student: nn.Module, processor: Any, vocab: TokenVocabulary, config: DistillConfig, trust_remote_code: bool
) -> nn.Module:
    """The checkpoint that ``config.teacher`` names, checked to take the student's batches as they are.

    Raises:
        FileNotFoundError: a folder that does not exist.
        ValueError: family, tokenizer or image processor are others; the message says which.
    """
    name = f"distill.teacher={config.teacher!r}"
    source = os.path.expanduser(config.teacher)
    looks_local = source.startswith((".", "/")) or source.count("/") > 1 or source.endswith(os.sep)
    if looks_local and not os.path.isdir(source):
        raise FileNotFoundError(f"{name} does not exist; give a checkpoint folder, a hub id, base or frozen.")
    inner = unwrap(student)
    model, other = _load(source, inner.dtype, trust_remote_code)
    teacher = unwrap(model)
    mine, its = inner.config.model_type, teacher.config.model_type
    if mine != its:
        raise ValueError(f"{name} is a {its} model and the student a {mine} one, which takes other inputs.")
    _check_tokenizers(name, processor, other, vocab, config.teacher_tokens)
    pictures = [getattr(p, "image_processor", None) for p in (processor, other)]
    values = [{} if p is None else _settings(p) for p in pictures]
    different = sorted(k for k in {**values[0], **values[1]} if values[0].get(k) != values[1].get(k))
    if different:
        key = different[0]
        raise ValueError(
            f"{name} prepares images another way: {key}={values[1].get(key)!r}, here {values[0].get(key)!r}; "
            "one batch serves both, so take a checkpoint with the same image processor."
        )
    if config.teacher_tokens and is_attached(teacher) and attachment(teacher).config.makes_embeddings:
        raise ValueError(
            f"{name} makes its VoCo tokens' embeddings with a compressor, and a teacher reads without one; "
            "leave distill.teacher_tokens out."
        )
    return model


def _load(source: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    """Model and processor of a checkpoint: VoCo or an adapter where it has them, else the plain model."""
    from transformers import AutoProcessor

    options = {"trust_remote_code": trust_remote_code}
    if any(find_file(source, name) for name in (CONFIG_NAME, "adapter_config.json")):
        return load(source, dtype=dtype, **options)
    model = auto_class(source, **options).from_pretrained(source, dtype=dtype, **options)
    return model, AutoProcessor.from_pretrained(source, **options)


def _check_tokenizers(
    name: str, processor: Any, other: Any, vocab: TokenVocabulary, teacher_tokens: bool
) -> None:
    """Every token but the VoCo token must have the same id on both sides; that one too, where it is read."""
    mine, its = (getattr(p, "tokenizer", p).get_vocab() for p in (processor, other))
    own = {token for token, number in mine.items() if number == vocab.voco_id}
    compared = {**mine, **its}
    if not teacher_tokens:
        compared = {token: number for token, number in compared.items() if token not in own}
    for token in sorted(compared):
        if mine.get(token) != its.get(token):
            seen = [f"id {v[token]}" if token in v else "no token" for v in (its, mine)]
            raise ValueError(
                f"{name} has another tokenizer: {token!r} is {seen[0]} there and {seen[1]} here; the teacher "
                "must know the same tokens by the same ids."
            )


def _settings(image_processor: Any) -> dict[str, Any]:
    """What an image processor does, without where it came from or which of its classes it is."""
    values = json.loads(json.dumps(image_processor.to_dict(), default=str))  # lists, whatever they are here
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in _NAMES_OF_CLASSES}


_NAMES_OF_CLASSES = ("image_processor_type", "processor_class", "data_format", "device", "return_tensors")
