"""Local update noise: a client-level guarantee for every update by the analytic Gaussian mechanism."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from fedaudit.accounting import Ledger, epsilon, noise_multiplier_for
from fedaudit.claims import Claim, ClipNorm, GaussianNoise, IndependentNoise, NothingBeside
from fedaudit.defenses.plain_steps import PlainSteps
from fedaudit.errors import BudgetExhaustedError
from fedaudit.maths.gaussian_mechanism import gaussian_epsilon, gaussian_noise_multiplier
from fedaudit.types import Guarantee, StepRelease

Composition = Literal["analytic", "rdp", "prv", "pld"]


def clip_update(delta: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """The update scaled to a norm of at most C over ALL its entries, in float64: delta min(1, C / ||delta||).

    Scalars and buffers count like every other entry. An update that is not finite has no norm to clip and
    becomes zero.

    >>> clip_update({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)}, clip_norm=1.0)
    {'w': tensor([0.6000], dtype=torch.float64), 'b': tensor(0.8000, dtype=torch.float64)}
    """
    exact = {name: change.detach().double() for name, change in delta.items()}
    norm = math.hypot(*(float(torch.linalg.vector_norm(change)) for change in exact.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(change) for name, change in exact.items()}
    factor = min(1.0, clip_norm / norm) if norm else 1.0
    return {name: change * factor for name, change in exact.items()}


@dataclass(frozen=True)
class GaussianUpdate(PlainSteps):
    """Clips a client's whole update to norm C and adds N(0, (sigma C)^2) to every one of its coordinates.

    Threat model: whether a client takes part with its data, or sends a zero update, is protected against
    everybody who sees its updates, the server included (local, client-level privacy). Replacing all of a
    client's data by other data moves the update by up to 2 C: that is protected with the epsilon of half this
    sigma, and so is replacing, adding or removing ONE example. Number of examples and participation are taken
    to be public. No amplification from sampling or shuffling clients is claimed. Integer entries are sent as
    they were received.

    One round is one release. R of them with sigma each are one with mu = sqrt(R) / sigma, whose exact epsilon
    is that of the analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530), valid above 1, too. A
    client that takes part in every round of the run spends its budget; one that would exceed it stops.

    The noise is on the update, not on a local step: `release` is that of no defense, so measures that reason
    from it (mutual information, uniqueness of examples) see neither clipping nor noise and overstate what
    leaves; those that read updates (norms, cohort uniqueness, attacks) see what is sent.

    Clipping, noise and their sum are float64; rounding to the weights' precision comes after the noise. A
    seeded generator is for simulation: whoever knows the seed removes the noise.

    Attributes:
        clip_norm: C, the largest norm of an update over all floating-point entries, scalars and buffers too.
        noise_multiplier: sigma; 0 means from epsilon. If both are given, sigma is used and epsilon is the
            budget only.
        epsilon: target and budget over all rounds; 0 means no target.
        delta: probability that epsilon is stated at; choose it under 1 / clients.
        accountant: "analytic" is exact; "rdp", "prv" and "pld" are `fedaudit.accounting.epsilon` at a sample
            rate of 1, and need a little more noise.
        rounds: updates that the budget is divided over; 0 means the rounds of the run.

    Raises:
        ValueError: for an option out of range, or neither epsilon nor noise multiplier.

    >>> round(GaussianUpdate(epsilon=1.0, rounds=1).sigma, 6)
    3.730632
    """

    clip_norm: float = 1.0
    noise_multiplier: float = 0.0
    epsilon: float = 8.0
    delta: float = 1e-5
    accountant: Composition = "analytic"
    rounds: int = 0

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        for option in ("epsilon", "noise_multiplier"):
            value = getattr(self, option)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{option.replace('_', '-')} must be a number >= 0, got {value}")
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ValueError(f"clip-norm must be a number > 0, got {self.clip_norm}: choose e.g. 1")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}: choose it under 1 / clients")
        if not self.epsilon and not self.noise_multiplier:
            raise ValueError(
                "gaussian needs epsilon > 0 or noise-multiplier > 0, got 0 for both: give at least one"
            )
        if self.accountant not in get_args(Composition):
            raise ValueError(
                f"accountant must be {', '.join(get_args(Composition))}, got {self.accountant!r}: choose one"
            )
        if self.rounds < 0:
            raise ValueError(f"rounds must be >= 0, got {self.rounds}: 0 means the rounds of the run")

    def over_rounds(self, rounds: int) -> "GaussianUpdate":
        """The same for a run of so many rounds, unless the option `rounds` says otherwise."""
        return self if self.rounds else replace(self, rounds=rounds)

    @property
    def sigma(self) -> float:
        """Noise standard deviation over the clip norm.

        Raises:
            ValueError: if it follows from epsilon and nobody said over how many rounds.
        """
        if self.noise_multiplier:
            return self.noise_multiplier
        if not self.rounds:
            raise ValueError(
                "gaussian divides epsilon over rounds, got none: set the option rounds, or call over_rounds"
            )
        if self.accountant == "analytic":
            return gaussian_noise_multiplier(self.epsilon, self.delta, self.rounds)
        return noise_multiplier_for(self.epsilon, self.delta, 1.0, self.rounds, self.accountant)

    def charge(self, ledger: Ledger, release: StepRelease, steps: int, num_examples: int) -> Ledger:
        """The ledger after one more update, however many steps it is made of; call it before training.

        Raises:
            BudgetExhaustedError: if its epsilon would exceed the target.
        """
        after = ledger.add(self.sigma, 1.0, 1)
        reached = self._epsilon(after)
        if self.epsilon and reached > self.epsilon * (1 + 1e-6):
            raise BudgetExhaustedError(
                f"one more update would raise the client's epsilon from {self._epsilon(ledger):.4g} to "
                f"{reached:.4g}, above its budget of {self.epsilon:.4g} at delta={self.delta:.1e}: "
                "it must not send another"
            )
        return after

    def guarantee(self, ledger: Ledger, num_examples: int) -> Guarantee:
        """Client-level guarantee for every update in the ledger."""
        return Guarantee(self._epsilon(ledger), self.delta, "client", self.accountant)

    def protect(self, delta: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """The clipped update with noise on every coordinate; an update that is not finite counts as zero."""
        std = self.sigma * self.clip_norm
        sent = {}
        for name, change in clip_update(delta, self.clip_norm).items():
            noise = torch.randn(change.shape, generator=generator, dtype=torch.float64)
            sent[name] = (change + std * noise).to(delta[name].dtype)
        return sent

    def claims(self, update: object, settings: object) -> Sequence[Claim]:
        """Clipping over all entries, fresh noise on every coordinate, nothing beside."""
        return [
            ClipNorm(self.clip_norm),
            GaussianNoise(self.sigma * self.clip_norm, signal=self.clip_norm),
            IndependentNoise("clients"),
            IndependentNoise("rounds"),
            IndependentNoise("tensors"),
            NothingBeside(),
        ]

    def _epsilon(self, ledger: Ledger) -> float:
        if not ledger.history:
            return 0.0
        if self.accountant != "analytic":
            return epsilon(ledger, self.delta, self.accountant)
        squared = math.fsum(steps / noise**2 for noise, _, steps in ledger.history)
        return gaussian_epsilon(1 / math.sqrt(squared), self.delta)
