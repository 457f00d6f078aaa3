"""What a reader must know about each quantity: its label, its place, its direction and its limits."""

from fedaudit.report.quantities.lookup import PRIVACY, describe, order, with_unit

__all__ = ["PRIVACY", "describe", "order", "with_unit"]
