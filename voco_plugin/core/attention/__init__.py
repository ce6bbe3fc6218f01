"""Attention backends: each keeps the isolation rule and equals the dense reference."""

from .backends import backend_for, register

__all__ = ["backend_for", "register"]
