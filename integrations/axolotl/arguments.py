"""The keys that the plugin adds to axolotl's YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class VoCoArguments(BaseModel):
    """
    Args:
        voco: the fields of a :class:`~voco_plugin.VoCoConfig`; left out: what the model was saved with, or
            the default.
        voco_chat_template: a ``.jinja`` file, or the name of a shipped template; left out: the processor's.
    """

    voco: dict[str, Any] | None = None
    voco_chat_template: str | None = None
