"""fedaudit: federated learning simulation with leakage auditing.

What do these updates give away? Flower clients train and send updates; an auditing strategy measures,
for every client and every round, what each update reveals, compares defenses on the same federation,
and on request runs gradient inversion against the intercepted updates.

Names are loaded on first use, so that ``import fedaudit`` costs neither torch nor flwr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Auditor": "fedaudit.audit.auditor",
    "AuditRecord": "fedaudit.records",
    "ClientUpdate": "fedaudit.types",
    "Estimate": "fedaudit.types",
    "FedauditError": "fedaudit.errors",
    "Run": "fedaudit.records",
    "RunConfig": "fedaudit.config",
    "load_run": "fedaudit.records",
}
__all__ = [*sorted(_LAZY), "__version__"]

if TYPE_CHECKING:
    from fedaudit.audit.auditor import Auditor
    from fedaudit.config import RunConfig
    from fedaudit.errors import FedauditError
    from fedaudit.records import AuditRecord, Run, load_run
    from fedaudit.types import ClientUpdate, Estimate


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fedaudit' has no attribute {name!r}")
