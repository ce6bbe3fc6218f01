"""A LoRA that another trainer made, as an adapter that holds the VoCo token too.

An adapter folder without ``voco_config.json`` is a VLM that was tuned before, with any tool that saves PEFT's
format. To train it on under the rule, as one adapter, it needs what it has not: the VoCo token's row, and the
compressor where the token's embedding is made by one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..core.attachment import attachment
from ..core.block_embeddings import NAME
from .adapter_checks import check_row_is_free
from .adapters import with_token

if TYPE_CHECKING:
    from peft import PeftModel


def grown(model: PeftModel) -> PeftModel:
    """``model`` with the same weights in the same places, the VoCo token's row and compressor beside them.

    Args:
        model: attached, with one adapter that has neither.

    Raises:
        ValueError: the PEFT method cannot train a row of the embeddings alone.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    (name,) = model.peft_config
    config: Any = copy.deepcopy(model.peft_config[name])
    if not hasattr(config, "trainable_token_indices"):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"the adapter to train on is of PEFT's method {method}, which cannot hold the VoCo token's row: "
            "merge it into its base (voco merge ADAPTER OUT) and train a LoRA on OUT, or set train_voco "
            "false."
        )
    # a copy: taking the adapter off gives its memory back
    weights = {
        key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
    }
    base = model.unload()
    compressor = getattr(base, NAME, None)
    if compressor is not None and any(True for _ in compressor.parameters()):
        config.modules_to_save = [*(config.modules_to_save or []), NAME]
    token = attachment(base).vocab.voco_id
    if attachment(base).config.reads_vision:
        check_row_is_free(base, config)
        config.trainable_token_indices = with_token(base, config.trainable_token_indices, token)
    config.inference_mode = False
    made = get_peft_model(base, config, adapter_name=name)
    new = get_peft_model_state_dict(made, adapter_name=name)
    assert weights.keys() <= new.keys(), weights.keys() - new.keys()
    set_peft_model_state_dict(made, {**new, **weights}, adapter_name=name)
    return made
