"""What ``--model_args`` may say, checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from voco_plugin.cli.eval_modes import K_MODES, MODES
from voco_plugin.config import nearest

_RULES = ("isolated", "causal", "star")


@dataclass
class ModelArgs:
    """The arguments of the model ``voco``.

    Attributes:
        pretrained: a VoCo checkpoint or adapter, an existing VLM, or a hub id.
        mode: of ``voco eval``: ``voco`` (from the cache), ``single`` (one pass, no cache), ``base``,
            ``lower``, ``blind``.
        num_tokens, rule, attention: of the ``VoCoConfig``; ``None``: what the checkpoint was saved with.
        store: folder of a ``VoCoCacheStore``; ``None``: one that is deleted with the model.
        answers: file of the answers so far, by prompt and image: a run that ended early goes on.
        max_new_tokens: of tasks that do not say how long an answer may be.
        num_frames, fps, time_text: of videos.
        plugin: a Python file that registers components.
    """

    pretrained: str
    batch_size: int = 1
    mode: str = "voco"
    num_tokens: int | None = None
    rule: str | None = None
    attention: str | None = None
    store: str | None = None
    answers: str | None = None
    dtype: str | None = None
    device: str | None = None
    plugin: str | None = None
    trust_remote_code: bool = False
    max_new_tokens: int = 1024
    num_frames: int | None = None
    fps: float | None = None
    time_text: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_tokens", "max_new_tokens", "num_frames"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1.")
        if self.mode not in MODES:
            raise ValueError(
                f"mode={self.mode!r} is none{nearest(str(self.mode), MODES)}: {', '.join(MODES)}."
            )
        if self.rule is not None and self.rule not in _RULES:
            raise ValueError(
                f"rule={self.rule!r} is none{nearest(str(self.rule), _RULES)}: {', '.join(_RULES)}."
            )
        if self.mode not in K_MODES:
            for name in ("num_tokens", "rule", "attention"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} goes with VoCo tokens, and mode={self.mode} takes "
                        "them off; leave one of the two out."
                    )
        if self.store is not None and self.mode not in ("voco", "lower"):
            raise ValueError(
                f"store={self.store!r} goes with answers from caches, and mode={self.mode} makes none; leave "
                "it out."
            )
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps}: give one of them.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps={self.fps} is not a number above 0.")


NAMES = tuple(field.name for field in fields(ModelArgs))
_FLAGS = ("time_text", "trust_remote_code")
_NUMBERS = ("batch_size", "num_tokens", "max_new_tokens", "num_frames")


def read_args(given: dict[str, Any]) -> ModelArgs:
    """``--model_args`` as the harness hands them over: numbers that looked like numbers, paths that did too.

    Raises:
        ValueError: an argument is unknown, missing or out of range.
    """
    given = dict(given)
    most = given.pop("max_batch_size", None)  # of --batch_size auto
    if most is not None or str(given.get("batch_size", "")).startswith("auto"):
        raise ValueError("batch_size=auto is not known to this model; give a number: --batch_size 32.")
    for name in given:
        if name not in NAMES:
            raise ValueError(
                f"the model voco has no argument {name!r}{nearest(name, NAMES)}; it has {', '.join(NAMES)}. "
                "(A path with a comma in it goes in quotes: pretrained='\"a,b\"'.)"
            )
    if not given.get("pretrained"):
        raise ValueError("the model voco needs --model_args pretrained=FOLDER (or a hub id).")
    return ModelArgs(**{name: _read(name, value) for name, value in given.items()})


def _read(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]  # how the harness lets a comma through
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: give true or false.")
        return value
    if name == "fps":
        return value if value is None else float(value)
    if name in _NUMBERS:
        if isinstance(value, str) and value.isdigit():
            return int(value)
        return int(value) if isinstance(value, float) and value == int(value) else value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
