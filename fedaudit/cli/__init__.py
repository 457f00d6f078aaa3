"""The command line: one module for each group of commands, and what they share."""

from fedaudit.cli.command import entry, main

__all__ = ["entry", "main"]
