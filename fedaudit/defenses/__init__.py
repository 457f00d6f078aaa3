"""Defenses: what a client does to an update before it leaves."""
