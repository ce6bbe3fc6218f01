"""The rule that ms-swift's arguments ask for, and which of its settings are refused.

ms-swift writes ``--model_kwargs '{"voco": {"num_tokens": 2}}'`` into the environment, as ``VOCO``, and so
templates of its own read theirs. Here: ``voco``, the fields of a :class:`~voco_plugin.VoCoConfig`, and
``voco_chat_template``, a ``.jinja`` file or the name of a shipped template.
"""

from __future__ import annotations

import ast
import os
from typing import Any

from voco_plugin.integrations.trainer_rule import check_rule, rule_for

import voco_plugin as vp
from voco_plugin.config import read_section

TEMPLATE = "voco"
EXAMPLE = '{"num_tokens": 2}'


def asked_config() -> vp.VoCoConfig | None:
    """The config in ``--model_kwargs``; ``None`` where it says nothing of VoCo.

    Raises:
        ValueError: it cannot be read, or asks for what only ``VoCoSFTTrainer`` does.
    """
    text = os.environ.get("VOCO", "").strip()
    if not text:
        return None
    value: Any = text
    if text.startswith("{"):  # what str() makes of a dict of ms-swift's, or JSON from the shell
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    config = read_section(value, vp.VoCoConfig, "voco", EXAMPLE)
    if config is not None:
        check_rule(config, "ms-swift")
    return config


def config_for(model_dir: str) -> vp.VoCoConfig:
    """The rule for the model in ``model_dir``: what is asked, what was saved with it, or the default.

    Raises:
        ValueError: it was saved with another rule than is asked.
    """
    return rule_for(model_dir, asked_config(), "ms-swift")


def asked_chat_template() -> str | None:
    """``voco_chat_template`` in ``--model_kwargs``, if any."""
    return os.environ.get("VOCO_CHAT_TEMPLATE", "").strip() or None


REFUSED_TEMPLATE = (
    "--template {name} is refused under VoCo: ms-swift's own templates tokenize prompt and answer in pieces, "
    "so that other token ids are learnt than VoCoSFTTrainer learns and the model's chat template writes; "
    "leave --template out (it is then {template}, which goes by the model's chat template)."
)

REFUSED_TUNER = (
    "--tuner_type {name} is refused under VoCo: it was not compared with VoCoSFTTrainer, and would leave the "
    "VoCo token's row as it is; use lora or full."
)


def check_template(template: Any) -> None:
    """Refuse settings of ms-swift's template that make other batches than ``VoCoSFTTrainer``'s.

    Args:
        template: of ms-swift, its arguments set.

    Raises:
        ValueError: by name, with the reason.
    """
    found = {
        "template_backend": (
            template.template_backend != "swift",
            "it takes every token for the answer: prompts would be learnt too; leave it out",
        ),
        "loss_scale": (
            template._loss_scale not in ("default", "last_round"),
            "answers are learnt with weight 1 and nothing else is; use default or last_round",
        ),
        "padding_free": (
            template.padding_free,
            "conversations share a row there, which VoCo tokens cannot be put into; leave it and packing out",
        ),
        "sequence_parallel_size": (
            template.sequence_parallel_size != 1,
            "a row would be cut up, and its blocks with it; leave it out",
        ),
        "truncation_strategy": (
            template.truncation_strategy != "raise",
            "a cut may go through an image and its VoCo tokens; use delete, and a larger max_length",
        ),
        "use_chat_template": (
            not template.use_chat_template,
            "answers are found by the chat template; leave it out",
        ),
        "response_prefix": (
            bool(template.response_prefix),
            "the model's chat template does not write it; leave it out",
        ),
        "agent_template": (
            bool(template._agent_template),
            "tools are not written here; leave it out",
        ),
        "enable_thinking": (
            bool(template.enable_thinking),
            "the model's chat template is used as it stands; leave it out",
        ),
        "task_type": (
            template.task_type != "causal_lm",
            "only causal_lm has a loss on answers; leave it out",
        ),
    }  # fmt: skip
    for name, (is_set, why) in found.items():
        if is_set:
            value = getattr(template, f"_{name}", None)
            value = getattr(template, name, value) if value is None else value
            if name == "truncation_strategy":
                value = {"raise": "delete"}.get(value, value)
            raise ValueError(f"--{name} {value} is refused under VoCo: {why}.")
