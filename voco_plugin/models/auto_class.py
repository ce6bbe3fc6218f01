"""What transformers' auto classes load where a checkpoint names ``modeling_voco.py`` and
``trust_remote_code=True`` is given: the plain model with the rule attached.
"""

from __future__ import annotations

import os
from typing import Any

from ..config import CONFIG_NAME
from .loading import HUB_OPTIONS, find_file, load


class AttachedModel:
    """Stands where an auto class expects a model class. It has no instances: :meth:`from_pretrained` gives a
    model of transformers' own class, extended as :func:`~voco_plugin.attach` does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} has no instances; load it with from_pretrained.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As :func:`~voco_plugin.load`, the model alone.

        Raises:
            ValueError: an adapter is asked for, the folder holds no rule, or something that the model alone
                cannot give.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if model_args:
            raise ValueError("from_pretrained takes the folder alone by position; give options by name.")
        # the auto class's own; the model inside is transformers' code
        for name in ("_from_auto", "_commit_hash", "code_revision", "trust_remote_code"):
            kwargs.pop(name, None)
        adapter = (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        if adapter is not None:
            raise ValueError(
                f"{adapter} is an adapter, whose rule transformers does not read; load it with "
                f"voco_plugin.load({os.fspath(adapter)!r})."
            )
        if kwargs.pop("output_loading_info", False):
            raise ValueError(
                "output_loading_info=True is not given with the rule on; leave it out, or leave "
                "trust_remote_code out to load the plain model."
            )
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if find_file(source, CONFIG_NAME, **hub) is None:
            raise ValueError(
                f"{source} has no {CONFIG_NAME}, so its rule is not known; save the model again with "
                "voco_plugin, or leave trust_remote_code out to load the plain model."
            )
        return load(source, **kwargs)[0]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "from_config makes a model with new weights, which has no rule; make it without "
            "trust_remote_code and attach one: voco_plugin.attach(model, VoCoConfig(…), processor)."
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: a saved model's config names its file (``inference/modeling_file.py``)."""


__all__ = ["AttachedModel"]
