"""What is done with old files, through the public API: make.py notes what comes out, the test compares.

This code may follow the API. The files, and what is expected of them, may not change.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import LogitsProcessor, LogitsProcessorList
from voco_plugin.answering import compress_images, prompt
from voco_plugin.cache.shards import read_shards
from voco_plugin.cache.store_names import caches_by_name
from voco_plugin.images import open_image

import voco_plugin as vp
from voco_plugin.cli import main

BASES = {"adapter": "model", "frozen_adapter": "model", "pooled_adapter": "plain"}
"""The folders of adapters, and of the models they were trained on."""
QUESTIONS = ("what color is it", "is the square red", "what shape is blue")
NEW = {"max_new_tokens": 6, "do_sample": False}
PREFIX = vp.VoCoConfig(num_tokens=2, block_context="prefix")
Use = Callable[["Files"], dict[str, Any]]
USES: dict[str, Use] = {}
"""By name: loads some of the files, uses them, and gives tensors and plain values."""


def use(function: Use) -> Use:
    USES[function.__name__] = function
    return function


class Files:
    """A copy of the files that may be written to, and the models among them, each loaded once.

    Args:
        source: the folder of a version.
        work: where the copy goes; its adapters are told where their base is now.
    """

    def __init__(self, source: Path, work: Path) -> None:
        self.path = work
        shutil.copytree(source, work, dirs_exist_ok=True)
        for adapter, base in BASES.items():
            config = work / adapter / "adapter_config.json"
            values = json.loads(config.read_text(encoding="utf-8"))
            values["base_model_name_or_path"] = str(work / base)
            config.write_text(json.dumps(values), encoding="utf-8")
        self._loaded: dict[tuple[str, str], Any] = {}

    def load(self, name: str, voco: vp.VoCoConfig | None = None) -> tuple[Any, Any]:
        """Model and processor of a folder, under the rule it was saved with or under ``voco``."""
        key = name, repr(voco)
        if key not in self._loaded:
            self._loaded[key] = vp.load(self.path / name, voco=voco)
        return self._loaded[key]

    def image(self, name: str) -> Any:
        return open_image(self.path / "images" / f"{name}.png")

    def cache(self, name: str) -> vp.VoCoCache:
        return vp.VoCoCache.load(self.path / "caches" / f"{name}.safetensors")


class Steps(LogitsProcessor):
    """Notes the five largest logits of each step of ``generate``."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.topk(5, dim=-1).values)
        return scores

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate`` and of ``session.ask``."""
        return {"logits_processor": LogitsProcessorList([self]), **NEW}

    def stacked(self) -> torch.Tensor:
        """``(B, tokens, 5)``."""
        return torch.stack(self.seen, dim=1)


@torch.no_grad()
def read(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """One forward over ``inputs`` and greedy tokens after them.

    Returns:
        ``input_ids``; ``logits`` ``(B, 2, vocabulary)`` of the last tokens; ``new``, the ids generated,
        and ``steps`` ``(B, tokens, 5)``, the largest logits of each step.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    steps = Steps()
    ids = model.generate(**inputs, **steps.options())
    return {
        "input_ids": inputs["input_ids"].tolist(),
        "logits": inner(**inputs).logits[:, -2:],
        "new": ids[:, inputs["input_ids"].shape[1] :].tolist(),
        "steps": steps.stacked(),
    }


def read_cache(model: Any, processor: Any, *caches: vp.VoCoCache) -> dict[str, Any]:
    """Stage 2: a question after the blocks of each cache, in a row of its own."""
    return read(model, prompt(model, processor, QUESTIONS[: len(caches)], caches=caches))


def from_pixels(files: Files, name: str) -> dict[str, Any]:
    """Both stages on a checkpoint: two images compressed, and read."""
    model, processor = files.load(name)
    cache = vp.VoCoCache.cat(compress_images(model, processor, [files.image("a"), files.image("b")]))
    keys = torch.stack([torch.stack(block.keys) for block in cache])
    told = {
        k: v for k, v in cache.fingerprint.items() if k not in ("settings", "adapter_settings")
    }  # since then
    return {"keys": keys, "fingerprint": told, **read_cache(model, processor, cache)}


# -- checkpoints


@use
def model(files: Files) -> dict[str, Any]:
    """A whole model; and one masked pass over the question with its images."""
    tool, processor = files.load("model")
    inputs = prompt(tool, processor, QUESTIONS[:1], images=[[files.image("a"), files.image("b")]])
    with torch.no_grad():
        logits = tool(**inputs).logits[:, -2:]
    in_one_pass = {"in_one_pass": logits, "whole_input_ids": inputs["input_ids"].tolist()}
    return {**from_pixels(files, "model"), **in_one_pass}


@use
def pooled(files: Files) -> dict[str, Any]:
    """A whole model with the weights of token_init="pooled"."""
    return from_pixels(files, "pooled")


@use
def adapter(files: Files) -> dict[str, Any]:
    """A trainer's checkpoint: LoRA and the token's row, on a VoCo model."""
    return from_pixels(files, "adapter")


@use
def pooled_adapter(files: Files) -> dict[str, Any]:
    """LoRA, the token's row and a compressor, on a model that knows no VoCo token.

    The row below the trained one is made anew when it loads, a mean that CPUs of other kinds round otherwise;
    so the model's hash is left out here.
    """
    found = from_pixels(files, "pooled_adapter")
    del found["fingerprint"]["model"]
    return found


@use
def frozen_adapter(files: Files) -> dict[str, Any]:
    """LoRA that reads what the model below compresses."""
    return from_pixels(files, "frozen_adapter")


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, init_lora_weights="gaussian")


def trainer(base: Path, out: Path | str, **options: Any) -> Any:
    """The run that ``adapter`` is step 2 of, or one like it; ``base`` lies beside the images.

    Args:
        options: more of the trainer's arguments.
    """
    pictures = [str(base.parent / "images" / f"{name}.png") for name in "abc"]
    image = {"type": "image", "text": None}
    messages = [
        [
            {"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[row]}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": ("red", "blue circle", "green")[row]}],
            },
        ]
        for row in range(3)
    ]
    data = Dataset.from_dict({"messages": messages, "images": [[name] for name in pictures]})
    arguments = {
        "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 4,
        "save_strategy": "no", "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True,
        "gradient_checkpointing": False, "use_cpu": True, **options,
    }  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        return vp.VoCoSFTTrainer(
            os.fspath(base), args=vp.VoCoSFTConfig(str(out), **arguments),
            train_dataset=data.cast_column("images", List(Image())), peft_config=lora(),
        )  # fmt: skip


def log_of(made: Any) -> dict[str, list[float]]:
    """The loss of each step and the K drawn for it, those before a resume included."""
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in steps] for name in ("loss", "voco_tokens_per_sample")}


# -- caches


@use
def two_images(files: Files) -> dict[str, Any]:
    return read_cache(*files.load("model"), files.cache("two_images"))


@use
def two_images_moved(files: Files) -> dict[str, Any]:
    """The same file, its blocks in the other order, cut to one token each, in two rows."""
    cache = files.cache("two_images").reorder([1, 0]).first(1)
    return read_cache(*files.load("model"), cache, cache[:1])


@use
def two_images_behind_a_prefix(files: Files) -> dict[str, Any]:
    """The same file behind a prompt that was read before, with one image of its own."""
    model, processor = files.load("model")
    cache = files.cache("two_images")
    before = prompt(model, processor, QUESTIONS[1:2], caches=[cache[:1]])
    past = model.prefix_cache(**before)
    return read(model, {**prompt(model, processor, QUESTIONS[:1], caches=[cache]), "prefix_cache": past})


@use
def two_images_under_a_frozen_adapter(files: Files) -> dict[str, Any]:
    """The blocks of the model are those of an adapter that only reads."""
    return read_cache(*files.load("frozen_adapter"), files.cache("two_images"))


@use
def rows(files: Files) -> dict[str, Any]:
    """Several rows, one of them without an image, blocks of different K."""
    model, processor = files.load("model")
    cache = files.cache("rows")
    given = prompt(model, processor, QUESTIONS, caches=[cache.row(row) for row in range(cache.num_rows)])
    return {**read(model, given), "rows": list(cache.rows), "num_tokens": cache.num_tokens}


@use
def prefix(files: Files) -> dict[str, Any]:
    """Blocks that have seen the text before them, in the prompt they were made in."""
    model, processor = files.load("model", PREFIX)
    stream = json.loads((files.path / "caches" / "prefix.json").read_text(encoding="utf-8"))
    inputs = {name: torch.tensor(value) for name, value in stream.items()}
    return read(model, {**inputs, "voco_cache": files.cache("prefix")})


@use
def bfloat16(files: Files) -> dict[str, Any]:
    """A file of another dtype than the model's."""
    cache = files.cache("bfloat16")
    assert all(block.dtype == torch.bfloat16 for block in cache)
    return read_cache(*files.load("model"), cache.to(torch.float32))


@use
def empty(files: Files) -> dict[str, Any]:
    cache = files.cache("empty")
    return {"blocks": len(cache), "num_rows": cache.num_rows, "fingerprint": cache.fingerprint}


@use
def of_adapter(files: Files) -> dict[str, Any]:
    return read_cache(*files.load("adapter"), files.cache("of_adapter"))


@use
def of_pooled(files: Files) -> dict[str, Any]:
    return read_cache(*files.load("pooled"), files.cache("of_pooled"))


# -- stores and shards


@use
def store(files: Files) -> dict[str, Any]:
    """Images by content and by name, a video by name."""
    model, processor = files.load("model")
    with vp.VoCoCacheStore.for_model(files.path / "store", model) as kept:
        found = caches_by_name(kept, ["images/a.png", "frames"])
        facts = kept.stat()
        keys = list(kept)
        seen = {name: kept.key_of(files.image(name)) for name in "abc"}
        got = kept.get(seen["b"])
        with kept.view() as view:
            viewed = read_cache(model, processor, view[seen["c"]])
    return {
        **{name: facts[name] for name in ("records", "bytes", "max_bytes", "values", "fingerprint")},
        "keys": keys,
        "seen": seen,
        "blocks": [len(cache) for cache in found],
        **{f"by_name {name}": value for name, value in read_cache(model, processor, *found).items()},
        **{f"got {name}": value for name, value in read_cache(model, processor, got).items()},
        **{f"viewed {name}": value for name, value in viewed.items()},
    }


@use
def store_int8(files: Files) -> dict[str, Any]:
    """A store of 8 bits, with its measured error."""
    model, processor = files.load("model")
    with vp.VoCoCacheStore.for_model(files.path / "store_int8", model, readonly=True) as kept:
        facts = kept.stat()
        caches = kept.get_many(list(kept))
    return {"error": facts["error"], "values": facts["values"], **read_cache(model, processor, *caches)}


@use
def exported(files: Files) -> dict[str, Any]:
    """A store's records as files, in 8 bits: read as they are, and taken into a new store."""
    model, processor = files.load("model")
    folder = files.path / "exported"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    caches = [vp.VoCoCache.load(folder / f"{name}.safetensors") for name in names]
    with vp.VoCoCacheStore.for_model(files.path / "imported", model, values="int8") as kept:
        kept.import_(folder)
        keys = list(kept)
    return {"names": names, "keys": keys, **read_cache(model, processor, *caches)}


@use
def shards(files: Files) -> dict[str, Any]:
    items = list(read_shards(str(files.path / "shards")))
    caches = [item.cache for item in items][:2]
    return {
        "names": [item.name for item in items],
        "keys": [item.key for item in items],
        **read_cache(*files.load("model"), *caches),
    }


def compress_again(files: Files, *more: str) -> dict[str, Any]:
    """The report of ``voco compress`` of all images and the video, run in the copy's folder."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(io.StringIO()):
        status = main(["compress", "./model", *more, "--json"])
    assert status == 0, written.getvalue()
    return json.loads(written.getvalue())


# -- sessions


@use
def session(files: Files) -> dict[str, Any]:
    """A conversation of two turns and an image that waits for the third; goes on, and forks."""
    model, processor = files.load("model")
    talk = vp.VoCoSession.load(files.path / "session.safetensors", model, processor)
    held = {name: getattr(talk, name) for name in ("num_images", "num_slots", "nbytes")}
    messages = list(talk.messages)
    other = talk.fork()
    steps = [Steps() for _ in range(3)]
    answers = [talk.ask(QUESTIONS[0], **steps[0].options())]
    answers.append(talk.add(files.image("a")).ask(QUESTIONS[1], **steps[1].options()))
    answers.append(other.ask(QUESTIONS[2], **steps[2].options()))
    return {
        "messages": messages,
        **held,
        "answers": answers,
        **{f"{number} steps": step.stacked() for number, step in enumerate(steps)},
    }
