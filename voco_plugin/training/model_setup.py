"""What a trainer starts from: its arguments, model and processor, attached and frozen as asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoProcessor, TrainingArguments
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..config import CONFIG_NAME, VoCoConfig
from ..core.attachment import attachment, is_attached, unwrap
from ..core.layout import TokenVocabulary
from ..models import attach, detach, load
from ..models.loading import auto_class
from ..models.snapshot import as_given_on_failure
from ..models.token_rows import restore_rows
from ..models.two_adapters import activate_both
from .config import VoCoSFTConfig, as_voco_config
from .grown_adapters import grown
from .parts import base_of, freeze, is_peft
from .quantization import language_model_only
from .rows import HoldRows


def as_voco_args(args: Any, model: Any) -> VoCoSFTConfig:
    if isinstance(args, VoCoSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return VoCoSFTConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-VoCo-SFT")
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}; give a VoCoSFTConfig.")
    values = args.to_dict()  # which hides whatever is named a token, TRL's eos_token among them
    return VoCoSFTConfig(**{k: getattr(args, k) if k.endswith("_token") else v for k, v in values.items()})


def load_model(source: str, args: VoCoSFTConfig, quantization_config: Any) -> tuple[Any, Any]:
    """The model at ``source``; its processor too where this package saved it, or it is an adapter (else
    ``None``)."""
    options = _init_kwargs(args)
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "quantization_config is given twice, in args.model_init_kwargs too; leave one out."
            )
        options["quantization_config"] = language_model_only(quantization_config, source, **options)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    of_ours = os.path.isfile(os.path.join(source, CONFIG_NAME))
    if not of_ours and not os.path.isfile(os.path.join(source, "adapter_config.json")):
        if args.voco is not None:
            known = {k: options[k] for k in ("revision", "trust_remote_code") if options.get(k)}
            auto_class(source, **known)  # refuses a model that sees no images
        return create_model_from_path(source, **options), None
    options.setdefault("dtype", "float32")
    model, processor = load(source, voco=as_voco_config(args.voco), **options)
    if not of_ours:
        model = _of_another_trainer(model, args)
    if is_peft(model):  # loaded for inference: train on
        if len(model.active_adapters) > 1:
            activate_both(model, train=True)
        else:
            model.set_adapter(model.active_adapter)
    return model.train(), processor


def _of_another_trainer(model: Any, args: VoCoSFTConfig) -> Any:
    """An adapter that was made without VoCo, loaded with it: as the run needs it."""
    if args.voco is None:  # to be trained on as it is
        return detach(model)
    return grown(model) if args.train_voco else model


def _init_kwargs(args: VoCoSFTConfig) -> dict[str, Any]:
    given = args.model_init_kwargs
    assert not isinstance(given, str), "TRL parses it when the arguments are made"
    return dict(given or {})


def check_backbone(model: Any) -> None:
    """Refuse a model whose backbone cannot be run below its LM head, as TRL's loss does.

    Raises:
        ValueError: the class has no such backbone (Llama 4 in transformers 5.23), or the model holds adapters
            and is not a ``PeftModel``: transformers' ``add_adapter`` put them in, or it was taken out of one.
    """
    if hasattr(model, "peft_config") and not is_peft(model):
        raise ValueError(
            "the model holds adapters and is not a PeftModel (transformers' add_adapter, or get_base_model): "
            "give the PeftModel itself, or the model without adapters and a peft_config."
        )
    inner = base_of(model)
    if inner.base_model is inner:
        raise ValueError(
            f"{type(inner).__name__} has no backbone of its own below its LM head, and TRL's loss runs just "
            "that; train it with another loop (model(**batch).logits is under the rule), or another model."
        )


@contextlib.contextmanager
def as_it_was_on_failure(model: Any, processor: Any) -> Iterator[None]:
    """Where the block raises, ``model`` is as it was given: attached or not, without an adapter that was made
    inside, what trained before training; and so is its processor.
    """
    inner = unwrap(model)
    config = attachment(inner).config if is_attached(inner) else None
    frozen_stage1 = config is not None and config.frozen_stage1
    if processor is None and config is not None:
        processor = attachment(inner).processor
    made: dict[str, Any] = {}
    try:
        with as_given_on_failure(inner, processor):
            try:
                yield
            finally:
                if config is None and is_attached(inner):
                    made = attachment(inner).restore
    except BaseException:
        if config is not None:
            config.frozen_stage1 = frozen_stage1
        elif "rows" in made and not made["rows"]["resized"]:
            restore_rows(inner, made["rows"])
        raise


def freeze_as_asked(model: Any, args: VoCoSFTConfig, vocab: TokenVocabulary | None) -> HoldRows | None:
    """What ``args`` leaves frozen in a model that trains without PEFT; what holds single rows, if any."""
    freeze(
        model,
        language=args.train_language,
        projector=args.train_projector,
        vision_tower=args.train_vision_tower,
        compressor=args.train_voco,
    )
    hold = None
    if vocab is not None and args.train_voco != args.train_language:
        hold = HoldRows(model, vocab.voco_id, only=args.train_voco)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing trains: train_language, train_projector, train_vision_tower and train_voco are all "
            "false, or train_voco alone is true and there are no VoCo tokens (voco: null); let a part train."
        )
    return hold


def processor_of(model: Any, args: VoCoSFTConfig) -> Any:
    """The processor the model was attached with, or the one saved next to its weights."""
    if is_attached(model) and attachment(model).processor is not None:
        return attachment(model).processor
    source = get_config_model_id(model.config)
    if not source:
        raise ValueError("the model was not loaded from a path; give its processor as processing_class.")
    options = {"revision": _init_kwargs(args).get("revision")}
    return AutoProcessor.from_pretrained(source, trust_remote_code=args.trust_remote_code, **options)


def attach_as_asked(model: Any, voco: VoCoConfig | None, processor: Any) -> VoCoConfig | None:
    """Attach ``model`` where asked and not done yet; the config in force, or ``None`` for a plain model."""
    if not is_attached(model):
        if voco is None:
            return None
        if is_peft(model):
            raise ValueError(
                "the model is a PeftModel without VoCo: the token's row must be there before PEFT; attach "
                "the base model first and give peft_config here."
            )
        attach(model, voco, processor=processor)
        return attachment(model).config
    state = attachment(model)
    if voco is not None:
        own, asked = state.config.to_dict(), voco.to_dict()
        asked.pop("frozen_stage1")  # the model's own affair (two_stage/trainer_part.py)
        different = [k for k in asked if asked[k] != own[k] and not (k == "token_id" and asked[k] is None)]
        if different:
            named = ", ".join(f"{k}={asked[k]!r} (attached: {own[k]!r})" for k in different)
            raise ValueError(
                f"args.voco differs from what the model is attached with: {named}; detach it first."
            )
    return state.config
