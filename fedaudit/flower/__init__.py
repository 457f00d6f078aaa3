"""Flower messages and the auditing strategy; `AuditStrategy` loads on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedaudit.flower.strategy import AuditStrategy

__all__ = ["AuditStrategy"]


def __getattr__(name: str) -> Any:
    if name == "AuditStrategy":
        from fedaudit.flower.strategy import AuditStrategy

        return AuditStrategy
    raise AttributeError(f"module 'fedaudit.flower' has no attribute {name!r}")
