"""Privacy accounting of the sampled Gaussian mechanism over a client's, or a federation's, whole life.

A step includes every example independently with probability q, adds up the examples' gradients, each
clipped to norm C, and adds N(0, (sigma C)^2 I); sigma is the noise multiplier. The ledger remembers
(sigma, q, steps) for every step a client ever took, because epsilon is a property of all of them:
an accountant created anew in every round reports the epsilon of one round.

Neighbouring datasets differ by adding or removing one example. The client's number of examples and
its participation are taken to be public, and no amplification from sampling clients is claimed: the
server sees who replies.

`epsilon` is valid where every noise multiplier was decided before the first step. Where noise depends on
what was released before, use `RenyiFilter` (stop within a budget) or `RenyiOdometer` (read epsilon at any
time). `client_epsilon` and `FederationLedger` are about whole clients under central noise.
"""

from fedaudit.accounting.adaptive import RenyiFilter, RenyiOdometer
from fedaudit.accounting.composition import Accountant, epsilon, noise_multiplier_for
from fedaudit.accounting.federation import Adversary, FederationLedger, Sampling, client_epsilon
from fedaudit.accounting.ledger import Entry, Ledger
from fedaudit.accounting.selection import Search, search_epsilon

__all__ = [
    "Accountant",
    "Adversary",
    "Entry",
    "FederationLedger",
    "Ledger",
    "RenyiFilter",
    "RenyiOdometer",
    "Sampling",
    "Search",
    "client_epsilon",
    "epsilon",
    "noise_multiplier_for",
    "search_epsilon",
]
