"""Attention backends: each keeps the isolation rule and equals the dense reference."""

from .context import ActiveRule, activate, active_rule, deactivate
from .dense import BACKENDS, backend_for, register

__all__ = ["BACKENDS", "ActiveRule", "activate", "active_rule", "backend_for", "deactivate", "register"]
