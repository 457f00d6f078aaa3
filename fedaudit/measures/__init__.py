"""Leakage measures: pure functions first, then an adapter each."""
