"""The file run.toml of a run: what was run, with which versions, and on which machine."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedaudit import __version__
from fedaudit.config import RunConfig
from fedaudit.records import write_text
from fedaudit.registry import is_repeatable

_VERSIONS = ("torch", "flwr", "opacus", "numpy", "pandas", "scikit-learn", "dp-accounting", "torchmetrics")


def describe(config: RunConfig, folder: Path) -> None:
    """Write run.toml: configuration, versions, seed, revision and machine."""
    versions = {"fedaudit": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    run: dict[str, Any] = {
        "name": folder.name,
        "defense": config.defense.name,
        "seed": config.seed,
        "engine": config.federation.engine,
        "repeatable": is_repeatable(config.defense.name),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git-revision": _revision(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": "cuda" if torch.cuda.is_available() and config.federation.device != "cpu" else "cpu",
    }
    tables: dict[str, Mapping[str, Any]] = {"run": run, "config": config.flat(), "versions": versions}
    write_text(folder / "run.toml", _toml(tables))


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of scalars as TOML; a JSON string is a TOML basic string, and dotted keys are quoted."""
    lines = ["schema = 1"]
    for name, table in tables.items():
        lines += [
            "",
            f"[{name}]",
            *(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()),
        ]
    return "\n".join(lines) + "\n"


def _revision() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
