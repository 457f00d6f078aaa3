"""Tests of what a server infers."""
