"""``--tuner_type lora`` of an attached model: ms-swift's LoRA, with the VoCo token's row in it."""

from __future__ import annotations

from typing import Any

from swift.tuner_plugin import Tuner, tuners_map

import voco_plugin as vp
from voco_plugin.training.adapters import prepare_peft_config
from voco_plugin.training.grown_adapters import grown

from .settings import REFUSED_TUNER

COMPARED = ("lora", "full")
PLAIN = ("true", "false", "gaussian")
"""Ways to start a LoRA that leave the base model as it is."""


def register_tuners() -> None:
    """``lora`` trains the row too; the others are refused by name."""
    from swift.arguments.base_args.base_args import get_supported_tuners

    for name in get_supported_tuners():
        if name not in COMPARED:
            tuners_map[name] = _refusing(name)
    tuners_map["lora"] = VoCoLoRA


def _refusing(name: str) -> type[Tuner]:
    class Refused(Tuner):
        @staticmethod
        def prepare_model(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(REFUSED_TUNER.format(name=name))

        from_pretrained = prepare_model

    return Refused


class VoCoLoRA(Tuner):
    """ms-swift's LoRA arguments as they are, and one trainable row of the embeddings."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """
        Raises:
            ValueError: an argument makes another LoRA than PEFT's, or leaves no row to train.
        """
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
        from swift.tuners import LoraConfig, Swift

        for name, is_set in (
            ("tuner_backend unsloth", args.tuner_backend != "peft"),
            ("use_swift_lora true", args.use_swift_lora),
            (f"init_weights {args.init_weights}", str(args.init_weights).lower() not in PLAIN),
        ):
            if is_set:
                raise ValueError(f"--{name} is refused under VoCo: it was not compared with VoCoSFTTrainer.")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            target_modules=get_target_modules(args, model),
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            modules_to_save=get_modules_to_save(args, model, "CAUSAL_LM"),
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            lorap_lr_ratio=args.lorap_lr_ratio,
            init_lora_weights=args.init_weights,
            lora_dtype=args.lora_dtype,
            target_parameters=args.target_parameters,
        )
        config = prepare_peft_config(model, config, vp.attachment(model).vocab.voco_id)
        model.requires_grad_(False)
        return Swift.prepare_model(model, config)

    @staticmethod
    def save_pretrained(
        model: Any,
        save_directory: str,
        state_dict: dict[str, Any] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """The adapter, with rows and no whole embeddings; the rule; and the processor."""
        kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(
            save_directory,
            state_dict=state_dict,
            safe_serialization=safe_serialization,
            save_embedding_layers=False,
            **kwargs,
        )
        vp.save_voco_config(model, save_directory)
        processor = vp.attachment(model).processor
        if processor is not None:
            processor.save_pretrained(save_directory)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        """The adapter in ``model_id``; one to train on that has no row for the VoCo token gets it."""
        from swift.tuners import Swift

        loaded = Swift.from_pretrained(model, model_id, **kwargs)
        row = getattr(loaded.peft_config["default"], "trainable_token_indices", None)
        return grown(loaded) if kwargs.get("is_trainable") and not row else loaded
