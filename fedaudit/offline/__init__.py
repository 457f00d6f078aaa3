"""Attacks and inference on the updates that a finished run kept."""
