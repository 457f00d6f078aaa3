"""The reference app's own modules: inside the package in a wheel, beside it in a checkout."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def reference_module(name: str) -> ModuleType:
    """A module of the reference app: inside the package in a wheel, beside it in a checkout."""
    inside = f"fedaudit._app.{name}"
    return import_module(inside if find_spec("fedaudit._app") is not None else name)


def reference_app() -> tuple[Any, Any]:
    """The ServerApp and the ClientApp."""
    return reference_module("strategies.server_app").app, reference_module("clients.client_app").app
