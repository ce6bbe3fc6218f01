"""``VoCoPlugin``: axolotl's hooks, in the order in which it calls them.

settings checked → model attached → LoRA with the VoCo token's row → batches with VoCo tokens
→ checkpoints with the rule
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from voco_plugin.integrations.trainer_rule import check_row_trains

import voco_plugin as vp
from voco_plugin.training.labelled_batch import labelled_batch
from voco_plugin.training.parts import keep_still

from .saving import save_final, trainer_class
from .settings import KERNELS, chat_template, check_settings, config_for

logger = logging.getLogger(__name__)


class VoCoPlugin(BasePlugin):
    """Vision-language models that axolotl tunes compress each image into VoCo tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = None
        self.model: Any = None

    def get_input_args(self) -> str:
        return "voco_plugin.integrations.axolotl.arguments.VoCoArguments"

    def register(self, cfg: Any) -> None:
        """
        Raises:
            ValueError: a key makes other batches than ``VoCoSFTTrainer``'s.
        """
        check_settings(cfg)
        off = [key for key in KERNELS if cfg.get(key) is None]
        for key in off:  # axolotl would turn them on
            cfg[key] = False
        logger.info("%s: false under VoCo, where they were not compared.", ", ".join(off))

    def pre_model_load(self, cfg: Any) -> None:
        """Once more: axolotl has put defaults in since.

        Raises:
            ValueError: as :meth:`register`.
        """
        check_settings(cfg)

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Attach: the embeddings have their size and the model its dtype by now, and PEFT comes next."""
        from axolotl.loaders import load_processor, load_tokenizer

        # of its own: the one axolotl holds is not given to plugins
        self.processor = load_processor(cfg, load_tokenizer(cfg))
        chat_template(cfg, self.processor)
        vp.attach(model, config_for(cfg), processor=self.processor)
        self.model = model

    def get_lora_config_kwargs(self, cfg: Any) -> dict[str, Any]:
        """The VoCo token's row, among whatever rows the YAML names.

        Raises:
            ValueError: they are named by module.
        """
        if self.model is None:
            return {}
        given = cfg.get("peft_trainable_token_indices") or []
        if not isinstance(given, (list, tuple)):
            raise ValueError(
                f"peft_trainable_token_indices: {given} names modules; under VoCo give a list of token ids."
            )
        token = vp.attachment(self.model).vocab.voco_id
        return {"trainable_token_indices": list(dict.fromkeys([*given, token]))}

    def get_trainer_cls(self, cfg: Any) -> type:
        return trainer_class()

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        return functools.partial(self._collator, cfg), {}

    def _collator(self, cfg: Any, tokenizer: Any, **options: Any) -> Any:
        """Rows as axolotl's vision models take them → batches with VoCo tokens and labels on the answers.

        ``options`` are of padding: it is to the longest row here.
        """
        from axolotl.processing_strategies import ProcessingStrategy

        template = chat_template(cfg, self.processor)
        fields = [dataset.get("field_messages") for dataset in cfg.get("datasets") or []]
        normal = ProcessingStrategy(
            self.processor,
            template,
            cfg.get("image_size"),
            cfg.get("image_resize_algorithm"),
            field_messages=[field for field in dict.fromkeys(fields) if field] or None,
        )

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            conversations = [row["messages"] for row in normal(rows)]
            return labelled_batch(conversations, self.processor, template)

        return vp.wrap_collator(collate, self.model, processor=self.processor)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """
        Raises:
            ValueError: the VoCo token's row does not train.
        """
        check_row_trains(trainer.model, "name the embeddings in unfrozen_parameters, or use adapter: lora")
        keep_still(trainer.model)
        # the loss of a step is the mean over its labelled tokens, however many batches it is gathered from
        trainer.model_accepts_loss_kwargs = True

    def post_train(self, cfg: Any, model: Any) -> None:
        if (cfg.get("local_rank") or 0) == 0:
            save_final(model, cfg.get("output_dir"))
