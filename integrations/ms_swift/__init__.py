"""ms-swift's SFT of vision-language models under the VoCo rule, as an external plugin; see ``README.md``.

    swift sft --external_plugins "$(python -m voco_plugin.integrations.ms_swift)" …

``external/voco_ms_swift.py`` is what ms-swift imports; it calls :func:`register`. Reading order:
``settings`` (what the rule is, and what is refused), ``loading`` (the model gets it), ``template`` (rows
become tokens), ``tuner`` (LoRA that trains the VoCo token's row). Nothing here is imported before ms-swift
asks for it.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN = Path(__file__).parent / "external" / "voco_ms_swift.py"
"""The file for ``--external_plugins``."""


def register() -> None:
    """Tell ms-swift's registries of models, templates and tuners; a second call changes nothing more."""
    from .loading import register_loaders
    from .template import register_templates
    from .tuner import register_tuners

    register_loaders()
    register_templates()
    register_tuners()
