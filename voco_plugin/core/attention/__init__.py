"""Attention backends: each keeps the isolation rule and equals the dense reference."""

from .backends import backend_for, register
from .context import ActiveRule, activate, active_rule, deactivate

__all__ = ["ActiveRule", "activate", "active_rule", "backend_for", "deactivate", "register"]
