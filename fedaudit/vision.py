"""torchvision, importable also beside a CPU-only torch; everything else imports torchvision from here.

The released torchvision wheel's extension links CUDA libraries. Beside a CPU-only torch it cannot be
loaded, its operators stay undefined, and ``import torchvision`` stops with "operator torchvision::nms
does not exist", although datasets, transforms and models need no such operator. Declaring the two
missing operators' signatures first (not their code: calling one still fails) makes the import work.
"""

import importlib
import logging
import sys
from types import ModuleType

import torch

_log = logging.getLogger(__name__)

_MISSING = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def import_torchvision() -> ModuleType:
    """The torchvision package, after declaring its operators if, and only if, the import needs it.

    Raises:
        RuntimeError: if the import fails for any other reason than an undeclared operator.
        ImportError: if torchvision is not installed.

    >>> import_torchvision().__name__
    'torchvision'
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _declared or "operator torchvision::" not in str(error):
            raise
    _log.debug("torchvision's extension cannot be loaded by this torch: declaring %s", ", ".join(_MISSING))
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _MISSING:
        library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    _declared.append(library)
    _forget_partial_import()
    return importlib.import_module("torchvision")


def _forget_partial_import() -> None:
    """Sub-modules of the failed import stay behind and would be bound to a package that is gone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


torchvision = import_torchvision()
