"""Datasets and how they are split among clients."""
