"""Defenses: what a client does to an update before it leaves.

A defense acts on local steps (`prepare`, `release`), on the finished update (`protect`), or both. Chained by
"then" they act from left to right. Only dp-sgd and gaussian give a formal guarantee; what the others leave to
an attacker is a matter of measurement. A larger effective batch, the simplest mitigation of all, is no part
of this list but `train.batch-size`: more examples in a step make each harder to invert, and promise nothing.
"""
