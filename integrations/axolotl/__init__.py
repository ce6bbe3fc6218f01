"""axolotl's SFT of vision-language models under the VoCo rule, as one of its plugins; see ``README.md``.

    plugins: [voco_plugin.integrations.axolotl.VoCoPlugin]

Reading order: ``settings`` (what the rule is, and what is refused), ``plugin`` (axolotl's hooks, in the order
in which it calls them), ``saving`` (its trainer, whose checkpoints hold the rule). axolotl is imported when
the plugin is asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["VoCoPlugin"]


def __getattr__(name: str) -> Any:
    if name == "VoCoPlugin":
        from .plugin import VoCoPlugin

        return VoCoPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
