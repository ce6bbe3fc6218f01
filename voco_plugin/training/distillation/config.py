"""``DistillConfig``: what is added to the loss so that the compressed model answers as the original one does
(paper, Eq. 1 and 5), which the paper writes and its code does not do.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from ...config import from_fields, nearest, read_section, suggest_fields

DIVERGENCES = ("forward", "reverse", "jsd")
TEACHERS = ("base", "frozen")


@suggest_fields
@dataclass
class DistillConfig:
    """The distillation term of the training loss, on the answer tokens (paper, Eq. 1 and 5):

        loss = ce_weight · ordinary loss + weight · temperature² · D(teacher, student) + hidden_weight · H

    Both are means over the answer tokens of the whole batch. The teacher is LM_o: the plain model reads the
    same prompt without VoCo tokens, all vision tokens visible.

    Args:
        weight: of the divergence D between the next-token distributions.
        ce_weight: of the ordinary loss (for a mixture of experts with its balancing term).
        temperature: logits are divided by it on both sides. D is multiplied by its square, so that the weight
            means the same at every temperature (Hinton et al., 2015).
        divergence: ``forward``: KL(teacher ‖ student), the paper's; ``reverse``: KL(student ‖ teacher);
            ``jsd``: the mean of both to their even mixture.
        top_k: compare the teacher's k likeliest tokens and, as one more outcome, all the others together;
            ``None`` compares every token. It is never more than the whole divergence.
        teacher: ``base``: the same weights without the adapter, so that no second model is in memory (LoRA,
            or a VoCo row that trains alone); ``frozen``: a copy of the model as it is when training starts;
            else a checkpoint, folder or hub id, of the same family, tokenizer and image processor.
        teacher_tokens: whether the teacher reads the VoCo tokens too, as a checkpoint does that was trained
            with them under ``rule: causal`` (the paper's upper bound).
        chunk: how many answer tokens have their logits in memory at once.
        hidden_weight: of H, the squared difference of hidden states over the teacher's mean square.
        hidden_layers: whose, counted as transformers does (0: the embeddings); ``None``: the last, after the
            final norm. H is their mean.

    Raises:
        ValueError: a value is unknown or out of range, or nothing is distilled.
    """

    weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward"
    top_k: int | None = None
    teacher: str = "base"
    teacher_tokens: bool = False
    chunk: int = 128
    hidden_weight: float = 0.0
    hidden_layers: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "ce_weight", "hidden_weight", "temperature"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "temperature" and value == 0):
                least = "above 0" if name == "temperature" else "of at least 0"
                raise ValueError(f"DistillConfig.{name}={value!r} must be a number {least}.")
        for name in ("top_k", "chunk"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "top_k" and value is None):
                more = ", or null for every token" if name == "top_k" else ""
                raise ValueError(f"DistillConfig.{name}={value!r} must be an integer of at least 1{more}.")
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"DistillConfig.divergence={self.divergence!r} is not known"
                f"{nearest(self.divergence, DIVERGENCES)}; use one of {', '.join(DIVERGENCES)}."
            )
        if not isinstance(self.teacher_tokens, bool):
            raise ValueError(f"DistillConfig.teacher_tokens={self.teacher_tokens!r} must be true or false.")
        self._check_teacher()
        self._check_layers()
        if not self.weight and not self.hidden_weight:
            raise ValueError(
                "DistillConfig.weight and hidden_weight are both 0, so nothing is distilled; set one, or "
                "leave distill out."
            )

    def _check_teacher(self) -> None:
        if not isinstance(self.teacher, str) or not self.teacher.strip():
            raise ValueError(f"DistillConfig.teacher={self.teacher!r} must be base, frozen or a checkpoint.")
        meant = nearest(self.teacher, TEACHERS)
        if self.teacher not in TEACHERS and meant and not os.path.isdir(self.teacher):
            raise ValueError(
                f"DistillConfig.teacher={self.teacher!r} is not known{meant} and no folder; use one of "
                f"{', '.join(TEACHERS)}, a checkpoint folder or a hub id."
            )

    def _check_layers(self) -> None:
        layers = self.hidden_layers
        if layers is None:
            return
        whole = isinstance(layers, (list, tuple)) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers
        )
        if not whole or not layers:
            raise ValueError(
                f"DistillConfig.hidden_layers={layers!r} must list numbers of layers from 0, or be null."
            )
        if not self.hidden_weight:
            raise ValueError(
                f"DistillConfig.hidden_layers={layers!r} without hidden_weight changes nothing; set it, or "
                "leave hidden_layers out."
            )
        self.hidden_layers = list(layers)

    def summary(self) -> str:
        """One line of what differs from the defaults, and the teacher: a folder by its last name alone."""
        told = {"teacher": os.path.basename(os.path.normpath(self.teacher))}
        if not os.path.isdir(self.teacher):
            told["teacher"] = self.teacher
        own = DistillConfig()
        told |= {k: v for k, v in self.to_dict().items() if v != getattr(own, k) and k != "teacher"}
        return ", ".join(f"{key}={value}" for key, value in told.items())

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillConfig:
        """The config of ``values``; an unknown key raises ``ValueError`` with the nearest known one."""
        return from_fields(cls, values)


def as_distill_config(value: DistillConfig | dict[str, Any] | str | None) -> DistillConfig | None:
    """``value`` as a :class:`DistillConfig`; see :func:`~voco_plugin.config.read_section`."""
    return read_section(value, DistillConfig, "distill", '{"teacher": "base"}')
