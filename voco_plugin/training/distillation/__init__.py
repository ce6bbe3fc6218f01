"""Distillation from the plain model (Eq. 1): the section ``distill:`` and what carries it out."""

from .config import DistillConfig

__all__ = ["DistillConfig"]
