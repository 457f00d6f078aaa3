"""Flower messages, the auditing strategy and client mods."""
