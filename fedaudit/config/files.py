"""Configurations in files: presets by name, and TOML files."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedaudit.config.overrides import flatten
from fedaudit.config.schema import RunConfig
from fedaudit.errors import ConfigError
from fedaudit.spec import Scalar

_PACKAGE = Path(__file__).parents[1]


def presets_folder() -> Path:
    """Where the presets are: beside the package in a checkout, inside it in a wheel."""
    inside = _PACKAGE / "_app" / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def presets() -> dict[str, Path]:
    """Names and files of the presets that come with fedaudit."""
    return {path.stem: path for path in sorted(presets_folder().glob("*.toml"))}


def load_config(source: str | Path, overrides: Mapping[str, Scalar] | None = None) -> RunConfig:
    """Read a TOML file, or a preset by name, and apply overrides by dotted key.

    Raises:
        ConfigError: if the file is missing, is not TOML, or breaks the schema.
    """
    path = _config_file(source)
    try:
        nested = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a configuration is TOML in UTF-8, got {str(path)!r}: {error}") from error
    except OSError as error:
        raise ConfigError(f"a configuration must be readable, got {str(path)!r}: {error.strerror}") from error
    return RunConfig.from_flat({**flatten(nested), **(overrides or {})})


def _config_file(source: str | Path) -> Path:
    path, known = Path(source), presets()
    if str(path) in known:
        return known[str(path)]
    if path.is_file():
        return path
    # a wheel has no configs/ folder beside it: configs/quickstart.toml still names the preset
    if path.parent == Path("configs") and path.suffix == ".toml" and path.stem in known:
        return known[path.stem]
    raise ConfigError(
        f"a configuration is a TOML file or a preset's name, got {str(source)!r}: "
        f"the presets are {', '.join(known)}"
    )
