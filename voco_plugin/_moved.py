"""Old import paths that still work: one table, old → new, and the finder that reads it.

``import voco_plugin.isolation`` gives the very module ``voco_plugin.core.forward`` (the same object: classes
are the same, a patch is seen under both names) and a ``DeprecationWarning`` that names the new path. A
package's entry stands for everything in it. Public names (``voco_plugin.VoCoCache``, ``voco_plugin.metrics``,
…) are not here: they stay.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

_PACKAGE = "voco_plugin."

MOVED: dict[str, str] = {
    "agreement": "evaluation.agreement",
    "answering": "inference.answering",
    "attention": "core.attention",
    "attention.context": "core.forward",
    "attention.dense": "core.attention.interface",
    "benchmark.context": "benchmark.context_length",
    "benchmark.memory": "benchmark.peak_memory",
    "benchmark.record": "benchmark.result_file",
    "benchmark.stage_two": "benchmark.compare_stage_two",
    "benchmark.train": "benchmark.training_step",
    "block_embeddings": "core.block_embeddings",
    "boxes": "evaluation.boxes",
    "bulk": "store.bulk",
    "bulk.ahead": "store.bulk.prefetch",
    "bulk.series": "store.bulk.videos",
    "bulk.stage": "store.bulk.job",
    "cache.block": "cache.cache",
    "cache.files": "cache.file_format",
    "cache.frozen": "training.two_stage.frozen_blocks",
    "cache.groups": "cache.compress.batching",
    "cache.held": "training.two_stage.read_only_cache",
    "cache.last_layer": "cache.compress.last_rows",
    "cache.memory": "cache.compress.memory",
    "cache.pixels": "cache.compress.vision_inputs",
    "cache.plan": "cache.place.stage_two",
    "cache.recomputed": "training.two_stage.layer_checkpointing",
    "cache.record": "cache.file_format",
    "cache.recut": "cache.compress.num_voco_tokens",
    "cache.relocation": "cache.place.relocation",
    "cache.shard_folder": "store.shard_folder",
    "cache.shards": "store.shards",
    "cache.slots": "cache.compress.last_rows",
    "cache.stage_one": "cache.compress.stage_one",
    "cache.stage_two": "cache.place.stage_two",
    "cache.store": "store.store",
    "cache.store_care": "store.verify",
    "cache.store_env": "store.env",
    "cache.store_error": "store.int8_error",
    "cache.store_index": "store.index",
    "cache.store_keys": "store.keys",
    "cache.store_meta": "store.meta",
    "cache.store_names": "store.names",
    "cache.store_pages": "store.pages",
    "cache.store_put": "store.put",
    "cache.store_recency": "store.recency",
    "cache.store_series": "store.video_series",
    "cache.store_transfer": "store.transfer",
    "cache.store_view": "store.view",
    "cache.streamed": "training.two_stage.streamed",
    "cache.turns": "cache.place.rope_layout",
    "cache.voco_rows": "cache.compress.last_rows",
    "cache_state": "core.kv_cache",
    "cli.launch": "cli.accelerate_launch",
    "cli.registry": "cli.list_registry",
    "collator": "training.collator",
    "composition": "models.composition",
    "compressors": "models.compressors",
    "conversations": "data.conversations",
    "data.dataset_images": "store.sources.dataset_images",
    "data.gridworld": "gridworld.dataset",
    "data.gridworld_boxes": "gridworld.box_questions",
    "data.gridworld_levels": "gridworld.levels",
    "data.gridworld_questions": "gridworld.questions",
    "data.gridworld_scenes": "gridworld.scenes",
    "data.gridworld_video": "gridworld.video_dataset",
    "data.gridworld_video_guess": "gridworld.video_guess",
    "data.gridworld_video_questions": "gridworld.video_questions",
    "data.gridworld_video_scenes": "gridworld.video_scenes",
    "data.gridworld_words": "gridworld.words",
    "data.image_items": "store.sources.image_items",
    "data.image_sources": "store.sources.image_sources",
    "data.tar_images": "store.sources.tar_images",
    "data.trl_rows": "training.collator",
    "data.tiny_align": "gridworld.tiny_align",
    "data.tiny_parts": "gridworld.tiny_parts",
    "data.tiny_processor": "gridworld.tiny_processor",
    "data.tiny_vlm": "gridworld.tiny_vlm",
    "data.undecoded": "data.lazy_images",
    "data.video_formats": "video.dataset_rows",
    "data.video_qa": "evaluation.video_qa",
    "data.video_rows": "evaluation.video_rows",
    "data.video_sources": "store.sources.video_sources",
    "decoding": "inference.generate_from_blocks",
    "encoders": "models.encoders",
    "families": "models.families",
    "frame_order": "evaluation.frame_order",
    "generation": "inference.mixin",
    "images": "data.images",
    "injection": "core.injection",
    "intervals": "evaluation.intervals",
    "isolation": "core.forward",
    "judge": "evaluation.judge",
    "layout": "core.layout",
    "llms": "models.llms",
    "masks": "core.masks",
    "metrics": "evaluation.metrics",
    "modeling": "models",
    "modeling.tokens": "models.token_rows",
    "packed": "core.packed_rows",
    "packing": "core.packed_rows",
    "projectors": "models.projectors",
    "prompts": "inference.prompts",
    "ratios": "evaluation.ratios",
    "registration": "models.registration",
    "reporting": "evaluation.reporting",
    "reporting.bench_charts": "benchmark.charts",
    "reporting.study_charts": "evaluation.study.charts",
    "session": "inference.session",
    "session_file": "inference.session_file",
    "starting_weights": "core.adapter_switch",
    "study": "evaluation.study",
    "study.children": "evaluation.study.child_processes",
    "study.keys": "evaluation.study.run_keys",
    "training.blank": "training.token_counting",
    "training.distilling": "training.distillation.trainer_part",
    "training.divergence": "training.distillation.divergence",
    "training.frozen": "training.two_stage.frozen_checks",
    "training.lesson": "training.distillation.step",
    "training.models": "training.model_setup",
    "training.stages": "training.two_stage.trainer_part",
    "training.teacher": "training.distillation.teacher",
    "training.weights": "training.load_weights",
    "trl_rows": "training.collator",
    "video.budget": "inference.streaming.budget",
    "video.intake": "inference.streaming.buffer",
    "video.layout": "inference.streaming.video_prompt",
    "video.report": "inference.streaming.stream_report",
    "video.shots": "video.lazy_frames",
    "video.stage": "inference.streaming.compress_frames",
    "video.stills": "video.image_sequence",
    "video.watching": "inference.streaming.stream",
}
"""Old module → new module, both without ``voco_plugin.``."""

MOVED_NAMES: dict[str, dict[str, str]] = {
    "cache": {"VoCoCacheStore": "store", "image_key": "store", "quantization_error": "store"},
    "cache.file_format": {"cache_from_buffer": "cache.cache", "cache_to_bytes": "cache.cache"},
}
"""Names that a module which still exists gave away: module → name → where it is now."""


def new_path(old: str) -> str | None:
    """Where ``old`` (a dotted name within the package) is now; ``None`` where it never moved."""
    parts = old.split(".")
    for length in range(len(parts), 0, -1):
        found = MOVED.get(".".join(parts[:length]))
        if found is not None:
            return ".".join([found, *parts[length:]])
    return None


def moved_name(module: str, name: str) -> Any:
    """What ``module`` (a full dotted name) used to hold under ``name``: for its ``__getattr__``.

    Raises:
        AttributeError: it never held it.
    """
    place = MOVED_NAMES.get(module.removeprefix(_PACKAGE), {}).get(name)
    if place is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{_PACKAGE}{place}.{name}", 3)
    return getattr(importlib.import_module(_PACKAGE + place), name)


def renamed(module: str, **names: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for ``module``: each old name gives what has the new one, with a warning."""

    def old_name(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}", 3)
        return getattr(sys.modules[module], names[name])

    return old_name


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} has moved to {new}", DeprecationWarning, stacklevel=level)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """First on ``sys.meta_path``: a package under its old name has the new one's ``__path__``, where the
    finder of files would load each of its modules a second time.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        new = new_path(fullname[len(_PACKAGE) :]) if fullname.startswith(_PACKAGE) else None
        if new is None or importlib.util.find_spec(_PACKAGE + new) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=_PACKAGE + new, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        _warn(spec.name, spec.origin, 6)
        module = importlib.import_module(spec.origin)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run; but importlib has just given the module the old name's spec."""
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Let the table be asked (idempotent)."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
