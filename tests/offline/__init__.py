"""Tests of what is done with kept updates."""
