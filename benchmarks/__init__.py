"""Benchmarks, run from the command line at the repository's root: ``python -m benchmarks.simulation``."""
