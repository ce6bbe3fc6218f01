"""What of an adapter cannot train, load again, or stand beside the VoCo token's row: refused before
training."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from ..core.attachment import attachment
from .parts import LANGUAGE, PROJECTOR, VISION, ModelParts, base_of, is_token_row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_loads_again(config: Any) -> None:
    """Refuse an initialization whose checkpoint would be put onto other weights than it was trained on.

    PEFT saves such an adapter without the weights that it changed, and changes them anew where it is loaded
    (or a run resumed): PiSSA by a whole decomposition and OLoRA do the same again, the others do not.
    """
    init = getattr(config, "init_lora_weights", True)
    for start, why in (
        ("pissa_niter", "decomposes the weights by random projections"),
        ("corda", "needs the covariance of activations"),
        ("lora_ga", "needs the gradients that it was made with"),
    ):
        if isinstance(init, str) and init.lower().startswith(start):
            raise ValueError(
                f"init_lora_weights={init!r} {why}, and a checkpoint holds none of that: loaded or resumed, "
                "the adapter would stand on other weights; use 'pissa', 'eva', 'orthogonal' or True."
            )


def check_prompt_learning(config: Any, compresses: bool, more: bool = False) -> None:
    """Refuse a PEFT method that puts tokens of its own before the sequence where they would be in the way; a
    plain VLM (``voco: null``) takes them.

    Args:
        compresses: whether there are VoCo tokens.
        more: whether the projector or the vision tower is to train beside them.

    Raises:
        ValueError: the message says which.
    """
    method = getattr(config.peft_type, "value", config.peft_type)
    if compresses:
        raise ValueError(
            f"PEFT method {method} puts its own tokens before the sequence, which shifts the blocks; use "
            "LoRA."
        )
    if more:
        raise ValueError(
            f"PEFT method {method} trains its own tokens alone, and train_projector or train_vision_tower is "
            "true; use LoRA, or leave these out."
        )


def check_row_is_free(model: PreTrainedModel, config: Any) -> None:
    """Refuse what would hold the embedding in which the VoCo token's row is to train alone, or a head that is
    tied to it: PEFT makes such a model, and every forward of it raises.

    An untied head may be in ``modules_to_save``.

    Args:
        model: before PEFT.
        config: a PEFT config, its ``target_modules`` as they will be used.

    Raises:
        ValueError: it names the module.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    taken = {names[id(embeddings)]: "holds the VoCo token's row"}
    if head is not None and head.weight is embeddings.weight:
        taken[names[id(head)]] = "is tied to the embedding that holds the VoCo token's row"
    for name, why in taken.items():
        for copied in getattr(config, "modules_to_save", None) or []:
            if name.endswith(copied):  # as PEFT reads it
                raise ValueError(
                    f"modules_to_save={config.modules_to_save!r} copies {name}, which {why}, and that row "
                    f"trains alone; leave {copied!r} out."
                )
        targets = getattr(config, "target_modules", None)
        found = isinstance(targets, str) and re.fullmatch(targets, name)
        if found and "embed" in name.rpartition(".")[2]:
            raise ValueError(
                f"target_modules adapts {name}, which {why}, and that row trains alone; leave it out."
            )


def check_rows_alone(model: PeftModel) -> None:
    """The same of a model that is wrapped already.

    Raises:
        ValueError: it names the module.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in base_of(model).named_modules():
        under = getattr(getattr(module, "token_adapter", None), "base_layer", None)
        if isinstance(under, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"the adapter holds {name} twice, by modules_to_save and by trainable_token_indices, and "
                "PEFT runs no such layer; make it anew without one of them."
            )


def check_adapter(
    model: PeftModel,
    *,
    language: bool,
    voco: bool,
    projector: bool,
    vision_tower: bool,
    compresses: bool = True,
    by_stage: bool = False,
) -> None:
    """Freeze what of a given ``PeftModel`` is not to train; refuse what it cannot train or save.

    Args:
        by_stage: whether it holds the two adapters of ``adapter_stages="separate"``.

    Projector and vision tower train as its adapter has it: their flags are false by default, and say nothing.

    Raises:
        ValueError: a part is asked for that the adapter does not hold, or there are several adapters.
    """
    if len(model.peft_config) > 1 and not by_stage:
        raise ValueError(
            f"the PeftModel holds the adapters {', '.join(model.peft_config)}, and a checkpoint loads as "
            "one; take the others out (delete_adapter), or merge them into the base first."
        )
    config, *_ = model.peft_config.values()
    if config.is_prompt_learning:
        check_prompt_learning(config, compresses, projector or vision_tower)
    check_rows_alone(model)
    base = base_of(model)
    parts = ModelParts(base)
    held = set()
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.of(name)
        if (is_token_row(name) and not voco) or (
            part == LANGUAGE and not is_token_row(name) and not language
        ):
            parameter.requires_grad_(False)
        else:
            held.add(part)
    if voco and compresses and not any(is_token_row(n) for n, _ in base.named_parameters()):
        if attachment(base).config.reads_vision:
            logger.warning(
                "the PeftModel holds no row for the VoCo token (trainable_token_indices): the token keeps "
                "the embedding it starts from. Give the adapter's folder as model, which adds the row."
            )
    for asked, part, key in (
        (projector, PROJECTOR, "train_projector"),
        (vision_tower, VISION, "train_vision_tower"),
    ):
        if asked and part not in held:
            raise ValueError(
                f"{key} is true, and the adapter to train on holds nothing of the {part}; merge it into its "
                "base and start a new one, or leave the key out."
            )
