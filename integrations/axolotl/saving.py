"""axolotl's trainer, whose checkpoints load with ``voco_plugin.load``."""

from __future__ import annotations

import functools
import os
from typing import Any

import voco_plugin as vp
from voco_plugin.training.adapters import small_checkpoints


def save_rule(model: Any, folder: str | os.PathLike) -> None:
    """``voco_config.json`` and the processor that knows the VoCo token, beside what is in ``folder``."""
    vp.save_voco_config(model, folder)
    processor = vp.attachment(model).processor
    if processor is not None:
        processor.save_pretrained(folder)


def save_final(model: Any, folder: str | os.PathLike) -> None:
    """What axolotl saved at the end, with an adapter that holds rows and no whole embeddings."""
    if hasattr(model, "peft_config"):
        with small_checkpoints(model):
            model.save_pretrained(folder)
    save_rule(model, folder)


@functools.cache
def trainer_class() -> type:
    """A subclass of axolotl's trainer."""
    from axolotl.core.trainers import AxolotlTrainer

    class VoCoAxolotlTrainer(AxolotlTrainer):
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            folder = output_dir if output_dir is not None else self.args.output_dir
            with small_checkpoints(self.model):
                super()._save(output_dir, state_dict=state_dict)
            save_rule(self.model, folder)

    return VoCoAxolotlTrainer
