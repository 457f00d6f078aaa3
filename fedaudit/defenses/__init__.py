"""Defenses: what a client does to an update before it leaves.

A defense acts on local steps (`prepare`, `release`), on the finished update (`protect`), or both; censor
chooses the examples to train on, larger-batch how many of them share a step. Chained by "then" they act from
left to right. Only defenses that account for noise give a formal guarantee; what the others leave to an
attacker is a matter of measurement.
"""
