"""``load``: an existing VLM, a saved VoCo model, or a LoRA checkpoint, by path or hub id alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from .._compat import former_names_are_fine
from ..config import CONFIG_NAME, VoCoConfig
from ..core.adapter_stages import BOTH, SEPARATE, act_by_stage
from ..core.attachment import attachment, unwrap
from ..core.block_embeddings import NAME
from ..core.layout import TokenVocabulary
from ..inference.modeling_file import names_our_file
from .answer_ends import answer_end, stop_at
from .attaching import attach
from .compressor_weights import expected_by, load_compressor, read_compressor
from .model_paths import base_of_adapter, check_model_path, named, note_base
from .two_adapters import load_both
from .voco_processor import VoCoProcessor, saved_mark

HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
"""Options of ``from_pretrained`` that say where files are; the processor and the rule are there too."""


def save_voco_config(
    model: torch.nn.Module, folder: str | os.PathLike, *, place: str | os.PathLike | None = None
) -> Path:
    """Write ``voco_config.json`` of an attached model into ``folder``: the rule and the ids it is read by.
    An adapter that was saved there before gets the place of its base in it, absolute and as seen from the
    adapter.

    Args:
        place: where ``folder`` will be when it is finished; itself where left out.
    """
    path = attachment(model).save(folder)
    note_base(folder, place)
    return path


def find_file(source: str, name: str, **hub: Any) -> str | None:
    """A file of a local folder or a hub repository; ``None`` where it has none."""
    if os.path.isdir(source):
        path = Path(source) / name
        return str(path) if path.is_file() else None
    from transformers.utils import cached_file

    with named(source):
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def _adapter_folder(source: str) -> str:
    """Where the adapter of a checkpoint is: in ``source``, or, where PEFT saved one that is not called
    ``default``, in the folder of its name below.

    Raises:
        ValueError: there are several.
    """
    if not os.path.isdir(source) or any(
        find_file(source, name) for name in ("adapter_config.json", "config.json")
    ):
        return source
    below = sorted(str(p.parent) for p in Path(source).glob("*/adapter_config.json"))
    below = [folder for folder in below if not Path(folder).name.startswith(("_", "checkpoint-"))]
    if len(below) > 1:
        raise ValueError(
            f"{source} holds the adapters {', '.join(Path(folder).name for folder in below)}; load one of "
            "them, with the processor and voco_config.json beside it."
        )
    return below[0] if below else source


def _made_alike(config: VoCoConfig, saved: VoCoConfig) -> bool:
    """Whether both say the same of how the VoCo tokens' embeddings are made."""
    fields = ("compressor", "compressor_options", "token_init")
    return all(getattr(config, name) == getattr(saved, name) for name in fields)


def _check_stages(source: str, voco: VoCoConfig, saved: VoCoConfig) -> None:
    """Refuse to let an adapter act on other tokens than it was trained on."""
    if voco.adapter_stages not in (BOTH, saved.adapter_stages):
        raise ValueError(
            f"the adapter at {source} was trained with adapter_stages={saved.adapter_stages!r}, not "
            f"{voco.adapter_stages!r}; leave adapter_stages out, or train a new adapter on its base."
        )


def auto_class(source: str, **options: Any) -> Any:
    """The auto class that loads the checkpoint: a few vision-language models (Phi-4) are registered as causal
    language models only.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    with named(source):
        config = AutoConfig.from_pretrained(source, **options)
    known = type(config) in AutoModelForImageTextToText._model_mapping
    if not known and hasattr(config, "vision_config") and type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if not known:
        check_sees_images(source, config)
    return AutoModelForImageTextToText


def check_sees_images(source: str, config: Any) -> None:
    """Refuse a language model without an image encoder.

    Raises:
        ValueError: the message says how it gets one.
    """
    from transformers import AutoModelForCausalLM

    text_only = config.get_text_config() is config and not hasattr(config, "vision_config")
    if text_only and type(config) in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"model {source} is a language model of text alone ({config.model_type}) and has no image "
            f"encoder. Compose one: in a recipe, model: {{encoder: clip_vit_l_14_336, llm: {source}, "
            "projector: mlp2x_gelu} in the place of model_name_or_path; in Python, vp.compose(encoder, llm)."
        )


def trusts_code_of_others(source: str, trust_remote_code: bool = False, **options: Any) -> bool:
    """``trust_remote_code`` for whoever loads the plain model at ``source``: not where the code is our own,
    which would attach it.
    """
    files = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return trust_remote_code and not names_our_file(find_file(source, "config.json", **files))


def load(
    source: str | os.PathLike,
    voco: VoCoConfig | dict | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    inserting: bool | None = None,
    **model_kwargs: Any,
) -> tuple[torch.nn.Module, Any]:
    """Load a model with VoCo attached, and its processor.

    Args:
        source: path or hub id of an existing VLM, of a model saved by this package, or of a PEFT adapter
            trained by it (its base model is loaded from where ``adapter_config.json`` says).
        voco: the rule for an existing VLM; for a saved model, ``None`` keeps the rule it was saved with, and
            a config given here replaces it (another K or rule on the same weights; ``frozen_stage1`` stays
            what it was).
        dtype: of the weights; ``None`` keeps the checkpoint's.
        device: where to put the model.
        revision: of a hub id: branch, tag or commit.
        trust_remote_code: whether code that a checkpoint brings may run.
        inserting: whether the processor puts VoCo tokens in (:class:`~voco_plugin.VoCoProcessor`); ``None``:
            whether the one that was saved there did.
        model_kwargs: passed to ``from_pretrained`` (``device_map``, ``quantization_config``, …); those that
            say where files are (``token``, ``cache_dir``, ``local_files_only``, …) hold for the processor,
            too.

    Returns:
        ``(model, processor)``; the model is in eval mode.

    Raises:
        FileNotFoundError: the path does not exist, or an adapter's base model is gone.
        ValueError: the model cannot take the rule.
    """
    from transformers import AutoProcessor

    source = os.path.expanduser(os.fspath(source))
    hub = {name: model_kwargs.pop(name) for name in HUB_OPTIONS if model_kwargs.get(name) is not None}
    if revision:
        hub["revision"] = revision
    if "subfolder" in hub and os.path.isdir(source):
        source = os.path.join(source, hub.pop("subfolder"))
    check_model_path(source)
    if isinstance(voco, dict):
        voco = VoCoConfig.from_dict(voco)
    saved, vocabulary, make_row = None, None, None
    config_file = find_file(source, CONFIG_NAME, **hub)
    if config_file is not None:
        saved, extra = VoCoConfig.load(Path(config_file).parent)
        vocabulary = TokenVocabulary.from_dict(extra["vocabulary"]) if "vocabulary" in extra else None
    adapter = _adapter_folder(source)
    adapter_file = find_file(adapter, "adapter_config.json", **hub)
    common = {"trust_remote_code": trust_remote_code, **hub}
    if dtype is not None:
        common["dtype"] = dtype
    base = source
    if adapter_file is not None:
        base = base_of_adapter(source, adapter_file)
        check_model_path(base, f"the base of {source},")
        common = {k: v for k, v in common.items() if k not in ("revision", "subfolder")}
    remote = {k: v for k, v in common.items() if k != "dtype"}
    loader = auto_class(base, **remote)
    common["trust_remote_code"] = trusts_code_of_others(base, **remote)
    with named(source):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
    if voco is not None and saved is not None and adapter_file is not None:
        _check_stages(source, voco, saved)
    config = voco or saved or VoCoConfig()
    if saved is not None and voco is not None:
        if voco.frozen_stage1 and not saved.frozen_stage1:
            raise ValueError(
                f"{source} was not trained with stage1: frozen, so it compresses with all its weights; leave "
                "frozen_stage1 out."
            )
        # facts of the weights, whatever rule they are read under
        names = ["token", "token_id", "frozen_stage1", *(["adapter_stages"] if adapter_file else [])]
        facts = {name: getattr(saved, name) for name in names}
        config = VoCoConfig.from_dict({**voco.to_dict(), **facts})
    same = saved is not None and _made_alike(config, saved)
    asked = config.num_tokens
    if saved is not None and same and config.makes_embeddings:  # built with the K it was trained with
        config = dataclasses.replace(config, num_tokens=saved.num_tokens)
    with expected_by(loader, base, config.makes_embeddings, **remote):
        model = loader.from_pretrained(base, **common, **model_kwargs)
    if adapter_file is not None and find_file(base, CONFIG_NAME) is None:
        make_row = extra.get("row_made") if saved is not None else None
    if saved is not None and config.block_sink != saved.block_sink:
        vocabulary = None
    attach(model, config, processor, vocabulary=vocabulary, initialize_token=make_row)
    attachment(model).config.num_tokens = asked
    if adapter_file is not None and saved is not None and not same:
        raise ValueError(
            f"the adapter at {source} was trained with compressor={saved.compressor!r}, "
            f"token_init={saved.token_init!r}; leave voco out, or give a config with these."
        )
    if hasattr(model, NAME) and same:
        own = {k: v for k, v in hub.items() if adapter_file is None}
        found = read_compressor(lambda name: find_file(base, name, **own))
        if found or adapter_file is None:  # an adapter brings its own
            load_compressor(model, found, base)
    if adapter_file is not None:
        from peft import PeftModel

        with former_names_are_fine():
            if config.adapter_stages == SEPARATE:
                model = load_both(model, adapter, **hub)
            else:
                model = PeftModel.from_pretrained(model, adapter, **hub)
        if config.adapter_stages != BOTH:
            act_by_stage(unwrap(model), config.adapter_stages, attachment(model).vocab.voco_id)
        # the template it was tuned with may end answers with another token than the base's own
        end = answer_end(processor, getattr(processor, "chat_template", None))
        stop_at(unwrap(model).generation_config, None if end is None else end.token_id)
    if device is not None:
        model = model.to(device)
    mark = saved_mark(source, trust_remote_code=trust_remote_code, **hub) if inserting is not False else None
    if inserting or (inserting is None and mark is not None):
        processor = VoCoProcessor(processor, model, None if mark is None else mark["num_tokens"])
    return model.eval(), processor
