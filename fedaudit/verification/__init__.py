"""Tests of what a defense claims, from what an observer received.

`verify_round` tests one round; `recorded.verify_run` a recorded run; `LiveVerifier` a running federation,
which `Auditor(..., verify=claims)` does for you. All tests of a round together raise a
false alarm with probability at most `alpha` = 0.001 in an honest round, so that more than 1 % of 200 honest
rounds is an event of probability 0.001: every test runs at level alpha / (number of tests in the round), and
every interval is stated at that level, so that an interval and its verdict never disagree.
"""

from fedaudit.verification.live import LiveVerifier
from fedaudit.verification.memory import NoiseMemory
from fedaudit.verification.round import verify_round

__all__ = ["LiveVerifier", "NoiseMemory", "verify_round"]
