"""The parts of Opacus that fedaudit uses, imported without a side effect on the root logger.

Opacus calls `logging.basicConfig` when it is imported, and every other library's log lines are then
printed a second time. `basicConfig` does nothing while the root logger has a handler, so one is lent
to it for the time of the import. Importing this module costs one to two seconds: import it inside the
function that needs it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _root_logger_has_a_handler() -> Iterator[None]:
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


with _root_logger_has_a_handler():
    from opacus.accountants import PRVAccountant
    from opacus.accountants.accountant import IAccountant
    from opacus.accountants.analysis.rdp import compute_rdp
    from opacus.accountants.rdp import RDPAccountant
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
    from opacus.optimizers import DPOptimizer
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler
    from opacus.validators import ModuleValidator

__all__ = [
    "DPOptimizer",
    "GradSampleModule",
    "IAccountant",
    "ModuleValidator",
    "PRVAccountant",
    "RDPAccountant",
    "UniformWithReplacementSampler",
    "compute_rdp",
    "ft_compute_per_sample_gradient",
    "prepare_layer",
]
