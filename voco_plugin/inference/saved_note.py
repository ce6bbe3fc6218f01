"""What a saved model says of itself to those who load it without this package: transformers reads the weights
and knows nothing of the rule, so it compresses nothing and answers otherwise, without a word.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import logging

from ..config import VoCoConfig
from ..files import atomic_write_text

logger = logging.get_logger(__name__)

_CARD = """---
library_name: voco_plugin
tags: [voco]
---
# A vision-language model with VoCo tokens

This model compresses each image into {tokens} inside the language model (`voco_config.json`: rule
`{rule}`), and text reads only {those}. **The rule is not in the weights.** Load it with voco_plugin:

```python
import voco_plugin as vp

model, processor = vp.load("path/of/this/folder")
```

{trusted}
`AutoModelForImageTextToText.from_pretrained` and `pipeline(…)` take the folder, too, but run it without the
rule{unless}: nothing is compressed, and the answers are not those it was trained for.
"""
_TRUSTED = """
`AutoModelForImageTextToText.from_pretrained("path/of/this/folder", trust_remote_code=True)` loads it with its
rule, too, where voco_plugin is installed (`modeling_voco.py`).
"""


def note_rule(folder: str | os.PathLike, config: VoCoConfig, found_by_auto_class: bool = False) -> None:
    """A card where the folder has none, and a warning, once.

    Args:
        found_by_auto_class: whether ``trust_remote_code=True`` loads the folder with its rule.
    """
    card = Path(folder) / "README.md"
    if not card.exists():
        one = config.num_tokens == 1
        tokens = "one VoCo token" if one else f"{config.num_tokens} VoCo tokens"
        text = _CARD.format(
            tokens=tokens,
            rule=config.rule,
            those="that token" if one else "those tokens",
            trusted=_TRUSTED if found_by_auto_class else "",
            unless=" unless `trust_remote_code=True` is given" if found_by_auto_class else "",
        )
        atomic_write_text(card, text)
    also = ", or with from_pretrained(…, trust_remote_code=True)" if found_by_auto_class else ""
    else_ = " without trust_remote_code" if found_by_auto_class else ""
    logger.warning_once(
        f"Saved with VoCo's rule, which is not in the weights: load the folder with voco_plugin.load{also}. "
        f"transformers' from_pretrained and pipeline{else_} run it without the rule: nothing is compressed, "
        "and the answers are others."
    )
