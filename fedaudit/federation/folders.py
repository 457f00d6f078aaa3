"""Where a run keeps everything: a folder named by its defense and seed, or as its configuration says."""

from pathlib import Path

from fedaudit.config import RunConfig


def run_name(config: RunConfig) -> str:
    """The run's folder name: letters, digits, dots and hyphens of its defense and seed."""
    return config.output.name or f"{plain(config.defense.name)}-seed{config.seed}"


def plain(text: str) -> str:
    """Letters, digits, dots and equals signs of a text, hyphens for the rest."""
    plain = "".join(c if c.isalnum() or c in ".=" else "-" for c in text).strip("-")
    while "--" in plain:
        plain = plain.replace("--", "-")
    return plain


def run_folder(config: RunConfig) -> Path:
    """Where a run keeps everything."""
    return Path(config.output.directory) / run_name(config)
