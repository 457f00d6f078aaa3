"""The reference app as a folder that Flower's own commands accept, from a checkout and from a wheel alike."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import fedaudit
from fedaudit.config import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.spec import Scalar

_PYPROJECT = """\
[project]
name = "fedaudit"
version = "{version}"
dependencies = []

[tool.flwr.app]
publisher = "fedaudit"
fab-include = ["fedaudit/**/*.py", "strategies/**/*.py", "clients/**/*.py"]

[tool.flwr.app.components]
serverapp = "strategies.server_app:app"
clientapp = "clients.client_app:app"

[tool.flwr.app.config]
{defaults}"""


def write_app(folder: Path) -> Path:
    """Write the reference app, and the library it imports, into the new folder `folder`.

    A folder of its own, since Flower takes letters, digits and hyphens only in its name, and since an
    installed fedaudit has no ``pyproject.toml``. With the library inside it, the app needs no fedaudit where
    it runs, and what runs there is this very version.

    Raises:
        ConfigError: if the app is neither beside the package nor inside it.
    """
    package = Path(fedaudit.__file__).parent
    source = package / "_app" if (package / "_app").is_dir() else package.parent
    for part in ("strategies", "clients"):
        if not (source / part).is_dir():
            raise ConfigError(
                f"the reference app has a folder {part!r}, got none in {source}: "
                "work in a checkout or install the wheel again"
            )
    ignored = shutil.ignore_patterns("_app", "__pycache__")
    for copied in (package, source / "strategies", source / "clients"):
        shutil.copytree(copied, folder / copied.name, ignore=ignored)
    text = _PYPROJECT.format(version=fedaudit.__version__, defaults=flat_toml(RunConfig().flat()))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def flat_toml(flat: Mapping[str, Scalar]) -> str:
    """Dotted keys as TOML, each key quoted; the form ``flwr run --run-config FILE`` takes.

    >>> print(flat_toml({"federation.rounds": 3, "data.name": "digits"}), end="")
    "federation.rounds" = 3
    "data.name" = "digits"
    """
    # a JSON scalar is a TOML one, except that TOML has no surrogate pairs and no bare DEL
    lines = (
        f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for key, value in flat.items()
    )
    return "".join(lines)
