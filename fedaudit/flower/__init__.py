"""Flower messages, the auditing strategy and central differential privacy; strategies load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedaudit.flower.central_dp import CentralDP
    from fedaudit.flower.strategy import AuditStrategy

__all__ = ["AuditStrategy", "CentralDP"]
_MODULES = {"AuditStrategy": "strategy", "CentralDP": "central_dp"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"fedaudit.flower.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fedaudit.flower' has no attribute {name!r}")
