"""The model card of a checkpoint folder, generated from the run: metadata the hub takes, and how to load it.

TRL writes a card into the output folder and PEFT one into each adapter folder. Both say what is known of any
model; :func:`extend_card` keeps their tags and replaces the rest. No network is asked for anything.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import VoCoConfig
from ..files import atomic_write_text
from .packing import PackedDataset
from .parts import is_peft

logger = logging.getLogger(__name__)

CARD = "README.md"
_TEMPLATE = Path(__file__).parent / "model_card.md"
_LIBRARIES = ("voco_plugin", "transformers", "trl", "peft", "torch", "accelerate", "datasets")
_SECRET_KEY = re.compile(r"^--.*(hub_token|auth_token|access_token|password|secret|api_?key)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf|sk|ghp)_[A-Za-z0-9]{8,}")
_RULE_FIELDS = ("num_tokens", "rule", "block_context", "positions", "hide_prefix", "block_sink")
_STAGES = {
    "compress": "the adapter acts on images alone and is never merged: text is read with the base model",
    "separate": "two adapters, one for images and one for text (in the folder read), which are never merged",
}
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed",
)  # fmt: skip


def launch_command(argv: Sequence[str] | None = None) -> str:
    """The command this process was started with, as one types it; tokens and passwords are left out."""
    program, *rest = list(sys.argv if argv is None else argv) or ["python"]
    name = Path(program).name
    if name == "__main__.py" and Path(program).parent.name == "voco_plugin":
        words = ["voco"]
    elif name == "__main__.py":
        words = ["python", "-m", Path(program).parent.name]
    elif name.endswith(".py") or name in ("-c", "-m", ""):
        words = ["python", name or "-"]
    else:
        words = [name]
    if rest[-2:] == ["--accelerate_config", "null"]:  # what `voco train` adds for its child processes
        rest = rest[:-2]
    home = os.path.expanduser("~") + os.sep
    hidden = False
    for word in rest:
        key, equals, _ = word.partition("=")
        secret = bool(_SECRET_KEY.match(key))
        if hidden and not word.startswith("--"):
            word = "…"
        elif secret and equals:
            word = f"{key}=…"
        hidden = secret and not equals
        words.append(_SECRET_VALUE.sub("…", word).replace(home, "~/"))
    return " ".join(word if "…" in word else shlex.quote(word) for word in words)


def hub_id(name: Any) -> str | None:
    """``name`` where the hub would take it for a repository: not a local folder or file, of one or two
    parts.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def license_of(base: str | None) -> dict[str, str]:
    """The licence fields of a base model's own card, where it can be read; else a pointer to the model."""
    from huggingface_hub import try_to_load_from_cache

    card: Any = None
    if base and os.path.isdir(base):
        card = os.path.join(base, CARD)
    elif (repository := hub_id(base)) is not None:
        card = try_to_load_from_cache(repository, CARD)
    if isinstance(card, str) and os.path.isfile(card):
        data = _metadata(card)
        found = {
            k: data[k] for k in ("license", "license_name", "license_link") if isinstance(data.get(k), str)
        }
        if "license" in found:
            return found
    link = {"license_link": f"https://huggingface.co/{base}"} if hub_id(base) else {}
    return {"license": "other", "license_name": "as-the-base-model", **link}


def write_card(
    trainer: Any, folder: str | os.PathLike, *, name: str | None, dataset_name: str | None
) -> Path:
    """The card of ``folder``, a checkpoint of ``trainer``, from what the trainer knows of its run.

    Args:
        name: what the card calls the model; ``None`` takes the hub id's last part, or the folder's name.
        dataset_name: hub id or path of the training data.
    """
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = model.active_peft_config if is_peft(model) else None
    base = getattr(adapter, "base_model_name_or_path", None) or getattr(model.config, "_name_or_path", None)
    repository = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name
    arguments = {key: getattr(args, key) for key in _ARGUMENTS}
    arguments = {key: getattr(value, "value", value) for key, value in arguments.items()}
    arguments["optimizer steps done"] = state.global_step
    if args.world_size > 1:
        arguments["processes"] = args.world_size
    if getattr(args, "distill", None) is not None:
        arguments["distillation"] = args.distill.summary()
    arguments["what trains"] = getattr(trainer, "trainable_report", None)
    data = trainer.train_dataset
    if isinstance(data, PackedDataset):
        arguments["packing"] = f"{len(data):,} rows of up to {args.max_length:,} tokens"
        data = data.rows
    rows = len(data) if hasattr(data, "__len__") else None
    return extend_card(
        folder,
        name=name or str(repository).split("/")[-1],
        repository=str(repository),
        base=base or None,
        voco=trainer.voco,
        method=None if adapter is None else str(getattr(adapter.peft_type, "value", adapter.peft_type)),
        data={"name": dataset_name, "rows": rows},
        arguments={key: value for key, value in arguments.items() if value is not None},
        metrics=last_metrics(state.log_history),
        command=trainer.command or launch_command(),
        num_tokens_range=getattr(args, "num_tokens_range", None),
        tags=["generated_from_trainer", *trainer._tag_names],
    )


def last_metrics(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last training loss, and the results of the last evaluation, of a trainer's log."""
    found: dict[str, Any] = {}
    for entry in log:
        if "loss" in entry:
            found["training loss (last logged)"] = entry["loss"]
        results = {k: v for k, v in entry.items() if k.startswith("eval_") and isinstance(v, (int, float))}
        speeds = ("_runtime", "_per_second", "_num_tokens")
        found |= {k: v for k, v in results.items() if not k.endswith(speeds)}
    return found


def extend_card(
    folder: str | os.PathLike,
    *,
    name: str,
    repository: str,
    base: str | None,
    voco: VoCoConfig | None,
    method: str | None,
    data: Mapping[str, Any],
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
    command: str,
    num_tokens_range: Sequence[int] | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write ``README.md`` of a checkpoint folder; tags of a card that is there are kept.

    Args:
        name: what the card calls the model.
        repository: what its snippets load, a hub id or a folder's name.
        base: hub id or folder of the base model; a folder is not put into the metadata, which the hub would
            refuse, and only its last name is told.
        voco: the rule; ``None`` for a plain model.
        method: the PEFT method of an adapter; ``None`` for whole weights.
        data: ``name`` of the training data where known, and ``rows``.
        arguments: what of the training arguments to tell.
        metrics: last losses and evaluation results.
        command: how the run was started.
        num_tokens_range: of elastic training.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / CARD
    before = _metadata(path)
    base_id, dataset = hub_id(base), hub_id(data.get("name"))
    tags_before = before.get("tags") or []
    kept = {
        t for t in tags_before if isinstance(tags_before, list) and not t.startswith("base_model:")
    }  # PEFT's may be a folder
    kept |= {"voco_plugin", *tags, *(["voco"] if voco else [])}
    licence: dict[str, Any] = license_of(base)
    metadata = ModelCardData(
        base_model=base_id,
        base_model_relation=None if base_id is None else "adapter" if method else "finetune",
        library_name="peft" if method else "transformers",
        pipeline_tag="image-text-to-text",
        datasets=[dataset] if dataset else None,
        tags=sorted(kept | ({f"base_model:adapter:{base_id}"} if base_id and method else set())),
        **licence,
    )
    short = Path(base).name if base else "a model in memory"
    link = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"`{short}`"
    versions = {lib: found for lib in _LIBRARIES if (found := _version(lib))}
    told = data.get("name")
    source = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else None
    source = source or (f"`{Path(str(told)).name}`" if told else None)
    rows = [
        ("data", ", ".join(filter(None, [source, f"{data['rows']:,} rows" if data.get("rows") else None]))),
        *((key, f"`{arguments[key]}`") for key in _ARGUMENTS if arguments.get(key) not in (None, -1)),
        *((key, f"`{value}`") for key, value in arguments.items() if key not in _ARGUMENTS),
    ]
    rule = []
    tokens = ""
    if voco is not None:
        values = voco.to_dict()
        rule = [(key, values[key]) for key in _RULE_FIELDS]
        tokens = str(voco.num_tokens)
        if voco.frozen_stage1:
            rule.append(("frozen_stage1", "True (images are compressed without the adapter)"))
        if voco.adapter_stages in _STAGES:
            rule.append(("adapter_stages", f"{voco.adapter_stages} ({_STAGES[voco.adapter_stages]})"))
        if num_tokens_range:
            rule.insert(1, ("num_tokens_range", list(num_tokens_range)))
            tokens = f"{num_tokens_range[0]} to {num_tokens_range[1]}"
    card = ModelCard.from_template(
        metadata,
        template_str="---\n{{ card_data }}\n---\n\n" + _TEMPLATE.read_text(encoding="utf-8"),
        name=name, base=short, base_link=link, local_base=bool(base) and base_id is None,
        adapter=method, voco=voco, tokens=tokens, rule=rule,
        load_voco=_load_voco(repository, voco, method, base_id or short),
        load_plain=_load_plain(repository, voco, method, base_id or short),
        training=rows, command=command, versions=versions,
        metrics=[(key, _number(value)) for key, value in metrics.items()],
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", str(card))
    atomic_write_text(path, text.rstrip() + "\n")
    return path


def _metadata(card: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a card; none where there is no card, or where it cannot be read."""
    from huggingface_hub import ModelCard

    if not os.path.isfile(card):
        return {}
    try:
        return ModelCard.load(os.fspath(card), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # a card someone wrote by hand must not cost a checkpoint
        logger.warning("the metadata of %s cannot be read (%s); it is not used.", card, error)
        return {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(library), "__version__", None)  # a checkout that is not installed


def _load_voco(repository: str, voco: VoCoConfig | None, method: str | None, base: str) -> str:
    if voco is None:
        return _load_plain(repository, voco, method, base)
    return "\n".join(
        [
            "import voco_plugin as vp",
            "",
            f'model, processor = vp.load("{repository}")',
            "",
            "# inputs = processor(images=image, text=…, return_tensors='pt')",
            "# inputs = model.insert_voco_tokens(inputs)",
            "# cache = model.compress(**inputs)  # once an image; cache.save(…) keeps it",
            "# ids = model.generate(**model.stream_inputs(inputs), voco_cache=cache)",
        ]
    )


def _load_plain(repository: str, voco: VoCoConfig | None, method: str | None, base: str) -> str:
    if method is None:
        return "\n".join(
            [
                "from transformers import AutoModelForImageTextToText, AutoProcessor",
                "",
                f'model = AutoModelForImageTextToText.from_pretrained("{repository}")',
                f'processor = AutoProcessor.from_pretrained("{repository}")',
            ]
        )
    if voco is not None and voco.adapter_stages == "separate":
        return _load_voco(repository, voco, method, base)  # which puts two adapters on
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
    ]
    if voco is not None:
        lines.insert(2, "import voco_plugin as vp")
        lines.insert(2, "")
    lines += [
        f'model = AutoModelForImageTextToText.from_pretrained("{base}")',
        f'processor = AutoProcessor.from_pretrained("{base}")',
    ]
    if voco is not None:
        plain = VoCoConfig(rule=voco.rule, block_context=voco.block_context)
        values = {
            f.name: getattr(voco, f.name)
            for f in fields(voco)
            if getattr(voco, f.name) != getattr(plain, f.name) or f.name in ("num_tokens", "rule")
        }
        if voco.block_context != "self":
            values["block_context"] = voco.block_context
        values.pop("token_id", None)
        written = ", ".join(f"{key}={value!r}" for key, value in values.items())
        lines.append(f"vp.attach(model, vp.VoCoConfig({written}), processor=processor)")
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(model, "{repository}").eval()'])
