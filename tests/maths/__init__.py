"""Tests of the shared mathematics."""
