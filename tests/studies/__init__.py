"""Tests of studies of several federations."""
