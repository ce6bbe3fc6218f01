"""Chat templates that mark their answers: the shipped ones by name, and the one to train a processor with.

Nothing here needs TRL: the plug-ins of other trainers go by it too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..config import nearest

TEMPLATES = Path(__file__).parent / "templates"
_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


def training_template(processor: Any, name: str | None = None) -> str:
    """The text of the chat template to train with: ``name`` as :func:`template_file` takes it, else the
    processor's own.

    Raises:
        ValueError: it does not mark the answers (``{% generation %}``), so that nothing says what is learnt.
    """
    if name is not None:
        return checked_template(
            Path(template_file(name)).read_text(encoding="utf-8"), f"the chat template {name!r}"
        )
    return checked_template(
        getattr(processor, "chat_template", None) or "", "the processor's own chat template"
    )


def checked_template(text: str, whose: str) -> str:
    """``text``, of a chat template that marks its answers.

    Args:
        whose: what an error calls it.

    Raises:
        ValueError: it does not.
    """
    if not _MARK.search(text):
        known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
        raise ValueError(
            f"{whose} does not mark the answers ({{% generation %}} … {{% endgeneration %}}), so nothing "
            f"says which tokens are learnt; name one that does: a .jinja file, or a shipped one ({known})."
        )
    return text


def template_file(name: str) -> str:
    """The path of a shipped template's bare name, of a ``.jinja`` file, or of a checkpoint folder's own.

    TRL takes anything else for another tokenizer, whose template and tokens it copies: into a tokenizer,
    which a processor is not.

    Raises:
        ValueError: it is none of these.
    """
    shipped = TEMPLATES / f"{name}.jinja"
    if name and "/" not in name and shipped.is_file():
        return str(shipped)
    path = Path(name).expanduser() if "\n" not in name else Path()
    asked = f"chat_template_path={name if len(name) < 80 else name[:60] + '…'!r}"
    if "{{" in name or "{%" in name:
        raise ValueError(f"{asked} is a template's text; write it to a file that ends in .jinja.")
    if path.is_dir():
        own = path / "chat_template.jinja"
        if own.is_file():
            return str(own)
        raise ValueError(f"{asked} is a folder without a chat_template.jinja; give a file.")
    if not path.is_file():
        known = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
        raise ValueError(
            f"{asked} is neither a shipped template{nearest(name, known)} nor a file or folder here; "
            f"shipped: {', '.join(known)}."
        )
    if path.suffix not in (".jinja", ".j2"):
        raise ValueError(f"{asked} must end in .jinja, for TRL to take it for a template; rename it.")
    return str(path)
